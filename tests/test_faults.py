"""What can happen to a run, done to real processes: nothing is lost but time."""

import contextlib
import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest
from helpers import TINY, assert_one_clear_line, assert_same_run, finish, start, wait_for

from gptjax import run_metadata
from gptjax.checkpoint import Checkpoints

pytestmark = pytest.mark.slow

RUN = ["--run-dir", "run"]
LONG = ["--max-steps", "9000", "--lr-decay-steps", "9000"]


def resumed(folder: Path, cache_dir: Path, *flags: str) -> str:
    """The run goes on to its end; what it printed."""
    result = finish(start(folder, cache_dir, *RUN, *flags))
    assert result.returncode == 0, result.stderr
    return result.stdout


def steps_of(run_dir: Path) -> list[int]:
    with Checkpoints(run_dir) as checkpoints:
        return checkpoints.steps


@pytest.fixture
def half(tmp_path, cache_dir, text_file) -> Path:
    """A run of TINY that was stopped after step 20."""
    process = start(tmp_path, cache_dir, *TINY, *RUN)
    wait_for(process, "step 20: validation")
    process.send_signal(signal.SIGTERM)
    assert finish(process).returncode == 143
    assert len(steps_of(tmp_path / "run")) >= 2
    return tmp_path / "run"


# ------------------------------------------------------------------------------- signals


@pytest.fixture(scope="module")
def evaluating(tmp_path_factory, cache_dir):
    """(the flags of a run that evaluates for seconds, its folder after it was not interrupted)."""
    folder = tmp_path_factory.mktemp("evaluating")
    (folder / "text.txt").write_text(helpers.TEXT * 12)
    flags = [*TINY, "--data.val-fraction", "0.9", "--eval-interval", "20", "--sample-tokens", "0"]
    result = finish(start(folder, cache_dir, *flags, *RUN))
    assert result.returncode == 0, result.stderr
    return flags, folder


@pytest.fixture
def flags(evaluating, tmp_path) -> list[str]:
    """Of that run, in a folder with its text."""
    shutil.copy(evaluating[1] / "text.txt", tmp_path)
    return evaluating[0]


def test_a_stop_during_an_evaluation_loses_nothing(evaluating, flags, tmp_path, cache_dir):
    process = start(tmp_path, cache_dir, *flags, *RUN)
    wait_for(process, "step 15/40")
    time.sleep(0.5)  # five steps take milliseconds, the evaluation that follows takes seconds
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert result.returncode == 130 and "saved step 20. Resume" in result.stdout
    assert helpers.logged(tmp_path / "run")[-1]["step"] == 15
    assert run_metadata.newest_metadata(tmp_path / "run").unfinished["step"] == 20
    # Once more, in the evaluation that is made up for.
    process = start(tmp_path, cache_dir, *RUN)
    wait_for(process, "batch ")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert "saved step 20. Resume" in finish(process).stdout
    resumed(tmp_path, cache_dir)
    assert_same_run(evaluating[1] / "run", tmp_path / "run")


def test_a_stop_in_the_evaluation_of_step_1_loses_no_row(flags, tmp_path, cache_dir):
    for delay in (0.7, 2.0, 5.0):  # until the step is compiled; its evaluation takes seconds
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        process = start(
            tmp_path, cache_dir, *flags, *RUN, "--eval-interval", "1", "--max-steps", "2"
        )  # fmt: skip
        wait_for(process, "step 0: validation")
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        out = finish(process).stdout
        if "saved step" in out:
            break
    assert "saved step 1. Resume" in out
    resumed(tmp_path, cache_dir)
    assert [row["step"] for row in helpers.logged(tmp_path / "run")] == [0, 1, 2]


def test_a_second_ctrl_c_leaves_at_once_and_harms_nothing(evaluating, flags, tmp_path, cache_dir):
    process = start(tmp_path, cache_dir, *flags, *RUN, "--save-interval", "1")
    wait_for(process, "step 15/40")
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert finish(process, timeout=30).returncode in (-signal.SIGINT, 130)
    resumed(tmp_path, cache_dir)
    assert_same_run(evaluating[1] / "run", tmp_path / "run")


