"""Signals are heard at once, and nobody else is left deaf."""

import os
import signal
import subprocess
import sys
import threading

import helpers
import pytest

from gptjax import interrupts


def test_a_listener_hears_and_gives_way(monkeypatch):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing)
    handler = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        heard = threading.Event()
        assert interrupts.listen(lambda number: heard.set()) is None
        os.kill(os.getpid(), signal.SIGUSR2)
        assert heard.wait(10)
        interrupts.listen(None)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert os.read(reading, 9) == bytes([signal.SIGUSR2])  # who listened before, does again
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGUSR2, handler)
        os.close(reading)
        os.close(writing)


def test_a_process_ends_though_nobody_reads(cache_dir):
    script = (
        "import os; from gptjax import interrupts\n"
        "reading, writing = os.pipe(); os.set_blocking(writing, False)\n"
        "try:\n"
        "    while True: os.write(writing, b'x')\n"
        "except BlockingIOError: os.set_blocking(writing, True)\n"
        "os.dup2(writing, 2); interrupts.end(2, 'stopped')"
    )
    environment = helpers.command_environment(cache_dir)
    assert (
        subprocess.run([sys.executable, "-c", script], env=environment, timeout=30).returncode
        == 130
    )


def test_a_signal_waits_for_the_end_of_a_librarys_work():
    done = []
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), interrupts.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("the rest")
        assert done and signal.getsignal(signal.SIGINT) == signal.default_int_handler
        with pytest.raises(KeyboardInterrupt), interrupts.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            raise ValueError("what a library makes of it")
        thread = threading.Thread(target=lambda: interrupts.deferred().__enter__())
        thread.start()
        thread.join()  # elsewhere there is nothing to defer
    finally:
        signal.signal(signal.SIGINT, handler)
