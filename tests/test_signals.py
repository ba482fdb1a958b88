"""Stop signals: the first is a request, the second Ctrl-C ends the process."""

import os
import signal
import subprocess
import sys
import time
import types

import helpers
import pytest

from gptjax.signals import StopSignal

TRAINING = types.SimpleNamespace(first_step_seconds=1.0)
"""As a Trainer that has taken its first step."""


@pytest.fixture
def stop():
    stop = StopSignal()
    stop.on_start(TRAINING)
    yield stop
    stop.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_a_request_that_is_confirmed(stop, capfd, number):
    assert stop.number == 0
    os.kill(os.getpid(), number)
    assert stop.number == number
    said, until = "", time.monotonic() + 10
    while "saving" not in said and time.monotonic() < until:
        said += capfd.readouterr().err
    assert f"{number.name}: finishing the current step, then saving" in said


def test_before_and_after_training_signals_do_what_they_did():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stop = StopSignal()
    assert {number: signal.getsignal(number) for number in before} == before
    stop.on_start(TRAINING)
    assert {number: signal.getsignal(number) for number in before} != before
    stop.close()
    assert {number: signal.getsignal(number) for number in before} == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopSignal()
        stop.on_start(TRAINING)
        os.kill(os.getpid(), signal.SIGHUP)
        stop.close()
        assert stop.number == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


IN_A_LIBRARY = """
import hashlib, os, signal, threading, types
from gptjax.signals import StopSignal
stop = StopSignal()
stop.on_start(types.SimpleNamespace(first_step_seconds=FIRST))
for at, number in enumerate(SIGNALS):
    threading.Timer(0.5 + 0.3 * at, os.kill, [os.getpid(), number]).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes of C code, which handlers wait for
"""


@pytest.mark.parametrize(
    ("signals", "first_step", "code", "said"),
    [
        ("[15, 2]", 1.0, 130, "stopped at once"),
        ("[2, 2]", 1.0, 130, "stopped at once"),
        ("[2]", None, 130, "stopped before a step was taken"),
        ("[15]", None, 143, "stopped before a step was taken"),
    ],
)
def test_a_library_at_work_delays_no_stop(cache_dir, signals, first_step, code, said):
    script = IN_A_LIBRARY.replace("FIRST", str(first_step)).replace("SIGNALS", signals)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60,
        env=helpers.command_environment(cache_dir),
    )  # fmt: skip
    assert result.returncode == code and result.stderr.splitlines()[-1] == said
    assert "Traceback" not in result.stderr


def test_a_full_pipe_does_not_delay_the_stop(stop, monkeypatch):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writing, True)
    saved = os.dup(2)
    os.dup2(writing, 2)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
    finally:
        os.dup2(saved, 2)
        for descriptor in (saved, reading, writing):
            os.close(descriptor)
