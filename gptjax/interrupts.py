"""Signals are heard at once. Python runs its handlers in the main thread, between two of its own
instructions; while XLA compiles there that can take minutes. So a thread hears of them too."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable

GRACE = 1.0
"""Seconds in which the main thread shall have answered a signal."""

Listener = Callable[[int], None]

_listener: Listener | None = None
_installed = False


def listen(listener: Listener | None) -> Listener | None:
    """From now on `listener` is called, in a thread of its own, with the number of each signal that
    has a Python handler; the listener before it. Call from the main thread."""
    global _listener, _installed
    before, _listener = _listener, listener
    if not _installed:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=_read, args=(reading,), daemon=True).start()
        _installed = True
    return before


def _read(reading: int) -> None:
    while received := os.read(reading, 1):
        if listener := _listener:
            # In another thread: the next signal must be heard while this one is answered.
            threading.Thread(target=listener, args=(received[0],), daemon=True).start()


def end(number: int, message: str) -> None:
    """End the process here and now, as one that this signal has stopped."""
    say(message)
    os._exit(128 + number)


def say(message: str) -> None:
    """A line on stderr. Not through Python's streams, which may be in the middle of one. What comes
    last shows a terminal's cursor again, in case nobody else has the time for that."""
    shown = "\033[?25h" if sys.stderr.isatty() else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n{shown}".encode())
