"""How hosts find each other and agree; whole runs on several processes, over gloo, are slow."""

import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers import (
    TINY,
    TRAIN,
    assert_one_clear_line,
    command_environment,
    final_state,
    finish,
    free_port,
    largest_gap,
    logged,
    start,
    start_hosts,
    wait_for,
)

from gptjax.checkpoint import Checkpoints
from gptjax.devices import hosts
from gptjax.errors import UserError
from gptjax.runtime_config import DistributedConfig

ENDLESS = ["--max-steps", "4000", "--lr-decay-steps", "40"]
FLAGS = [*TINY, "--run-dir", "run"]


@pytest.fixture
def no_variables(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("JAX_", "SLURM_", "TPU_", "MEGASCALE")):
            monkeypatch.delenv(name)


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
        ({"JAX_NUM_PROCESSES": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0",
          "SLURM_STEP_NUM_TASKS": "2"}, False, (None, 2, None)),
        # A shell in an allocation for two tasks, and a step of one task.
        ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}, False, None),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0",
          "SLURM_STEP_NUM_TASKS": "1"}, False, None),
        # A TPU VM of Compute Engine asks its metadata server, one of GKE is told.
        ({}, True, (None, None, None)),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
        ({"TPU_SKIP_MDS_QUERY": "1", "MEGASCALE_NUM_SLICES": "2"}, True, (None, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, (None, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "a"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, None),
    ],
)  # fmt: skip
def test_other_hosts_are_found_where_there_are_some(
    monkeypatch, no_variables, variables, tpu, expected
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = hosts.find(DistributedConfig(), tpu=tpu)
    names = ("coordinator_address", "num_processes", "process_id")
    assert (found and tuple(found[name] for name in names)) == expected


def test_a_task_with_a_node_to_itself_gets_all_its_gpus(monkeypatch, no_variables):
    for name, value in {"STEP_NODELIST": "n[1-2]", "PROCID": "0", "STEP_NUM_TASKS": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for nodes, expected in (("1", None), ("2", [])):
        monkeypatch.setenv("SLURM_STEP_NUM_NODES", nodes)
        assert hosts.find(DistributedConfig(), tpu=False).get("local_device_ids") == expected


def test_flags_come_before_variables(monkeypatch, no_variables):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    monkeypatch.setenv("JAX_PROCESS_ID", "7")
    found = hosts.find(DistributedConfig("b:2", 3, 0), tpu=False)
    assert list(found.values()) == ["b:2", 3, 0, "deactivate"]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"},
         "JAX_NUM_PROCESSES, .*; missing: num_processes, process_id"),
        ({"JAX_NUM_PROCESSES": "two"}, "'two'"),
        ({"JAX_NUM_PROCESSES": "0"}, "num_processes 0 must be at least 1"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "process_id 2 is not below"),
        ({"JAX_COORDINATOR_ADDRESS": "host", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
         "'host' is not host:port"),
    ],
)  # fmt: skip
def test_wrong_or_incomplete_variables_are_refused(monkeypatch, no_variables, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        hosts.find(DistributedConfig(), tpu=False)


def test_hosts_feed_contiguous_shares_of_the_global_batch(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    shares = []
    for host in range(4):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        shares.append(np.arange(32)[hosts.host_rows(32)])
    assert np.array_equal(np.concatenate(shares), np.arange(32))


def test_one_host_agrees_with_itself():
    hosts.barrier()
    assert hosts.all_gather(7) == [7] and hosts.all_equal("text")
    assert hosts.broadcast_from_main([3, 1]) == [3, 1] and hosts.broadcast_from_main([]) == []


@pytest.mark.slow
def test_two_hosts_tell_each_other_what_they_know(tmp_path, cache_dir):
    script = """
from gptjax.devices import hosts, setup
from gptjax.runtime_config import RuntimeConfig
setup.start(RuntimeConfig(device="cpu", num_devices=2))
main = setup.is_main_host()
print(setup.describe(), hosts.all_gather(5 if main else 6),
      hosts.broadcast_from_main([1, 2, 3] if main else [9]), hosts.broadcast_from_main([]),
      hosts.all_equal("same"), hosts.all_equal(str(main)), hosts.host_rows(8))
"""
    address = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=command_environment(
                cache_dir, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2",
                JAX_PROCESS_ID=str(rank),
            ),
        )
        for rank in range(2)
    ]  # fmt: skip
    for rows, result in zip(("0, 4", "4, 8"), map(finish, processes), strict=True):
        expected = f"4 x cpu on 2 hosts [5, 6] [1, 2, 3] [] True False slice({rows}, None)\n"
        assert result.stdout == expected, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "strategy"),
    [(2, "pmap"), pytest.param(4, "pmap", marks=pytest.mark.long), (2, "fsdp")],
)
def test_hosts_train_as_one_does(count, strategy, uninterrupted, tmp_path, text_file, cache_dir):
    flags = [*FLAGS, "--strategy", strategy]
    results = [finish(process) for process in start_hosts(count, tmp_path, cache_dir, *flags)]
    assert [result.returncode for result in results] == [0] * count, results
    assert f"{count} x cpu on {count} hosts" in results[0].stdout
    for result in results[1:]:
        assert "step 40/40" not in result.stdout  # only the main host reports
        assert not result.stderr
    # The same batches and the same dropout: only the order of sums differs.
    assert largest_gap(tmp_path / "run", uninterrupted[0]) < 1e-5
    for x, y in zip(final_state(tmp_path / "run"), final_state(uninterrupted[0]), strict=True):
        assert abs(x - y).max() < 1e-3


