"""How a process of several ends: at once and with one clear line, when another one has gone.

JAX's runtime ends a process whose fellows have gone from a C++ thread: with a stack dump on file
descriptor 2, and SIGABRT. And a process that fails by itself would wait at its exit for the others,
who wait for it.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading

GONE = (
    "another host has gone (stopped, failed, or out of reach); start the same command again on all"
    " hosts to go on from the newest checkpoint"
)

FATAL = b"the JAX distributed service detected fatal errors"
HEADER = re.compile(rb"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ ([\w.]+):\d+\] ")
LOST = re.compile(r"Gloo|NCCL|coordination|heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED|[Cc]onnection")


class Watch:
    """Reads what C++ writes to file descriptor 2, and passes it on; its death notice becomes
    `line`. Python's own stderr does not come through here."""

    active: "Watch | None" = None

    def __init__(self, line: str):
        self.line = line
        self._once = threading.Lock()
        sys.stderr.flush()
        self._stderr = os.dup(2)
        sys.stderr = os.fdopen(
            self._stderr, "w", buffering=1, errors="backslashreplace", closefd=False
        )
        reading, writing = os.pipe()
        os.dup2(writing, 2)
        os.close(writing)
        # abort() waits in this handler (sleep(SIGABRT) is six seconds, in C) while the notice is
        # read below. Any other abort goes on afterwards.
        libc = ctypes.CDLL(None)
        libc.signal(signal.SIGABRT, libc.sleep)
        threading.Thread(target=self._read, args=(reading,), daemon=True).start()
        Watch.active = self

    def _read(self, reading: int) -> None:
        hidden = False
        with open(reading, "rb") as lines:
            for text in lines:
                if header := HEADER.match(text):
                    hidden = header[1].startswith(b"coordination_service")
                if FATAL in text:
                    self.end(1, self.line)
                if not hidden:
                    with contextlib.suppress(OSError):
                        os.write(self._stderr, text)

    def stop(self) -> None:
        """There are no other hosts."""
        os.dup2(self._stderr, 2)
        Watch.active = None

    def end(self, code: int, line: str = "") -> None:
        """End the process now, with one line of whoever calls first."""
        timer = threading.Timer(2, os._exit, [code])  # in case nobody reads our output
        timer.daemon = True
        timer.start()
        self._once.acquire()  # never released
        with contextlib.suppress(OSError):
            if os.isatty(1):
                os.write(1, b"\033[?25h\n")  # a progress bar hides the cursor
            if line:
                os.write(self._stderr, f"error: {line}\n".encode())
            sys.stdout.flush()
        os._exit(code)


def failed(code: int) -> None:
    """To be called when a command fails, its message told: ends it where others would wait."""
    if Watch.active:
        Watch.active.end(code)


def is_loss(error: Exception) -> bool:
    """Whether work failed because another host has gone, or does not come."""
    lost = isinstance(error, TimeoutError) or LOST.search(str(error))
    return bool(Watch.active and lost)
