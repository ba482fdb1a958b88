"""How one process of several ends when another one has failed: at once, with one clear line.

JAX's runtime ends a process whose peers are lost from a C++ thread, with a stack dump on file
descriptor 2 and SIGABRT. And a process that fails by itself would wait at exit for its peers, which
wait for it.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading

MESSAGE = (
    "another host has stopped, failed or become unreachable; start the same command again on all"
    " hosts to resume from the newest checkpoint"
)

FATAL = b"the JAX distributed service detected fatal errors"
HEADER = re.compile(rb"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ ([\w.]+):\d+\] ")
LOST = re.compile(r"Gloo|NCCL|coordination|heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED|[Cc]onnection")


class PeerMonitor:
    """Reads what C++ code writes to file descriptor 2 and passes it on, but turns the runtime's
    fatal error into `message` and an exit. Python's own stderr does not come through here."""

    active: "PeerMonitor | None" = None

    def __init__(self, message: str):
        self.message = message
        self._once = threading.Lock()
        sys.stderr.flush()
        self._stderr = os.dup(2)
        sys.stderr = os.fdopen(
            self._stderr, "w", buffering=1, errors="backslashreplace", closefd=False
        )
        reading, writing = os.pipe()
        os.dup2(writing, 2)
        os.close(writing)
        # abort() waits in this handler (sleep(SIGABRT) is six seconds, in C) while the thread below
        # reads the error. After an abort for any other reason the process still ends as usual.
        libc = ctypes.CDLL(None)
        libc.signal(signal.SIGABRT, libc.sleep)
        threading.Thread(target=self._read, args=(reading,), daemon=True).start()
        PeerMonitor.active = self

    def _read(self, reading: int) -> None:
        hidden = False
        with open(reading, "rb") as lines:
            for text in lines:
                if header := HEADER.match(text):
                    hidden = header[1].startswith(b"coordination_service")
                if FATAL in text:
                    self.exit(1, self.message)
                if not hidden:
                    with contextlib.suppress(OSError):
                        os.write(self._stderr, text)

    def stop(self) -> None:
        """There are no other hosts after all."""
        os.dup2(self._stderr, 2)
        PeerMonitor.active = None

    def exit(self, code: int, message: str = "") -> None:
        """End the process now; of several callers the first one prints its message."""
        timer = threading.Timer(2, os._exit, [code])  # in case nobody reads our output
        timer.daemon = True
        timer.start()
        self._once.acquire()  # never released
        with contextlib.suppress(OSError):
            if os.isatty(1):
                os.write(1, b"\033[?25h\n")  # a progress bar hides the cursor
            if message:
                os.write(self._stderr, f"error: {message}\n".encode())
            sys.stdout.flush()
        os._exit(code)


def exit_if_distributed(code: int) -> None:
    """Call when a command has failed and said so: where there are other hosts, end the process
    without waiting for them."""
    if PeerMonitor.active:
        PeerMonitor.active.exit(code)


def is_peer_failure(error: Exception) -> bool:
    """Whether `error` says that another host has failed or cannot be reached."""
    lost = isinstance(error, TimeoutError) or LOST.search(str(error))
    return bool(PeerMonitor.active and lost)
