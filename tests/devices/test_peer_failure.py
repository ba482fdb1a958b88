"""How a process ends when one that it works with has failed. In processes of their own, without
JAX: the monitor takes over file descriptor 2."""

import subprocess
import sys

import pytest
from helpers import ROOT

from gptjax.devices import peer_failure

FATAL = (
    "E0101 10:00:00.000000   12 coordination_service_agent.cc:12] something about heartbeats\\n"
    "more of it\\n"
    "F0101 10:00:00.000000   12 client.h:80] Terminating process because the JAX distributed"
    " service detected fatal errors. This most likely indicates that another task died\\n"
)


def run(script: str) -> subprocess.CompletedProcess:
    begin = "import ctypes, os, sys, threading, time\nfrom gptjax.devices import peer_failure\n"
    return subprocess.run(
        [sys.executable, "-c", begin + script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_the_runtimes_fatal_error_becomes_one_line():
    result = run(
        "monitor = peer_failure.PeerMonitor('never seen')\n"
        "monitor.message = peer_failure.MESSAGE\n"
        "print('so far')\n"
        f"os.write(2, b'{FATAL}')\n"
        "ctypes.CDLL(None).abort()\n"  # from C, without Python's lock
    )
    assert result.returncode == 1 and result.stdout == "so far\n"
    assert result.stderr == f"error: {peer_failure.MESSAGE}\n"


def test_what_others_write_to_stderr_passes():
    result = run(
        "monitor = peer_failure.PeerMonitor('')\n"
        "print('by Python', file=sys.stderr)\n"
        "os.write(2, b'W0101 10:00:00.000000   12 other.cc:1] by C++\\n')\n"
        "os.write(2, b'I0101 10:00:00.000000   12 coordination_service.cc:1] hidden\\n')\n"
        "time.sleep(0.2)\n"
        "monitor.stop()\n"
        "os.write(2, b'after the end\\n')\n"
    )
    assert result.returncode == 0 and "hidden" not in result.stderr
    for words in ("by Python", "by C++", "after the end"):
        assert words in result.stderr


def test_of_two_threads_that_exit_one_prints_its_message():
    result = run(
        "monitor = peer_failure.PeerMonitor('')\n"
        "for name in 'ab':\n"
        "    threading.Thread(target=monitor.exit, args=(3, name)).start()\n"
        "time.sleep(60)\n"
    )
    assert result.returncode == 3 and result.stderr in ("error: a\n", "error: b\n")


def test_a_failed_command_does_not_wait_for_the_others():
    script = "peer_failure.exit_if_distributed(5)\nprint('alone')\n"
    assert run(script).stdout == "alone\n"
    result = run(f"peer_failure.PeerMonitor('')\n{script}")
    assert result.returncode == 5 and not result.stdout and not result.stderr


@pytest.mark.parametrize(
    ("error", "expected"),
    [(RuntimeError("Gloo all-reduce failed: Connection reset"), True), (TimeoutError(), True),
     (RuntimeError("UNAVAILABLE: failed to connect"), True), (RuntimeError("a bug"), False)],
)  # fmt: skip
def test_only_with_other_hosts_an_error_is_their_failure(monkeypatch, error, expected):
    assert not peer_failure.is_peer_failure(error)
    monkeypatch.setattr(peer_failure.PeerMonitor, "active", object())
    assert peer_failure.is_peer_failure(error) == expected