@pytest.mark.slow
def test_hosts_that_diverge_say_where_each_of_its_rows(tmp_path, text_file, cache_dir):
    flags = [*FLAGS, "--strategy", "fsdp", "--learning-rate", "3e37", "--debug-nans"]
    results = [finish(process) for process in start_hosts(2, tmp_path, cache_dir, *flags)]
    for result in results:
        assert_one_clear_line(result, "became nan at step 2: ", "makes inf from numbers", code=1)


@pytest.mark.slow
def test_a_signal_to_one_host_stops_all_after_the_same_step(
    uninterrupted, tmp_path, text_file, cache_dir, command
):
    processes = start_hosts(2, tmp_path, cache_dir, *FLAGS, *ENDLESS)
    wait_for(processes[0], "step 15/4000")
    processes[1].send_signal(signal.SIGTERM)
    results = [finish(process) for process in processes]
    assert [result.returncode for result in results] == [143, 143], results
    saved = {re.search(r"saved step (\d+)", result.stdout)[1] for result in results}
    assert len(saved) == 1
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert {str(checkpoints.latest_step)} == saved
    if int(saved.pop()) < 40:  # and one host goes on
        result = command(TRAIN, "--run-dir", "run", "--max-steps", "40", "--num-devices", "1")
        assert result.returncode == 0, result.stderr
        assert largest_gap(tmp_path / "run", uninterrupted[0]) < 1e-5


@pytest.mark.slow
def test_a_signal_while_hosts_sample_together_stops_all(tmp_path, text_file, cache_dir):
    flags = "--strategy fsdp --sample-tokens 100000 --max-steps 20".split()
    processes = start_hosts(2, tmp_path, cache_dir, *FLAGS, *flags)
    wait_for(processes[0], "step 10: validation")
    time.sleep(1)
    processes[1].send_signal(signal.SIGTERM)
    results = [finish(process) for process in processes]
    assert [result.returncode for result in results] == [143, 143], results


@pytest.mark.slow
def test_a_share_that_one_host_cannot_read_ends_both(tmp_path, text_file, cache_dir):
    flags = [*FLAGS, "--strategy", "fsdp", "--max-steps", "20"]
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


