"""What a run reports: metrics.jsonl, and progress on a terminal or as plain lines."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from gptjax import places
from gptjax.errors import RunError, UserError, first_line

FIELDS = (
    "step", "train_loss", "val_loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds",
)  # fmt: skip


BUCKET_INTERVAL = 15
"""Seconds between two writes of metrics.jsonl to a bucket."""


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. A last line cut short by a crash is left out.

    Raises:
        UserError: there is no such file, or a line before the last is damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"cannot read {path}: {reason}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break  # cut short
            row = None
        if not _is_row(row):
            raise UserError(f"{path}, line {number} is damaged; remove it")
        rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    """A whole step, and numbers (that a float holds) or null elsewhere."""
    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and all(type(row.get(f)) in (int, float, type(None)) for f in FIELDS)
        and all(-(2**63) < row[f] < 2**63 for f in FIELDS if type(row.get(f)) is int)
    )


class _Console(Console):
    """Rich ends the process when a reader goes away; a training run must not end for that."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Log:
    """metrics.jsonl of one run, one JSON object a line with FIELDS."""

    def __init__(self, path: Path, resume_step: int | None, *, writes: bool = True):
        """Rows after `resume_step` belong to steps that will be taken again: they are dropped; None
        drops all. Only one host `writes`."""
        self._path = path
        self._writes = writes
        rows = [] if resume_step is None or not path.exists() else read(path)
        self._rows = [row for row in rows if row["step"] <= (resume_step or 0)]
        self.seconds = float(self._rows[-1].get("seconds") or 0) if self._rows else 0.0
        """Training time, in seconds, up to the last row kept."""
        self._replace()

    def append(self, row: dict[str, Any]) -> None:
        """On a disk at once. A file in a bucket can only be replaced, and not often: there when
        BUCKET_INTERVAL has passed, and by `flush`."""
        if not places.is_remote(self._path):
            if self._writes:
                with self._failing(), self._path.open("a", encoding="utf-8") as file:
                    file.write(_line(row))
                    file.flush()
                    os.fsync(file.fileno())
            return
        self._rows.append(row)
        if time.monotonic() > self._replaced + BUCKET_INTERVAL:
            self._replace()

    def flush(self) -> None:
        """Leave nothing unwritten."""
        if places.is_remote(self._path):
            self._replace()

    def _replace(self) -> None:
        self._replaced = time.monotonic()
        if self._writes:
            with self._failing():
                places.replace_file(self._path, "".join(map(_line, self._rows)))

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise RunError(f"cannot write {self._path}: {reason}") from None


def _line(row: dict[str, Any]) -> str:
    return json.dumps({field: row.get(field) for field in FIELDS}) + "\n"


class StepClock:
    """Training time: speed between two reports, with evaluation and saving left out."""

    def __init__(self, seconds_before: float, step: int):
        """`seconds_before`: time the run has taken in earlier processes; `step`: the last step
        that is not timed."""
        self._total = seconds_before
        self._step = step
        self._since = time.perf_counter()
        self._interval = 0.0

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


class Display:
    """A live line with a bar on a terminal; plain lines elsewhere; nothing on other hosts than
    the first."""

    def __init__(self, *, total: int, done: int, visible: bool):
        self._console = _Console(quiet=not visible, highlight=False, soft_wrap=True)
        self._total = total
        self._live = self._console.is_terminal and visible
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(None), console=self._console,
            disable=not self._live, refresh_per_second=4,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays. Where nobody can read it any more, the work goes on."""
        with contextlib.suppress(OSError):
            self._console.print(text, markup=False)

    def progress(self, row: dict[str, Any], mfu: float | None, seconds_left: float | None) -> None:
        """One log interval's numbers; None: not known."""
        rate = row["tokens_per_second"]
        parts = [
            f"step {row['step']}/{self._total}",
            f"loss {row['train_loss']:.4f}",
            f"lr {row['learning_rate']:.2e}",
            f"grad norm {row['grad_norm']:.2f}",
            f"{'-' if rate is None else f'{rate:,.0f}'} tokens/s",
            f"MFU {'unknown' if mfu is None else f'{mfu:.1%}'}",
            f"{'-' if seconds_left is None else clock(seconds_left)} left",
        ]
        line = " | ".join(parts)
        self._bar.update(self._task, completed=row["step"], description=line)
        if not self._live:
            self.say(line)


def clock(seconds: float) -> str:
    """ "1h02m", "3m20s" or "12s"."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
