"""Reading ahead: what the next steps need comes while the devices work."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")

AHEAD = 4
"""So many are read at the same time: a bucket's answer takes longer than a step may."""


class Prefetch(Generic[T]):
    """`read(number)`, for numbers that mostly follow each other: those after the one that is asked
    for are being read by threads already. `with` stops the threads."""

    def __init__(self, read: Callable[[int], T], end: int):
        """`end`: from there on nothing is read ahead."""
        self._read, self._end = read, end
        self._pending: dict[int, Future[T]] = {}
        self._threads = ThreadPoolExecutor(AHEAD, "prefetch")

    def __call__(self, number: int) -> T:
        """Raises what `read` raises for this number."""
        wanted = [number, *range(number + 1, min(number + 1 + AHEAD, self._end))]
        reading = self._pending
        self._pending = {i: reading.get(i) or self._threads.submit(self._read, i) for i in wanted}
        return self._pending.pop(number).result()

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
