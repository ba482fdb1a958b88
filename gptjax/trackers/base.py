"""What a tracker is, and the thread that it has to itself."""

import abc
import itertools
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.errors import first_line

QUEUE_SIZE = 1000
"""Entries that wait for a tracker at most; more are left out, and counted."""


class Entry(NamedTuple):
    """What there is to say of a step."""

    step: int
    numbers: Mapping[str, float] = {}
    texts: Mapping[str, str] = {}
    histograms: Mapping[str, np.ndarray] = {}
    """Values [N] whose distribution is to be shown."""


class Tracker(abc.ABC):
    """One library's record of a run. All is called by one thread, and may raise anything."""

    package: str
    """What to install."""
    next_step = 0
    """Of the record, once it is open: steps before it are there already."""
    where = ""
    """How to look at the record, in words."""

    @abc.abstractmethod
    def open(self, run_dir: Path, step: int, settings: Mapping[str, Any]) -> None:
        """Begin a run's record, or go on in it after `step` steps."""

    @abc.abstractmethod
    def log(self, entry: Entry) -> None:
        """Steps never decrease."""

    @abc.abstractmethod
    def close(self, failed: bool) -> None:
        """Nothing follows."""


class Worker:
    """Calls a tracker in a thread of its own, so that nobody waits for it."""

    def __init__(self, name: str, tracker: Tracker, earlier: Sequence[Entry], *opening: Any):
        """`earlier`: what there was to say before this process, in case the record does not have
        it. `opening`: what `Tracker.open` takes."""
        self.name, self._tracker, self._earlier, self._opening = name, tracker, earlier, opening
        self.notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        """What the user should know, once each."""
        self.is_over = False
        """Whether the library has nothing left to do that could keep the process from ending."""
        self._entries: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._dropped, self._failed = 0, False
        self._thread = threading.Thread(target=self._work, name=f"track-{name}", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Returns at once."""
        if self._entries.qsize() < QUEUE_SIZE:
            self._entries.put(entry)
        else:
            self._dropped += 1

    def end(self, failed: bool) -> None:
        """Nothing follows; returns at once."""
        self._failed = failed
        self._entries.put(None)

    def wait(self, deadline: float) -> None:
        """For what is left, after `end`, until `deadline` (of `time.monotonic`)."""
        self._thread.join(max(0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self.notes.put(f"warning: {self.name} does not answer; its record may be incomplete")
        elif self.is_over and self._dropped:
            self.notes.put(f"warning: {self.name} is too slow: {self._dropped} entries are missing")

    def _work(self) -> None:
        tracker, name = self._tracker, self.name
        try:
            tracker.open(*self._opening)
            if tracker.where:
                self.notes.put(f"{name:10} {tracker.where}")
            for entry in itertools.chain(self._earlier, iter(self._entries.get, None)):
                if entry.step >= tracker.next_step:
                    tracker.log(entry)
            tracker.close(self._failed)
            self.is_over = True
        except ModuleNotFoundError as error:
            self.is_over = True
            missing = f"{error.name} is not installed (pip install {tracker.package})"
            self.notes.put(f"warning: no tracking by {name}: {missing}")
        except (Exception, SystemExit) as error:  # of a library, a network, a disk
            self.notes.put(f"warning: tracking by {name} has ended: {first_line(error)}")
