"""What the vendors say of their chips, one table with the source of each number; and what the TPU's
library must be told where it has none. Needs no JAX."""

import glob
import os
from typing import NamedTuple

NO_TPUS = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
"""What it would otherwise ask a metadata server for, and complain about; and that several processes
may use it, since they share no chip."""

STACK = "fibers_default_thread_stack_size"
"""The flag for the stacks of the TPU compiler's threads, which are 64 KiB by themselves: programs
with matmuls fused into matmuls, such as attention with dropout, overflow them (libtpu 0.0.42)."""


class Chip(NamedTuple):
    """Peaks of one JAX device (a whole chip, but on TPU v2 and v3 half of one); None: not known."""

    flops: float
    """bfloat16 FLOP/s, dense."""
    memory: float | None = None
    """Bytes."""
    memory_bandwidth: float | None = None
    """Bytes/s."""
    links: float | None = None
    """Bytes/s that it can send to other chips of its slice, over all of its links."""


# https://docs.cloud.google.com/tpu/docs/v4 (and v5e, v5p, v6e). Of the links' bandwidth, which they
# give for both directions together, half.
_V5E = Chip(197e12, 16 * 2**30, 819e9, 200e9)
_V5P = Chip(459e12, 95 * 2**30, 2765e9, 600e9)
_V6E = Chip(918e12, 32 * 2**30, 1638e9, 400e9)

CHIPS = {
    "TPU v2": Chip(22.5e12, 8 * 2**30, 350e9),
    "TPU v3": Chip(61.5e12, 16 * 2**30, 450e9),
    "TPU v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    # NVIDIA's datasheets: A100 SXM, H100 PCIe, NVL and SXM, H200, L4, L40S, V100.
    "NVIDIA A100": Chip(312e12),
    "NVIDIA H100 PCIe": Chip(756e12),
    "NVIDIA H100 NVL": Chip(835e12),
    "NVIDIA H100": Chip(989e12),
    "NVIDIA H200": Chip(989e12),
    "NVIDIA L4": Chip(121e12),
    "NVIDIA L40S": Chip(362e12),
    "Tesla V100": Chip(125e12),
}
"""By `device_kind`."""


def find(device_kind: str) -> Chip | None:
    """None where it is not in the table."""
    # The longest name that fits: "NVIDIA H100 80GB HBM3" is an H100, not an L4.
    names = [
        name
        for name in CHIPS
        if device_kind == name or device_kind.startswith((name + " ", name + "-"))
    ]
    return CHIPS[max(names, key=len)] if names else None


def prepare_tpu_library() -> None:
    """By variables of the environment; call before JAX starts. What they are already stays."""
    flags = os.environ.get("LIBTPU_INIT_ARGS", "").split()
    if not any(STACK in flag for flag in flags):
        # A libtpu that does not know the flag must not end for it. Of several such lists the last
        # one counts.
        unknown = [STACK, *(f.partition("=")[2] for f in flags if f.startswith("--undefok="))]
        flags += [f"--{STACK}={2**20}", f"--undefok={','.join(unknown)}"]
        os.environ["LIBTPU_INIT_ARGS"] = " ".join(flags)
    if not glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*"):
        for name, value in NO_TPUS.items():
            os.environ.setdefault(name, value)
