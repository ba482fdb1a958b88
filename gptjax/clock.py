"""How long training takes, with evaluation and saving left out."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Training time: speed between two reports, with evaluation and saving left out."""

    def __init__(self, step: int):
        """`step`: the last step that is not timed."""
        self._total = self._interval = 0.0
        self._step = step
        self._since = time.perf_counter()

    def _tick(self) -> None:
        now = time.perf_counter()
        self._interval += now - self._since
        self._total += now - self._since
        self._since = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here does not count."""
        self._tick()
        yield
        self._since = time.perf_counter()

    def steps_per_second(self, step: int) -> float | None:
        """Since the last call; None where no step was timed since."""
        self._tick()
        steps, seconds = step - self._step, self._interval
        self._step, self._interval = step, 0.0
        return steps / seconds if steps > 0 and seconds > 0 else None

    def seconds(self) -> float:
        """All training time so far."""
        return self._total
