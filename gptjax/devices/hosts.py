"""How the processes of several hosts find each other, and what they tell each other: `barrier`,
`all_gather`, `broadcast_from_main` and `all_equal` must be called by all of them, in one order."""

import hashlib
import os
import signal
import socket
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptjax.devices import peer_failure
from gptjax.errors import RunError, UserError, first_line
from gptjax.interrupts import STOP_SIGNALS
from gptjax.runtime_config import DistributedConfig

SHUTDOWN_TIMEOUT = 600
"""Seconds that hosts wait for each other at the end: the main one still writes and samples."""


def join(config: DistributedConfig, *, tpu: bool) -> None:
    """Connect with the other hosts, if there are any; `tpu`: whether this run may use TPUs. Raises
    UserError if what is known of them is wrong or incomplete, RunError if none can be reached."""
    known = find(config, tpu=tpu)
    if known is None:
        return
    address = known["coordinator_address"]
    if known["process_id"] == 0 and address:
        port = address.rpartition(":")[2]
        try:  # JAX would crash
            socket.create_server(("", int(port))).close()
        except (OSError, OverflowError) as error:
            raise UserError(
                f"process 0 cannot listen on port {port}: {error}; end the process that uses it"
                " (another process 0?), or choose another port on all hosts"
            ) from None
    at = f" at {address}" if address else ""
    monitor = peer_failure.PeerMonitor(
        f"the hosts did not connect{at} within {config.initialization_timeout} s"
        " (--distributed.initialization-timeout): check that process 0 runs there and can be"
        " reached, and that every process was started, each with its own number"
    )
    # JAX's own handler for preemption would take SIGTERM away from us.
    jax.config.update("jax_enable_preemption_service", False)
    # It waits in C++ code, where Python's signal handlers do not run until it is over.
    handled = [s for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, signal.SIG_DFL) for s in handled}
    try:
        jax.distributed.initialize(
            **known,
            initialization_timeout=config.initialization_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
        )
    except (ValueError, RuntimeError, OSError, LookupError, TypeError) as error:
        unknown = isinstance(error, OSError) or "coordinator_address should be" in str(error)
        if tpu and unknown and not address:
            monitor.stop()  # a TPU machine without a metadata server to ask about others
            print(
                f"warning: no other hosts were found ({first_line(error)}); this one trains alone"
                " (set JAX_NUM_PROCESSES=1 to do so without this warning)",
                file=sys.stderr,
            )
            return
        raise RunError(
            f"cannot join the other hosts{at}: {first_line(error)}; name process 0's HOST:PORT with"
            " --distributed.coordinator-address, or start a single host with JAX_NUM_PROCESSES=1"
        ) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    monitor.message = peer_failure.MESSAGE


def find(config: DistributedConfig, *, tpu: bool) -> dict[str, Any] | None:
    """Arguments for `jax.distributed.initialize`; None: this process is alone.

    They come from flags; else from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES (1: alone, whatever
    else is set) and JAX_PROCESS_ID; else from what SLURM or a TPU pod says. Raises UserError if
    they are incomplete or out of range.
    """
    env = os.environ
    address, count, number = config.coordinator_address, config.num_processes, config.process_id
    if address is None:
        names = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
        address, *texts = (env.get(name) or None for name in names)
        try:
            count, number = (int(text) if text else None for text in texts)
            launched = tpu or ("SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env)
            if count != 1 and (address or not launched):  # else the launcher knows the rest
                DistributedConfig(address, count, number)  # checks variables as flags are checked
        except ValueError as error:
            raise UserError(f"{', '.join(names)}: {error}") from None
    if count == 1:
        return None
    known = {"coordinator_address": address, "num_processes": count, "process_id": number}
    if address:
        return known | {"cluster_detection_method": "deactivate"}
    # JAX asks the launcher for what is None here. SLURM_NTASKS by itself is set for a whole
    # allocation, in whose shell a single process runs.
    if "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:
        tasks = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
        # JAX gives each task one GPU; one that has a node to itself shall use all of its GPUs.
        one_task_per_node = env.get("SLURM_STEP_NUM_NODES") == str(tasks)
        gpus: dict[str, Any] = {"local_device_ids": []} if one_task_per_node else {}
        return known | gpus if tasks > 1 else None
    if tpu:
        # GKE names the workers; elsewhere JAX asks the VM's metadata server.
        workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
        several = "," in workers if workers else "TPU_SKIP_MDS_QUERY" not in env
        return known if several or int(env.get("MEGASCALE_NUM_SLICES") or 1) > 1 else None
    return None


def barrier() -> None:
    """Wait for all hosts. Right after joining this also connects their devices: on CPUs all hosts
    must begin the first collective within 30 seconds; in later ones they may wait for each other.
    """
    if jax.process_count() == 1:
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 1)  # Gloo prints a greeting
    try:
        all_gather(0)  # waits for the first device only; the sum waits for all of them
        total = jax.pmap(lambda x: jax.lax.psum(x, "devices"), axis_name="devices")
        total(np.ones(jax.local_device_count(), np.int32)).block_until_ready()
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def all_gather(value: int) -> list[int]:
    """The `value` of every host."""
    return multihost_utils.process_allgather(np.int32(value)).reshape(-1).tolist()


def broadcast_from_main(values: list[int]) -> list[int]:
    """The main host's list, on all hosts."""
    count = all_gather(len(values))[0]
    padded = np.array((values + [0] * count)[:count], np.int32)
    return multihost_utils.broadcast_one_to_all(padded).tolist()


def all_equal(text: str) -> bool:
    """Whether all hosts have the same `text`."""
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    return bool((multihost_utils.process_allgather(digest) == digest).all())


def host_rows(rows: int) -> slice:
    """Which of a global batch's rows this host feeds: a contiguous share."""
    share, index = rows // jax.process_count(), jax.process_index()
    return slice(index * share, (index + 1) * share)


def row_numbers(own: int) -> np.ndarray:
    """int32 [own]: what `host_rows` of a global batch are, of which this host has `own`."""
    return np.arange(own, dtype=np.int32) + jax.process_index() * own


def first_shard(x: Any) -> Any:
    """What the first local device holds of an array. Never x[0]: indexing an array that lives on
    many devices gathers it."""
    return x.addressable_shards[0].data if isinstance(x, jax.Array) else x


def whole(x: jax.Array) -> np.ndarray:
    """An array of which hosts may hold parts only. A collective then: all must call it."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def fetch(tree: Any) -> dict[str, float]:
    """A dict of scalars that are the same on all devices, as Python numbers; waits for them."""
    return {name: np.asarray(first_shard(x)).item() for name, x in tree.items()}
