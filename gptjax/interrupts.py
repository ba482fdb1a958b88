"""Signals are heard at once. Python runs its handlers in the main thread, between two of its own
instructions; while XLA compiles there that can take minutes. So a thread hears of them too."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO, NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C, a request to end, a lost terminal, and what SLURM sends before a job's time is over."""

GRACE = 1.0
"""Seconds in which the main thread shall have answered a signal."""

Listener = Callable[[int], None]

_listener: Listener | None = None
_pipe: tuple[int, int] | None = None
_before = -1
"""The descriptor that Python told of signals before (an event loop's, say)."""


def listen(listener: Listener | None) -> Listener | None:
    """From now on `listener` is called, in a thread of its own, with the number of each signal that
    has a Python handler; None: nobody is any more. The listener before it. Call from the main
    thread. Meanwhile an event loop of this process is told of no signal."""
    global _listener, _pipe, _before
    last, _listener = _listener, listener
    if listener and not _pipe:
        _pipe = reading, writing = os.pipe()
        os.set_blocking(writing, False)
        _before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=_read, args=(reading,), daemon=True).start()
    elif not listener and _pipe:
        if signal.set_wakeup_fd(_before) not in (_pipe[1], _before):
            raise RuntimeError("somebody else listens to signals now")
        os.close(_pipe[1])  # which ends the thread
        _pipe = None
    return last


def _read(reading: int) -> None:
    with open(reading, "rb", buffering=0) as numbers:
        while received := numbers.read(1):
            if listener := _listener:
                # In another thread: the next signal must be heard while this one is answered.
                threading.Thread(target=listener, args=(received[0],), daemon=True).start()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Signals that would raise an exception do so at the end of the block: a library would take it
    for an error of its own work, and its caller for a damaged file."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


def end(number: int, message: str) -> None:
    """End the process here and now, as one that this signal has stopped."""
    leave(128 + number, message)


def leave(code: int, message: str = "", streams: Sequence[IO[str]] = ()) -> NoReturn:
    """End the process here and now, without Python's farewell, whether or not somebody reads
    `message` and what is left in `streams`."""
    timer = threading.Timer(1, os._exit, [code])
    timer.daemon = True
    timer.start()
    for stream in streams:
        with contextlib.suppress(OSError):
            stream.flush()
    say(message)
    os._exit(code)


def say(message: str) -> None:
    """A line on stderr; and a terminal's cursor is shown again, in case nobody else has the time.
    Not through Python's streams, which may be in the middle of a line."""
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\033[?25h")
        if message:
            os.write(2, f"{message}\n".encode())
