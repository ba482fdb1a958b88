"""Devices and hosts, and nothing else: the only file that knows how many there are.

State rides stacked, one copy per device along a leading axis, under `jax.pmap` with donation. All
that the rest of the project sees are the functions below, so another mapping can take its place.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax import train
from gptjax.config import DeviceKind, ModelConfig, TrainConfig
from gptjax.errors import UserError

AXIS = "devices"

# Up to this many parameters one CPU device per core is faster (small matmuls do not split well
# over threads); above it the optimizer's work, done once per device, costs more than that wins.
SMALL_MODEL = 20_000_000


def start(config: TrainConfig) -> None:
    """Choose the platform and split the CPU into devices. Call before anything else uses JAX.

    Raises:
        UserError: the kind of device that was asked for is not there.
    """
    devices = config.num_devices or _cpu_devices(config)
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
        # One thread per device: else every device's matmuls compete for every core.
        add_xla_flag("--xla_cpu_multi_thread_eigen=false")
    if coordinator := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        jax.distributed.initialize(
            coordinator,
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
            process_id=int(os.environ["JAX_PROCESS_ID"]),
        )
    use_platform(config.device)


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


def _cpu_devices(config: TrainConfig) -> int:
    """One per core for small models, as many as divide the batch; one for large models."""
    if config.model.num_parameters() > SMALL_MODEL:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = config.batch_size // config.gradient_accumulation_steps
    return max((n for n in range(1, (cores or 1) + 1) if rows % n == 0), default=1)


def use_compilation_cache(folder: Path) -> None:
    """Keep compiled programs on disk, small ones too, so that a second start compiles nothing.
    Where `folder` cannot be written, do without."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def device_count() -> int:
    """Devices of all hosts."""
    return jax.device_count()


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


# ------------------------------------------------------------------------------ one step


def host_rows(rows: int) -> slice:
    """Which of a global batch's rows this host feeds: a contiguous share."""
    share = rows // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def split_rows(rows: np.ndarray, accumulation_steps: int) -> np.ndarray:
    """This host's rows [R, ...] -> [local devices, A, R / devices / A, ...]."""
    return rows.reshape(jax.local_device_count(), accumulation_steps, -1, *rows.shape[1:])


def replicate(tree: Any) -> Any:
    """One copy per local device, stacked along a new leading axis."""
    tree = jax.tree.map(_local, tree)
    copy = jax.pmap(lambda _, x: x, axis_name=AXIS, in_axes=(0, None))
    return copy(np.arange(jax.local_device_count()), tree)


def everywhere() -> NamedSharding:
    """A copy on every device of every host."""
    return NamedSharding(Mesh(np.array(jax.devices()), (AXIS,)), PartitionSpec())


def unreplicate(tree: Any) -> Any:
    """One fresh copy of a stacked tree, as arrays replicated over all devices of all hosts (which
    is what can be saved; a stacked pmap output cannot, where there are several hosts)."""
    sharding = everywhere()

    def one(x: jax.Array) -> jax.Array:
        shape = x.shape[1:]
        copies = [shard.data.reshape(shape) for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(shape, sharding, copies)

    return jax.tree.map(one, tree)


def first_copy(tree: Any) -> Any:
    """The first local device's copy of a stacked tree, for work that one device does alone."""
    return jax.tree.map(lambda x: _local(x).reshape(x.shape[1:]), tree)


def _local(x: Any) -> Any:
    # Never x[0]: indexing an array that lives on many devices gathers it.
    return x.addressable_shards[0].data if isinstance(x, jax.Array) else x


def fetch(tree: Any) -> dict[str, float]:
    """The first local device's scalars, on the host; waits for them."""
    return {name: np.asarray(_local(x)).item() for name, x in tree.items()}


def train_step(config: TrainConfig) -> Callable[[Any, np.ndarray], tuple[Any, train.Metrics]]:
    """train.train_step over all devices: stacked state (donated) and batch [local devices, A, b,
    T + 1] -> the new state and metrics, stacked."""
    step = functools.partial(train.train_step, config=config, axis_name=AXIS)
    return jax.pmap(step, axis_name=AXIS, donate_argnums=0)


def eval_step(config: ModelConfig) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """train.eval_step over all devices: (stacked params, windows, weights) -> stacked sums."""
    step = functools.partial(train.eval_step, config=config, axis_name=AXIS)
    return jax.pmap(step, axis_name=AXIS)
