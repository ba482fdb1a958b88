"""Ctrl-C and its like as a request to stop, which training answers between two steps."""

import signal
import time
from typing import Any

from gptjax import interrupts
from gptjax.devices import setup
from gptjax.interrupts import STOP_SIGNALS
from gptjax.trainer import Callback, Trainer

TO_END = 4.0
"""Seconds from a request to stop, before a step was taken, to the end of training."""


class StopSignal(Callback):
    """From the start of training until `close`, STOP_SIGNALS only set `number`: to the last of
    them, 0 before. Ctrl-C after another one ends the process at once; so does any of them before
    this process has taken a step, when there is nothing to save."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}
        self._asked = False
        self._listens = False

    def on_start(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._listener, self._listens = interrupts.listen(self._heard), True
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                self._before[number] = signal.signal(number, self._received)

    def close(self) -> None:
        """Let signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._listens:
            interrupts.listen(self._listener)
        self._before, self._listens = {}, False

    def _received(self, number: int, _: Any) -> None:
        self.number = number

    def _heard(self, number: int) -> None:
        if self._asked and number == signal.SIGINT:
            interrupts.end(number, "stopped at once")
        self._asked = True
        if setup.host_count() == 1 and self._trainer.first_step_seconds is None:
            time.sleep(interrupts.GRACE)
            if self.number:  # Python has heard, and will end by itself unless it compiles next
                time.sleep(TO_END)
            if self._trainer.first_step_seconds is None:  # it is compiling, say
                interrupts.end(number, "stopped before a step was taken")
        interrupts.say(
            f"\n{signal.Signals(number).name}: finishing the current step, then saving; press"
            " Ctrl-C to quit at once"
        )
