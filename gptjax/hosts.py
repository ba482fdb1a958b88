"""How the processes of several hosts find each other."""

import os
import re
import signal
import socket
import sys
from typing import Any

import jax

from gptjax.config import DistributedConfig
from gptjax.errors import RunError, UserError, first_line
from gptjax.watch import GONE, Watch

SHUTDOWN_TIMEOUT = 600
"""Seconds that hosts wait for each other at the end: the first one writes, and samples."""


def join(config: DistributedConfig, *, tpu: bool) -> None:
    """Wait for the other hosts, if there are any; `tpu`: whether this run may use TPUs.

    Raises:
        UserError: what is known of the others is wrong or incomplete.
        RunError: they do not come.
    """
    given = find(config, tpu=tpu)
    if given is None:
        return
    _check(given)
    where = f" at {given['coordinator_address']}" if given["coordinator_address"] else ""
    lonely = (
        f"the hosts did not come together{where}: is process 0 running there and in reach, and was"
        f" each one started, with a number of its own? (waited {config.initialization_timeout} s;"
        " --distributed.initialization-timeout)"
    )
    watch = Watch(lonely)
    # JAX's own watch for preemption would take SIGTERM away from us.
    jax.config.update("jax_enable_preemption_service", False)
    # It waits in C++, where a signal's handler in Python is heard of only at the end.
    heard = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, signal.SIG_DFL) for s in heard}
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=config.initialization_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
        )
    except (ValueError, RuntimeError, OSError, LookupError, TypeError) as error:
        untold = isinstance(error, OSError) or "coordinator_address should be" in str(error)
        if tpu and untold and not any(given.values()):
            watch.stop()  # a TPU whose machine has nobody to ask about others
            print(
                f"warning: no other hosts are known here ({first_line(error)}); this one trains"
                " alone (JAX_NUM_PROCESSES=1 says so without a warning)",
                file=sys.stderr,
            )
            return
        raise RunError(
            f"the hosts could not be joined{where}: {first_line(error)}; name process 0's HOST:PORT"
            " by --distributed.coordinator-address, or start a single host with JAX_NUM_PROCESSES=1"
        ) from error
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
    watch.line = GONE


def find(config: DistributedConfig, *, tpu: bool) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be told; None: this process is alone.

    By flags, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES (1: alone, whatever else is set) and
    JAX_PROCESS_ID, or what SLURM or a TPU pod says.

    Raises:
        UserError: only a part is known.
    """
    env = os.environ
    address = config.coordinator_address or env.get("JAX_COORDINATOR_ADDRESS")
    try:
        count, number = (
            int(env[name]) if value is None and env.get(name) else value
            for name, value in (
                ("JAX_NUM_PROCESSES", config.num_processes),
                ("JAX_PROCESS_ID", config.process_id),
            )
        )
    except ValueError as error:
        raise UserError(f"JAX_NUM_PROCESSES, JAX_PROCESS_ID: {error}") from None
    if count == 1:
        return None
    given = {"coordinator_address": address, "num_processes": count, "process_id": number}
    if None not in given.values():
        return given | {"cluster_detection_method": "deactivate"}
    # What is None here JAX takes from the launcher. SLURM_NTASKS alone is an allocation's, in whose
    # shell one process runs.
    if not address and "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:
        tasks = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
        # JAX gives each task one GPU; a node's only task is to have all of them.
        whole_nodes = env.get("SLURM_STEP_NUM_NODES") == str(tasks)
        if tasks > 1:
            return given | ({"local_device_ids": []} if whole_nodes else {})
        return None
    if tpu and not address:
        # GKE names the workers; elsewhere JAX asks the VM's metadata server.
        workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
        many = "," in workers if workers else "TPU_SKIP_MDS_QUERY" not in env
        return given if many or int(env.get("MEGASCALE_NUM_SLICES") or 1) > 1 else None
    if any(value is not None for value in given.values()):
        missing = ", ".join(f"JAX_{name.upper()}" for name, value in given.items() if value is None)
        raise UserError(
            "several hosts take JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and"
            f" JAX_PROCESS_ID (or the flags --distributed.*); missing: {missing}"
        )
    return None


def _check(given: dict[str, Any]) -> None:
    """Refuse what JAX would answer with a crash."""
    address, count = given["coordinator_address"], given["num_processes"]
    number = given["process_id"]
    if address is not None and not re.fullmatch(r".+:\d{1,5}", address):
        raise UserError(f"the coordinator's address is {address!r}; expected HOST:PORT")
    if None not in (count, number) and not 0 <= number < count:
        raise UserError(f"process {number} of {count}: expected a number from 0 to {count - 1}")
    if number == 0 and address:
        port = int(address.rpartition(":")[2])
        try:
            with socket.socket() as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(("", port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"process 0 cannot listen on port {port}: {error}; end what uses it (another"
                " process 0?), or choose another port on all hosts"
            ) from None