@pytest.mark.slow
def test_a_dry_run_takes_one_host(tmp_path, text_file, cache_dir):
    for process in start_hosts(2, tmp_path, cache_dir, *TINY, "--dry-run"):
        result = finish(process)
        assert result.returncode in (1, 2) and len(result.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_host_ends_the_others_with_one_line(
    victim, tmp_path, text_file, cache_dir, command
):
    flags = [*FLAGS, *ENDLESS, "--distributed.heartbeat-timeout", "10"]
    processes = start_hosts(2, tmp_path, cache_dir, *flags)
    wait_for(processes[0], "step 20: validation")
    processes[victim].kill()
    survivor = finish(processes[1 - victim], timeout=60)
    assert_one_clear_line(survivor, "another host has stopped", "start the same command", code=1)
    finish(processes[victim])
    before = logged(tmp_path / "run")[-1]["step"]  # and one host goes on
    result = command(TRAIN, "--run-dir", "run", "--max-steps", str(before + 10))
    assert result.returncode == 0 and "resumed at step" in result.stdout


@pytest.mark.slow
def test_a_hanging_host_ends_the_others(tmp_path, text_file, cache_dir):
    flags = [*FLAGS, *ENDLESS, "--distributed.heartbeat-timeout", "10"]
    processes = start_hosts(2, tmp_path, cache_dir, *flags)
    wait_for(processes[0], "step 10: validation")
    processes[1].send_signal(signal.SIGSTOP)
    try:
        survivor = finish(processes[0])
    finally:
        processes[1].kill()
    finish(processes[1])
    assert_one_clear_line(survivor, "another host has stopped", code=1)


@pytest.mark.slow
def test_a_failure_of_one_host_alone_ends_both(tmp_path, text_file, cache_dir):
    first, second = start_hosts(2, tmp_path, cache_dir, *FLAGS, *ENDLESS)
    wait_for(first, "step 10: validation")
    for path in (tmp_path / "data").rglob("train.bin"):
        os.truncate(path, 100)
    results = [finish(process) for process in (first, second)]
    for result in results:
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    assert any("train.bin is shorter" in result.stderr for result in results)


@pytest.mark.slow
def test_a_run_in_use_is_refused_on_every_host(tmp_path, text_file, cache_dir):
    alone = start(tmp_path, cache_dir, *FLAGS, *ENDLESS)
    wait_for(alone, "step 10: validation")
    processes = start_hosts(2, tmp_path, cache_dir, *FLAGS, *ENDLESS)
    results = [finish(process) for process in processes]
    alone.kill()
    finish(alone)
    for result in results:
        assert result.returncode in (1, 2) and len(result.stderr.splitlines()) == 1
    assert f"in use by process {alone.pid} on" in results[0].stderr


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--seed", "--eval-interval"])
def test_hosts_with_different_settings_are_refused(tmp_path, text_file, cache_dir, flag):
    processes = start_hosts(2, tmp_path, cache_dir, *FLAGS, each=[[], [flag, "5"]])
    for result in map(finish, processes):
        assert result.returncode in (1, 2) and len(result.stderr.splitlines()) == 1
        assert "different settings" in result.stderr or "another host has" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_directory_of_each_hosts_own_is_refused(tmp_path, text_file, cache_dir):
    processes, port = [], free_port()
    for rank, folder in enumerate((tmp_path, tmp_path / "other")):
        folder.mkdir(exist_ok=True)
        (folder / "text.txt").write_text(text_file.read_text())
        variables = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(rank),
        }  # fmt: skip
        processes.append(start(folder, cache_dir, *FLAGS, "--num-devices", "1", **variables))
    results = [finish(process) for process in processes]
    assert any("not one folder for all hosts" in result.stderr for result in results), results
    assert all(result.returncode in (1, 2) for result in results)


@pytest.mark.slow
def test_hosts_that_do_not_come_are_one_clear_line(tmp_path, text_file, cache_dir):
    flags = "--distributed.coordinator-address 127.0.0.1:9 --distributed.num-processes 2"
    process = start(
        tmp_path, cache_dir, *TINY, *flags.split(), "--distributed.process-id", "1",
        "--distributed.initialization-timeout", "3",
    )  # fmt: skip
    words = "the hosts did not connect at 127.0.0.1:9 within 3 s"
    assert_one_clear_line(finish(process), words, code=1)


@pytest.mark.slow
def test_two_processes_of_the_same_number_are_refused(tmp_path, text_file, cache_dir):
    port = free_port()
    variables = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "0",
    }  # fmt: skip
    processes = []
    for _ in range(2):
        flags = [*TINY, "--distributed.initialization-timeout", "12"]
        processes.append(start(tmp_path, cache_dir, *flags, **variables))
        time.sleep(5)
    results = [finish(process) for process in processes]
    assert_one_clear_line(results[1], f"process 0 cannot listen on port {port}")
    assert results[0].returncode == 1 and "did not connect" in results[0].stderr
