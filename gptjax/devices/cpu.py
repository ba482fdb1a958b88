"""What makes JAX faster on CPUs: each function says by how much, measured on two cores of an AMD
EPYC with JAX 0.10, and which name in GPTJAX_TRICKS turns it off (see `gptjax.tricks`)."""

import ctypes
import os
from typing import Any

import jax

from gptjax import tricks

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
KEEP_FREED_MEMORY = {M_TRIM_THRESHOLD: -1, M_TOP_PAD: 64 << 20, M_MMAP_MAX: 0}
MALLOC_DEFAULTS = {
    M_TRIM_THRESHOLD: 128 << 10, M_TOP_PAD: 128 << 10, M_MMAP_MAX: 65536, M_ARENA_MAX: 0,
}  # fmt: skip


def keep_freed_memory(num_devices: int = 1) -> None:
    """Let glibc's malloc keep what XLA frees after each step for the next one (off-switch: malloc).
    Otherwise the kernel takes it back and clears it again page by page: a third of the quickstart's
    training step, a quarter of one at 124M parameters. Call before JAX starts.

    A step's activations are one block. In the arena of one of XLA's threads a block of more than
    64 MiB goes back to the kernel whatever malloc is told; the main thread's arena grows as needed.
    So programs run in the thread that calls them, on the main thread: no page is cleared twice,
    and what is small stays in other arenas, where it does not break up the room of what is large.
    (With one arena for all threads, the other way to keep such blocks, a process trains 10.65M
    parameters in 2.6 instead of 1.2 GB.) Several devices have a thread each: they share one arena,
    unless another thread (NumPy's, say) has made glibc count its arenas before.
    A block of more than 64 MiB that one matrix product takes for a while in another thread still
    goes back: at 124M 17,000 faults a step, 0.8% of its time.
    """
    if _glibc():
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    _set_malloc(KEEP_FREED_MEMORY | ({M_ARENA_MAX: 1} if num_devices > 1 else {}))


def restore_malloc_defaults() -> None:
    """Undo what `keep_freed_memory` told malloc: an accelerator turns out to do the work."""
    _set_malloc(MALLOC_DEFAULTS)


def give_back_memory() -> None:
    """Give the kernel what is free now: what compiling has left, say, which is in pieces and of no
    use to the next step (off-switch: malloc). A process that trains the quickstart for the first
    time needs 0.55 instead of 0.72 GB."""
    if library := _glibc():
        library.malloc_trim(ctypes.c_size_t(0))


def _set_malloc(options: dict[int, int]) -> None:
    if library := _glibc():
        for option, value in options.items():
            library.mallopt(option, value)


def _glibc() -> Any:
    """None: malloc is another library's, or shall be left alone."""
    library = ctypes.CDLL(None)
    found = tricks.enabled("malloc") and hasattr(library, "gnu_get_libc_version")
    return library if found else None


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
