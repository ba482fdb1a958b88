"""Several real processes as several hosts, over gloo."""

import os
import re
import signal
import subprocess
import time

import pytest
from conftest import assert_one_clear_line
from runs import (
    TINY,
    TRAIN,
    close_to,
    final_state,
    finish,
    free_port,
    logged,
    start,
    start_hosts,
    wait_for,
)

from gptjax import hosts
from gptjax.checkpoint import Checkpoints
from gptjax.config import DistributedConfig
from gptjax.errors import UserError

ENDLESS = ["--max-steps", "4000", "--lr-decay-steps", "40"]


@pytest.mark.parametrize(("count", "strategy"), [(2, "pmap"), (4, "pmap"), (2, "fsdp")])
def test_hosts_train_as_one_does(count, strategy, uninterrupted, tmp_path, text_file, cache_dir):
    flags = [*TINY, "--run-dir", "run", "--parallel.strategy", strategy]
    results = [finish(process) for process in start_hosts(count, tmp_path, cache_dir, *flags)]
    assert [result.returncode for result in results] == [0] * count, results
    assert f"{count} x cpu on {count} hosts" in results[0].stdout
    for result in results[1:]:
        assert "step 40/40" not in result.stdout  # only the first host reports
        assert not result.stderr
    # The same batches and the same dropout: nothing but the order of sums differs.
    assert close_to(tmp_path / "run", uninterrupted[0]) < 1e-5
    for x, y in zip(final_state(tmp_path / "run"), final_state(uninterrupted[0]), strict=True):
        assert abs(x - y).max() < 1e-3


def test_a_signal_to_one_host_stops_all_after_the_same_step_and_one_host_goes_on(
    uninterrupted, tmp_path, text_file, cache_dir, command
):
    processes = start_hosts(2, tmp_path, cache_dir, *TINY, "--run-dir", "run", *ENDLESS)
    wait_for(processes[0], "step 15/4000")
    processes[1].send_signal(signal.SIGTERM)
    results = [finish(process) for process in processes]
    assert [result.returncode for result in results] == [143, 143], results
    saved = {re.search(r"saved step (\d+)", result.stdout)[1] for result in results}
    assert len(saved) == 1
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert {str(checkpoints.latest_step)} == saved
    if int(saved.pop()) < 40:
        result = command(TRAIN, "--run-dir", "run", "--max-steps", "40", "--num-devices", "1")
        assert result.returncode == 0, result.stderr
        assert close_to(tmp_path / "run", uninterrupted[0]) < 1e-5


def test_a_signal_while_hosts_sample_together_stops_them_together(tmp_path, text_file, cache_dir):
    flags = "--parallel.strategy fsdp --sample-tokens 100000 --max-steps 20".split()
    processes = start_hosts(2, tmp_path, cache_dir, *TINY, "--run-dir", "run", *flags)
    wait_for(processes[0], "step 10: validation")
    time.sleep(1)
    processes[1].send_signal(signal.SIGTERM)
    results = [finish(process) for process in processes]
    assert [result.returncode for result in results] == [143, 143], results


def test_a_share_that_one_host_cannot_read_is_put_aside_and_ends_both(
    tmp_path, text_file, cache_dir
):
    flags = [*TINY, "--run-dir", "run", "--parallel.strategy", "fsdp", "--max-steps", "20"]
    for process in start_hosts(2, tmp_path, cache_dir, *flags):
        assert finish(process).returncode == 0
    for path in (tmp_path / "run" / "checkpoints" / "20").glob("*/ocdbt.process_1/d/*"):
        path.write_bytes(path.read_bytes()[:20])
    for _ in range(2):  # the second start goes on from the step before
        results = [finish(process) for process in start_hosts(2, tmp_path, cache_dir, *flags)]
        if all(result.returncode == 0 for result in results):
            break
        assert all(len(result.stderr.splitlines()) == 1 for result in results), results
        assert any("moved to run/damaged-20" in result.stderr for result in results)
    assert "resumed at step 10" in results[0].stdout


def test_a_dry_run_takes_one_host(tmp_path, text_file, cache_dir):
    for process in start_hosts(2, tmp_path, cache_dir, *TINY, "--dry-run"):
        result = finish(process)
        assert result.returncode in (1, 2) and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_is_killed_ends_the_others_with_one_line_and_the_run_goes_on(
    victim, tmp_path, text_file, cache_dir, command
):
    flags = [*TINY, "--run-dir", "run", *ENDLESS, "--distributed.heartbeat-timeout", "10"]
    processes = start_hosts(2, tmp_path, cache_dir, *flags)
    wait_for(processes[0], "step 20: validation")
    processes[victim].kill()
    began = time.monotonic()
    survivor = finish(processes[1 - victim])
    assert_one_clear_line(survivor, "another host has gone", "start the same command", code=1)
    assert time.monotonic() - began < 30
    finish(processes[victim])
    before = logged(tmp_path / "run")[-1]["step"]
    result = command(TRAIN, "--run-dir", "run", "--max-steps", str(before + 10))
    assert result.returncode == 0 and "resumed at step" in result.stdout


