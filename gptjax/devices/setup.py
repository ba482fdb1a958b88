"""The set-up before JAX starts, and what is known of the devices afterwards."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax

from gptjax import attention, remat
from gptjax.config import ModelConfig
from gptjax.devices import chips, cpu, hosts
from gptjax.errors import UserError, first_line
from gptjax.runtime_config import ComputeConfig, DeviceKind, RuntimeConfig

COMPILATION_CACHE_BYTES = 2 << 30


def start(runtime: RuntimeConfig) -> None:
    """Join the other hosts, if any; choose the platform; split a CPU into `num_devices` (None: one
    device, unless JAX_NUM_CPU_DEVICES says otherwise). Call before anything else uses JAX.

    Raises UserError if there is no device of this kind, JAX has been used with another number of
    CPU devices, or as `hosts.join`.
    """
    if runtime.device in ("auto", "cpu"):
        # Early: glibc counts its arenas when the first thread asks for one.
        cpu.keep_freed_memory(runtime.num_devices or _cpu_devices())
    if runtime.num_devices:
        try:
            jax.config.update("jax_num_cpu_devices", runtime.num_devices)
        except RuntimeError:  # JAX has started, in a notebook say
            if jax.local_device_count() != runtime.num_devices:
                raise UserError(
                    f"num_devices {runtime.num_devices} cannot be set any longer: JAX already runs"
                    f" with {jax.local_device_count()} devices in this process; restart it"
                ) from None
        cpu.divide_cores(runtime.num_devices)
    if runtime.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    # JAX sets jax_platforms itself where it finds TPUs.
    hosts.join(runtime.distributed, tpu="tpu" in (getattr(jax.config, "jax_platforms", None) or ""))
    select_platform(runtime.device)
    hosts.barrier()


def select_platform(kind: DeviceKind) -> None:
    """Compute on this kind of device; "auto" takes the fastest kind there is. Raises UserError if
    there is no such device."""
    if kind in ("auto", "cpu"):
        cpu.keep_freed_memory(_cpu_devices())
    if kind == "cpu":
        jax.config.update("jax_platforms", "cpu")
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second: of "cuda" where there is none
        asked = os.environ.get("JAX_PLATFORMS")
        where = f" (JAX_PLATFORMS={asked}; unset it, or ask for what is there)" if asked else ""
        raise UserError(f"JAX cannot start{where}: {first_line(error)}") from None
    if kind not in ("auto", jax.default_backend()):
        package = {"gpu": "jax[cuda13]", "tpu": "jax[tpu]"}.get(kind, "jax")
        raise UserError(
            f"--device {kind}: JAX finds no {kind} here, only {jax.default_backend()};"
            f" install {package}, or use --device {jax.default_backend()}"
        )
    if jax.default_backend() != "cpu":
        cpu.restore_malloc_defaults()


def _cpu_devices() -> int:
    """Those that a CPU will be split into."""
    return int(getattr(jax.config, "jax_num_cpu_devices", 1))


def use_compilation_cache(folder: Path) -> None:
    """Keep compiled programs on disk, small ones too, so that a second start compiles nothing. The
    oldest go when there are more than COMPILATION_CACHE_BYTES. Where `folder` cannot be written,
    do without."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not by JAX's own limit: for that it writes two files per program, and a kill between them
        # disables its cache for good.
        kept = 0
        programs = [file for file in folder.iterdir() if file.is_file()]
        for file in sorted(programs, key=lambda file: file.stat().st_mtime, reverse=True):
            kept += file.stat().st_size
            if kept > COMPILATION_CACHE_BYTES:
                file.unlink(missing_ok=True)
    except OSError:
        return
    # Nor is a full disk worth a warning.
    warnings.filterwarnings("ignore", message=".*persistent compilation cache")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def resolve_dtype(config: ModelConfig, device: jax.Device | None = None) -> ModelConfig:
    """With dtype "auto" replaced by what suits a device (None: JAX's first): float32 on a CPU, else
    bfloat16."""
    if config.dtype != "auto":
        return config
    cpu_only = (device or jax.devices()[0]).platform == "cpu"
    return config.replace(dtype="float32" if cpu_only else "bfloat16")


def resolve_compute(
    config: ModelConfig, runtime: RuntimeConfig, device: jax.Device | None = None,
    *, train: bool, packed: bool = False,
) -> tuple[ComputeConfig, str]:  # fmt: skip
    """(how the network is computed on a device (None: JAX's first), with nothing left open; why
    attention is computed so). `packed`: as of `attention.choose`."""
    device = device or jax.devices()[0]
    kernel, why = attention.choose(config, runtime.compute, device, train=train, packed=packed)
    # A TPU's compiler takes minutes for unrolled layers, and the loop reads and writes no more.
    loop = device.platform == "tpu" or runtime.strategy == "fsdp"
    compute = runtime.compute.replace(attention=kernel)
    return remat.resolve(compute, config.n_layer, loop=loop), why


device_count = jax.device_count
"""Devices of all hosts together."""

host_count = jax.process_count
"""Processes that train together."""


def is_main_host() -> bool:
    """Whether this is the one host that writes logs."""
    return jax.process_index() == 0


def describe(devices: Sequence[jax.Device] | None = None) -> str:
    """ "2 x cpu", "32 x TPU v4 on 4 hosts", ...; None: those that JAX has."""
    devices = jax.devices() if devices is None else devices
    hosts = len({device.process_index for device in devices})
    return f"{len(devices)} x {devices[0].device_kind}{f' on {hosts} hosts' if hosts > 1 else ''}"


def peak_flops() -> float | None:
    """bfloat16 FLOP/s of all devices together; None where that is not known."""
    devices = jax.devices()
    chip = chips.find(devices[0].device_kind)
    return chip.flops * len(devices) if chip else None
