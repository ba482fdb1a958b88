"""One training process per run directory."""

import os
import subprocess
import sys

from helpers import ROOT

from gptjax.run_lock import RunLock


def test_a_lock_belongs_to_one_until_it_is_closed(tmp_path):
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    assert first.holder() == "" and first.acquire() is None
    assert second.acquire() == second.holder() == first.holder()
    assert first.holder().startswith(f"process {os.getpid()} on ")
    first.close()
    assert second.acquire() is None


def test_a_lock_ends_with_its_process(tmp_path):
    script = "import os, sys; from pathlib import Path; from gptjax.run_lock import RunLock\n"
    script += "lock = RunLock(Path(sys.argv[1])); print(lock.acquire(), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "None\n"
        lock = RunLock(tmp_path)
        assert lock.acquire().startswith(f"process {process.pid} on ")
        process.kill()
        process.wait()
        assert lock.acquire() is None


def test_there_are_no_locks_in_a_bucket():
    class Bucket:  # not a Path
        pass

    assert RunLock(Bucket()).acquire() is None
