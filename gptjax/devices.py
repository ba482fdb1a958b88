"""Devices and hosts: the set-up before JAX starts, and what is known of them after."""

import ctypes
import os
import sys
import warnings
from pathlib import Path

import jax

from gptjax import hosts
from gptjax.config import DeviceKind, DistributedConfig
from gptjax.errors import UserError

# Above this many parameters a device's temporary buffers outgrow what a glibc arena holds.
OUTGROWS_ARENAS = 3_000_000

COMPILATION_CACHE_BYTES = 2 << 30

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
KEEP_FREED_MEMORY = {M_TRIM_THRESHOLD: -1, M_TOP_PAD: 64 << 20, M_MMAP_MAX: 0}
MALLOC_DEFAULTS = {
    M_TRIM_THRESHOLD: 128 << 10, M_TOP_PAD: 128 << 10, M_MMAP_MAX: 65536, M_ARENA_MAX: 0,
}  # fmt: skip


def start(
    kind: DeviceKind,
    cpu_devices: int | None,
    parameters: int,
    distributed: DistributedConfig = DistributedConfig(),
) -> None:
    """Join the other hosts, if any, choose the platform, split the CPU into `cpu_devices` (None:
    one, unless JAX_NUM_CPU_DEVICES says otherwise), and prepare for a model of so many
    `parameters`. Call before anything else uses JAX.

    Raises:
        UserError: the kind of device that was asked for is not there.
        RunError: the other hosts do not come.
    """
    if kind in ("auto", "cpu"):  # before JAX starts its threads
        keep_freed_memory(one_arena=parameters > OUTGROWS_ARENAS)
    if cpu_devices:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    if cpu_devices and cpu_devices > 1:
        # One thread per device: else every device's matmuls compete for every core.
        add_xla_flag("--xla_cpu_multi_thread_eigen=false")
    if kind == "cpu":
        jax.config.update("jax_platforms", "cpu")
    # JAX sets this itself where it finds TPUs.
    hosts.join(distributed, tpu="tpu" in (getattr(jax.config, "jax_platforms", None) or ""))
    use_platform(kind)
    if jax.default_backend() != "cpu":
        _set_malloc(MALLOC_DEFAULTS)


def keep_freed_memory(*, one_arena: bool) -> None:
    """Let glibc's malloc keep what XLA frees after each step for the next one. Otherwise the kernel
    takes it back and clears it anew, page by page: up to a third of a step's time on a CPU. Without
    glibc this does nothing.

    No block of a thread's own arena is larger than 64 MiB; with `one_arena` all threads share the
    main one, which grows as it must. Small models are faster with an arena a thread.
    """
    _set_malloc(KEEP_FREED_MEMORY | ({M_ARENA_MAX: 1} if one_arena else {}))


def _set_malloc(options: dict[int, int]) -> None:
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        for option, value in options.items():
            library.mallopt(option, value)


def use_platform(kind: DeviceKind) -> None:
    """Compute on this kind of device; "auto" takes the fastest kind that is there.

    Raises:
        UserError: there is no such device.
    """
    if kind == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if kind not in ("auto", jax.default_backend()):
        package = {"gpu": "jax[cuda13]", "tpu": "jax[tpu]"}.get(kind, "jax")
        raise UserError(
            f"--device {kind}: JAX finds no {kind} here, only {jax.default_backend()};"
            f" install {package}, or use --device {jax.default_backend()}"
        )


def add_xla_flag(flag: str) -> None:
    """Append to XLA_FLAGS unless the user has set the same flag."""
    flags = os.environ.get("XLA_FLAGS", "")
    if flag.split("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def use_compilation_cache(folder: Path) -> None:
    """Keep compiled programs on disk, small ones too, so that a second start compiles nothing; the
    oldest go when there are too many. Where `folder` cannot be written, do without."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _delete_oldest(folder, COMPILATION_CACHE_BYTES)
    except OSError:
        return
    # A full disk there is no trouble either.
    warnings.filterwarnings("ignore", message=".*persistent compilation cache")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _delete_oldest(folder: Path, limit: int) -> None:
    """Until the files take `limit` bytes. (JAX's own limit stops its cache for good when a process
    is killed between the two files that it then writes for each program.)"""
    found = [(file.stat(), file) for file in folder.iterdir() if file.is_file()]
    excess = sum(stat.st_size for stat, _ in found) - limit
    for stat, file in sorted(found, key=lambda pair: pair[0].st_mtime):
        if excess <= 0:
            return
        file.unlink(missing_ok=True)
        excess -= stat.st_size


def device_count() -> int:
    """Devices of all hosts."""
    return jax.device_count()


def host_count() -> int:
    """Processes that train together."""
    return jax.process_count()


def describe() -> str:
    """ "2 x cpu", "32 x TPU v4 on 4 hosts", ..."""
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}{hosts}"


def is_main_host() -> bool:
    """True on the one host that writes logs."""
    return jax.process_index() == 0


# Peak dense bfloat16 FLOP/s of one JAX device, by its `device_kind`; from the vendors' datasheets.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "Tesla V100": 125e12,
}


def peak_flops() -> float | None:
    """Of all devices together, in bfloat16 FLOP/s; None where it is not known."""
    kind = jax.devices()[0].device_kind
    # The longest name that fits: "NVIDIA H100 80GB HBM3" is an H100, not an L4.
    names = [n for n in PEAK_FLOPS if kind == n or kind.startswith((n + " ", n + "-"))]
    return PEAK_FLOPS[max(names, key=len)] * jax.device_count() if names else None
