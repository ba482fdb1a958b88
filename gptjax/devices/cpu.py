"""What makes JAX faster on CPUs: each function says by how much, measured on two cores of an AMD
EPYC with JAX 0.10, and which name in GPTJAX_TRICKS turns it off (see `gptjax.tricks`)."""

import ctypes
import os

import jax

from gptjax import tricks

OUTGROWS_ARENAS = 3_000_000
"""With more parameters a device's temporary buffers do not fit an arena of glibc's malloc."""

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
KEEP_FREED_MEMORY = {M_TRIM_THRESHOLD: -1, M_TOP_PAD: 64 << 20, M_MMAP_MAX: 0}
MALLOC_DEFAULTS = {
    M_TRIM_THRESHOLD: 128 << 10, M_TOP_PAD: 128 << 10, M_MMAP_MAX: 65536, M_ARENA_MAX: 0,
}  # fmt: skip


def keep_freed_memory(num_parameters: int) -> None:
    """Let glibc's malloc keep what XLA frees after each step for the next one (off-switch: malloc).
    Otherwise the kernel takes it back and clears it again page by page: a quarter of a training
    step at 124M parameters. Without glibc this does nothing. Call before JAX starts its threads.

    A block in a thread's own arena has at most 64 MiB. For large models all threads share the main
    arena, which grows as needed; small ones are faster with an arena per thread. (Parameters are a
    poor measure, because activations count: the quickstart, 16 x 128 tokens, stays below the limit
    and has 8.9 million page faults in 200 steps, and 20k tokens/s where it could have 38k.)
    """
    one_arena = {M_ARENA_MAX: 1} if num_parameters > OUTGROWS_ARENAS else {}
    _set_malloc(KEEP_FREED_MEMORY | one_arena)


def restore_malloc_defaults() -> None:
    """Undo `keep_freed_memory`, where the accelerator turns out to do the work."""
    _set_malloc(MALLOC_DEFAULTS)


def _set_malloc(options: dict[int, int]) -> None:
    library = ctypes.CDLL(None)
    if tricks.enabled("malloc") and hasattr(library, "gnu_get_libc_version"):
        for option, value in options.items():
            library.mallopt(option, value)


def divide_cores(num_devices: int) -> None:
    """With several CPU devices, one thread for each (off-switch: thread_per_device). Otherwise the
    matrix products of every device compete for every core: a step of the quickstart's model takes
    221 instead of 154 ms on 2 devices, 232 instead of 124 ms on 8. Call before JAX starts."""
    if num_devices > 1 and tricks.enabled("thread_per_device"):
        add_xla_flag("--xla_cpu_multi_thread_eigen=false")


def add_xla_flag(flag: str) -> None:
    """Append to XLA_FLAGS, unless the user has set the same flag."""
    flags = os.environ.get("XLA_FLAGS", "")
    if flag.split("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def sampling_compiler_options() -> dict[str, str] | None:
    """For `jax.jit` of what samples: without XLA's newer CPU kernels (off-switch:
    sampling_kernels). They serve large matrix products and sums; with the small ones of sampling a
    token takes a third longer."""
    # One of the options is experimental: set it only in versions that it was tried with.
    tried = (0, 10) <= jax.__version_info__ < (0, 13)
    if not tried or jax.default_backend() != "cpu" or not tricks.enabled("sampling_kernels"):
        return None
    return {
        "xla_disable_hlo_passes": "tree_reduction_rewriter",
        "xla_cpu_experimental_ynn_fusion_type": "",
    }
