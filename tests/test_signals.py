"""Stop signals: the first is a request, the second Ctrl-C ends the process."""

import os
import signal
import subprocess
import sys

import helpers
import pytest

from gptjax.signals import StopSignal


@pytest.fixture
def stop():
    stop = StopSignal()
    stop.on_start(None)
    yield stop
    stop.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_a_request_that_is_confirmed(stop, capfd, number):
    assert stop.number == 0
    os.kill(os.getpid(), number)
    assert stop.number == number
    assert f"{number.name}: finishing the current step, then saving" in capfd.readouterr().err


def test_before_and_after_training_signals_do_what_they_did():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stop = StopSignal()
    assert {number: signal.getsignal(number) for number in before} == before
    stop.on_start(None)
    assert {number: signal.getsignal(number) for number in before} != before
    stop.close()
    assert {number: signal.getsignal(number) for number in before} == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopSignal()
        stop.on_start(None)
        os.kill(os.getpid(), signal.SIGHUP)
        stop.close()
        assert stop.number == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_ends_the_process(cache_dir):
    script = (
        "import os, signal; from gptjax.signals import StopSignal; stop = StopSignal();"
        "stop.on_start(None); os.kill(os.getpid(), signal.SIGTERM); assert stop.number == 15;"
        "os.kill(os.getpid(), signal.SIGINT); print('still here')"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True,
        env=helpers.command_environment(cache_dir),
    )  # fmt: skip
    assert result.returncode == -signal.SIGINT and not result.stdout


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