def test_a_host_that_hangs_ends_the_others_within_the_heartbeat(tmp_path, text_file, cache_dir):
    flags = [*TINY, "--run-dir", "run", *ENDLESS, "--distributed.heartbeat-timeout", "10"]
    processes = start_hosts(2, tmp_path, cache_dir, *flags)
    wait_for(processes[0], "step 10: validation")
    processes[1].send_signal(signal.SIGSTOP)
    try:
        survivor = finish(processes[0])
    finally:
        processes[1].kill()
    finish(processes[1])
    assert_one_clear_line(survivor, "another host has gone", code=1)


def test_a_failure_of_one_host_alone_ends_both(tmp_path, text_file, cache_dir):
    first, second = start_hosts(2, tmp_path, cache_dir, *TINY, "--run-dir", "run", *ENDLESS)
    wait_for(first, "step 10: validation")
    for path in (tmp_path / "data").rglob("train.bin"):
        os.truncate(path, 100)
    results = [finish(process) for process in (first, second)]
    for result in results:
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    assert any("train.bin is shorter" in result.stderr for result in results)


def test_a_run_in_use_is_refused_on_every_host(tmp_path, text_file, cache_dir):
    alone = start(tmp_path, cache_dir, *TINY, "--run-dir", "run", *ENDLESS)
    wait_for(alone, "step 10: validation")
    results = [
        finish(process)
        for process in start_hosts(2, tmp_path, cache_dir, *TINY, "--run-dir", "run", *ENDLESS)
    ]
    alone.kill()
    finish(alone)
    for result in results:
        assert result.returncode in (1, 2) and len(result.stderr.splitlines()) == 1
    assert f"in use by process {alone.pid} on" in results[0].stderr


def test_hosts_with_different_settings_are_refused(tmp_path, text_file, cache_dir):
    flags = [*TINY, "--run-dir", "run"]
    processes = start_hosts(2, tmp_path, cache_dir, *flags, each=[[], ["--seed", "5"]])
    for result in map(finish, processes):
        assert result.returncode in (1, 2) and len(result.stderr.splitlines()) == 1
        assert "different settings" in result.stderr or "has gone" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_directory_of_each_hosts_own_is_refused(tmp_path, text_file, cache_dir):
    processes, port = [], free_port()
    for rank, folder in enumerate((tmp_path, tmp_path / "other")):
        folder.mkdir(exist_ok=True)
        (folder / "text.txt").write_text(text_file.read_text())
        environment = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(rank),
        }  # fmt: skip
        flags = [*TINY, "--run-dir", "run", "--num-devices", "1"]
        processes.append(start(folder, cache_dir, *flags, **environment))
    results = [finish(process) for process in processes]
    assert any("not one folder for all hosts" in result.stderr for result in results), results
    assert all(result.returncode in (1, 2) for result in results)


def test_hosts_that_do_not_come_are_one_clear_line(tmp_path, text_file, cache_dir):
    flags = "--distributed.coordinator-address 127.0.0.1:9 --distributed.num-processes 2"
    process = start(
        tmp_path, cache_dir, *TINY, *flags.split(), "--distributed.process-id", "1",
        "--distributed.initialization-timeout", "3",
    )  # fmt: skip
    assert_one_clear_line(
        finish(process), "the hosts did not come together at 127.0.0.1:9", "waited 3 s", code=1
    )


def test_two_processes_of_the_same_number_are_refused(tmp_path, text_file, cache_dir):
    processes: list[subprocess.Popen] = []
    port = free_port()
    for _ in range(2):
        environment = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
        flags = [*TINY, "--distributed.initialization-timeout", "8"]
        processes.append(
            start(
                tmp_path,
                cache_dir,
                *flags,
                JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
                **environment,
            )
        )
        time.sleep(3)
    results = [finish(process) for process in processes]
    assert_one_clear_line(results[1], f"process 0 cannot listen on port {port}")
    assert results[0].returncode == 1 and "did not come together" in results[0].stderr


# ------------------------------------------------------------------------------- finding


@pytest.mark.parametrize(
    ("variables", "tpu", "expected"),
    [
        ({}, False, None),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, False,
         ("a:1", 2, 1)),
        ({"JAX_NUM_PROCESSES": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0",
          "SLURM_STEP_NUM_TASKS": "2"}, False, None),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, False,
         (None, None, None)),
        # A shell of an allocation for two tasks, and a step of one task.
        ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}, False, None),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0",
          "SLURM_STEP_NUM_TASKS": "1"}, False, None),
        # TPU VMs: one of Compute Engine asks its metadata server, one of GKE is told.
        ({}, True, (None, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, (None, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "a"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, None),
    ],
)  # fmt: skip
def test_other_hosts_are_looked_for_where_there_are_some(monkeypatch, variables, tpu, expected):
    for name in list(hosts.os.environ):
        if name.startswith(("JAX_", "SLURM_", "TPU_", "MEGASCALE")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = hosts.find(DistributedConfig(), tpu=tpu)
    names = ("coordinator_address", "num_processes", "process_id")
    assert (found and tuple(found[name] for name in names)) == expected


def test_a_part_of_what_hosts_must_know_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    with pytest.raises(UserError, match="missing: JAX_NUM_PROCESSES, JAX_PROCESS_ID"):
        hosts.find(DistributedConfig(), tpu=False)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="'two'"):
        hosts.find(DistributedConfig(), tpu=False)