def test_a_hangup_saves_and_an_ignored_one_does_not_stop(tmp_path, text_file, cache_dir):
    process = start(tmp_path, cache_dir, *TINY, *RUN, *LONG)
    wait_for(process, "step 10: validation")
    process.send_signal(signal.SIGHUP)
    result = finish(process)
    assert result.returncode == 128 + signal.SIGHUP and "saved step" in result.stdout
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does for its child
    try:
        process = start(tmp_path, cache_dir, *RUN)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for(process, "compiled and took")
    process.send_signal(signal.SIGHUP)
    wait_for(process, "validation loss")
    process.kill()
    finish(process)


def test_a_stop_nobody_can_read_of_is_saved_all_the_same(tmp_path, text_file, cache_dir):
    """stderr is a pipe that is full, stdout one that is closed."""
    reading, full = os.pipe()
    os.set_blocking(full, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(full, b"x" * 4096)
    os.set_blocking(full, True)
    process = subprocess.Popen(
        [sys.executable, "-u", helpers.TRAIN, *TINY, *RUN, *LONG], cwd=tmp_path, text=True,
        env=helpers.command_environment(cache_dir), stdout=subprocess.PIPE, stderr=full,
    )  # fmt: skip
    wait_for(process, "step 10: validation")
    process.stdout.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    os.close(reading)
    os.close(full)
    assert steps_of(tmp_path / "run")[-1] > 10


def test_a_stop_while_sampling_or_after_the_end_is_quick(
    uninterrupted, tmp_path, text_file, cache_dir
):
    for flags, words, code in ((TINY, "step 10: validation", 143), ([], "complete at step", 0)):
        process = start(tmp_path, cache_dir, *flags, *RUN, "--sample-tokens", "1000000")
        wait_for(process, words)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        result = finish(process, timeout=60)
        assert result.returncode == code, result.stderr
        resumed(tmp_path, cache_dir, "--sample-tokens", "0")
        assert_same_run(uninterrupted[0], tmp_path / "run")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_while_preparing_data_leaves_nothing(tmp_path, cache_dir, number, code):
    (tmp_path / "text.txt").write_text(helpers.TEXT * 300)
    pieces = ["--data.tokenizer", "sentencepiece", "--data.sentencepiece-vocab-size", "500"]
    process = start(tmp_path, cache_dir, *TINY, *pieces, *RUN)
    while not list(tmp_path.glob("data/.*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    result = finish(process)
    assert result.returncode == code and result.stderr.splitlines()[-1].startswith("stopped")
    assert not os.listdir(tmp_path / "data") and not (tmp_path / "run").exists()


def test_a_killed_preparation_is_cleared_away_not_anothers(tmp_path, cache_dir, text_file, command):
    process = start(tmp_path, cache_dir, *TINY, *RUN)
    while not (left := list(tmp_path.glob("data/.*"))):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    finish(process)
    (left,) = left
    left.mkdir(exist_ok=True)  # it may just have been finished
    name = left.name.split(".")[1]
    working = left.with_name(f".{name}.working")
    working.mkdir()
    shutil.rmtree(tmp_path / "data" / name, ignore_errors=True)
    held = os.open(working, os.O_RDONLY)  # another process's unfinished folder
    fcntl.flock(held, fcntl.LOCK_EX)
    result = command("-m", "gptjax", "data", "text.txt", "--out", f"data/{name}")
    os.close(held)
    assert result.returncode == 0, result.stderr
    assert working.exists() and not left.exists()


# -------------------------------------------------------------------------------- damage


def test_for_a_damaged_newest_checkpoint_the_one_before_goes_on(
    half, uninterrupted, tmp_path, cache_dir
):
    newest = steps_of(half)[-1]
    largest = max((half / "checkpoints" / str(newest)).rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(content)
    out = resumed(tmp_path, cache_dir)
    assert re.search(rf"checkpoints/{newest} (is corrupted|cannot be read)", out)
    assert f"moved to run/damaged-{newest}" in out and (half / f"damaged-{newest}").is_dir()
    assert int(re.search(r"resumed at step (\d+)", out)[1]) < newest
    assert_same_run(uninterrupted[0], half)


def test_where_no_checkpoint_is_whole_nothing_starts_anew(half, tmp_path, cache_dir):
    for path in (half / "checkpoints").glob("*/params"):
        shutil.rmtree(path)
    for _ in range(2):
        result = finish(start(tmp_path, cache_dir, *RUN))
        assert_one_clear_line(result, "no checkpoint of run is whole", "name another --run-dir")
    assert not [p for p in (half / "checkpoints").iterdir() if p.name.isdigit()]
    assert len(list(half.glob("damaged-*"))) >= 2


def test_a_disk_that_fills_up_ends_a_run_that_goes_on_later(
    uninterrupted, tmp_path, text_file, cache_dir
):
    """A limit on the size of files, set on the running process, stands in for the full disk."""
    process = start(tmp_path, cache_dir, *TINY, *RUN)
    wait_for(process, "step 10: validation")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (5_000, 5_000))
    assert_one_clear_line(finish(process), "cannot", "run", code=1)
    resumed(tmp_path, cache_dir)
    assert_same_run(uninterrupted[0], tmp_path / "run")


AS_ANYONE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""Runs a program without root's right to write everywhere."""


def test_a_read_only_run_directory_is_one_clear_line(half, tmp_path, cache_dir):
    before = helpers.logged(half)
    half.chmod(0o555)
    try:
        result = subprocess.run(
            [sys.executable, "-c", AS_ANYONE, helpers.TRAIN, *RUN], cwd=tmp_path,
            env=helpers.command_environment(cache_dir), capture_output=True, text=True,
        )  # fmt: skip
    finally:
        half.chmod(0o755)
    assert_one_clear_line(result, "run", "Permission denied", code=1)
    assert helpers.logged(half) == before


def test_a_second_process_is_refused_and_a_dead_ones_lock_is_not(
    half, uninterrupted, tmp_path, cache_dir
):
    process = start(tmp_path, cache_dir, *RUN, "--sample-tokens", "1000000")
    wait_for(process, "batch ")
    second = finish(start(tmp_path, cache_dir, *RUN))
    assert_one_clear_line(second, f"run is in use by process {process.pid} on")
    process.kill()
    finish(process)
    assert str(process.pid) in (half / "lock").read_text()
    resumed(tmp_path, cache_dir, "--sample-tokens", "0")
    assert_same_run(uninterrupted[0], half)


def test_data_cut_short_under_a_running_process_are_named(tmp_path, text_file, cache_dir):
    process = start(tmp_path, cache_dir, *TINY, *RUN, "--sample-tokens", "0", *LONG)
    wait_for(process, "step 20: validation")
    (path,) = tmp_path.glob("data/*/train.bin")
    whole = path.read_bytes()
    os.truncate(path, 1000)
    assert_one_clear_line(finish(process), "train.bin is shorter than when it was opened", code=1)
    result = finish(start(tmp_path, cache_dir, *RUN))
    assert_one_clear_line(result, "train.bin is damaged or was replaced: it has 1,000 bytes")
    path.write_bytes(whole)
    step = steps_of(tmp_path / "run")[-1]
    out = resumed(tmp_path, cache_dir, "--max-steps", str(step + 5))
    assert f"resumed at step {step}" in out


# ------------------------------------------------------------------------ other machines


@pytest.mark.parametrize(("devices", "strategy"), [(1, "pmap"), (2, "fsdp"), (4, "pmap")])
def test_eight_devices_checkpoint_goes_on_on_others(
    uninterrupted, tmp_path, text_file, cache_dir, devices, strategy
):
    eight = ["--num-devices", "8", "--max-steps", "20", "--lr-decay-steps", "40"]
    first = finish(start(tmp_path, cache_dir, *TINY, *eight, *RUN))
    assert first.returncode == 0 and "8 x cpu" in first.stdout, first.stderr
    more = ["--max-steps", "40", "--num-devices", str(devices), "--strategy", strategy]
    assert "resumed at step 20" in resumed(tmp_path, cache_dir, *more)
    # The reference ran on two devices, with dropout.
    assert helpers.largest_gap(tmp_path / "run", uninterrupted[0]) < 1e-5
    sample = subprocess.run(
        [sys.executable, helpers.GENERATE, *RUN, "--max-new-tokens", "30"], cwd=tmp_path,
        env=helpers.command_environment(cache_dir), capture_output=True, text=True,
    )  # fmt: skip
    assert sample.returncode == 0 and len(sample.stdout) > 30, sample.stderr


def test_a_step_in_more_pieces_goes_on_on_fewer_devices(
    uninterrupted, tmp_path, text_file, cache_dir
):
    """A batch of 8 devices on one, in eight micro-batches; evaluated over the same windows."""
    flags = ["--num-devices", "8", "--eval-full-split", "False", "--eval-batches", "2"]
    whole, half = [*TINY, *flags], ["--max-steps", "20", "--lr-decay-steps", "40"]
    for more in ([*half, *RUN], ["--run-dir", "whole"]):
        assert finish(start(tmp_path, cache_dir, *whole, *more)).returncode == 0
    pieces = ["--num-devices", "1", "--gradient-accumulation-steps", "8", "--max-steps", "40"]
    assert "resumed at step 20" in resumed(tmp_path, cache_dir, *pieces)
    assert helpers.largest_gap(tmp_path / "run", tmp_path / "whole") < 1e-5


# ---------------------------------------------------------------------------------- soak


def test_a_run_killed_at_random_moments_ends_as_if_it_was_not(
    request, tmp_path, cache_dir, capsys, text_file
):
    """`--kills 100` for a long one. Every third signal is SIGTERM, the others SIGKILL."""
    kills = request.config.getoption("--kills")
    seed = request.config.getoption("--soak-seed")
    draw = random.Random(seed)
    steps = 40 + 10 * kills
    # So large that a save takes longer than a step: nearly always one is under way.
    flags = (
        "--data.source text.txt --model.n-layer 2 --model.n-head 2 --model.n-embd 256"
        " --model.block-size 16 --model.dropout 0.1 --batch-size 2 --eval-interval 20"
        " --eval-batches 2 --log-interval 3 --save-interval 1 --sample-tokens 8"
        f" --max-steps {steps}"
    ).split()
    whole = finish(start(tmp_path, cache_dir, *flags, "--run-dir", "whole"), timeout=3600)
    assert whole.returncode == 0, whole.stderr
    counts = {"kill": 0, "term": 0, "mid-save": 0, "before training": 0}
    folder = tmp_path / "run" / "checkpoints"

    def unfinished() -> list[Path]:
        return [p for p in folder.glob("*") if p.is_dir() and not p.name.isdecimal()]

    for number in range(kills):
        process = start(tmp_path, cache_dir, *flags, *RUN)
        if draw.random() < 0.8:
            wait_for(process, "compiled and took")
            time.sleep(draw.uniform(0, 1.5))
        else:
            time.sleep(draw.uniform(0, 4))
            counts["before training"] += 1
        kind = "term" if number % 3 == 2 else "kill"
        process.send_signal(signal.SIGTERM if kind == "term" else signal.SIGKILL)
        result = finish(process)
        counts[kind] += 1
        assert result.returncode in (0, -9, -15, 143), result.stderr
        counts["mid-save"] += bool(unfinished())
        if "complete at step" in result.stdout:
            break
    last = finish(start(tmp_path, cache_dir, *RUN), timeout=3600)
    assert last.returncode == 0, last.stderr
    assert f"step {steps}" in last.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "run", steps)
    assert not unfinished() and not list((tmp_path / "run").glob("damaged-*"))
    with capsys.disabled():
        print(f"\nsoak, seed {seed}: {json.dumps(counts)}, {steps} steps")
