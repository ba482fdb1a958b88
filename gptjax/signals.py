"""Ctrl-C and its like as a request to stop, which training answers between two steps."""

import contextlib
import os
import select
import signal
import sys
from typing import Any

from gptjax.program import STOP_SIGNALS
from gptjax.trainer import Callback, Trainer


class StopSignal(Callback):
    """From the start of training until `close`, STOP_SIGNALS only set `number`: to the last of
    them, 0 before. A second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def on_start(self, trainer: Trainer) -> None:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                self._before[number] = signal.signal(number, self._received)

    def close(self) -> None:
        """Let signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, number: int, _: Any) -> None:
        self.number = number
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not through Python's streams, which may be in the middle of a line. The last characters
        # show the cursor again, in case a second signal leaves no time for that.
        text = f"\n{signal.Signals(number).name}: finishing the current step, then saving"
        text += "; press Ctrl-C to quit at once\n" + ("\033[?25h" if sys.stderr.isatty() else "")
        with contextlib.suppress(OSError):
            if select.select([], [2], [], 0)[1]:  # a full pipe must not delay the stop
                os.write(2, text.encode())
