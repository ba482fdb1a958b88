"""Ctrl-C and its like as a request to stop, which training answers between two steps."""

import signal
import time
from typing import Any

from gptjax import interrupts
from gptjax.devices import setup
from gptjax.program import STOP_SIGNALS
from gptjax.trainer import Callback, Trainer


class StopSignal(Callback):
    """From the start of training until `close`, STOP_SIGNALS only set `number`: to the last of
    them, 0 before. A second Ctrl-C ends the process at once, and so does the first one while the
    first step is still being compiled: there is nothing to save."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}
        self._asked = False

    def on_start(self, trainer: Trainer) -> None:
        self._trainer = trainer
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                self._before[number] = signal.signal(number, self._received)
        self._listener = interrupts.listen(self._heard)

    def close(self) -> None:
        """Let signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            interrupts.listen(self._listener)
        self._before = {}

    def _received(self, number: int, _: Any) -> None:
        self.number = number

    def _heard(self, number: int) -> None:
        if self._asked and number == signal.SIGINT:
            interrupts.end(number, "stopped at once")
        self._asked = True
        if self._trainer.first_step_seconds is None and setup.host_count() == 1:
            time.sleep(interrupts.GRACE)
            if not self.number:
                interrupts.end(number, "stopped before the first step")
        interrupts.say(
            f"\n{signal.Signals(number).name}: finishing the current step, then saving; press"
            " Ctrl-C to quit at once"
        )
