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

from gptjax.errors import RunError, UserError

FIELDS = (
    "step", "train_loss", "val_loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds",
)  # fmt: skip


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
        except ValueError:
            if number == len(lines):
                break  # cut short
            row = None
        if not _is_row(row):
            raise UserError(f"{path}, line {number} is damaged; remove it")
        rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    """A whole step, and numbers or null elsewhere."""
    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and all(type(row.get(f)) in (int, float, type(None)) for f in FIELDS)
    )


class _Console(Console):
    """Rich ends the process when a reader goes away; a training run must not end for that."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Log:
    """metrics.jsonl of one run, one JSON object a line with FIELDS."""

    def __init__(self, path: Path, resume_step: int, *, writes: bool = True):
        """Rows after `resume_step` (all of them where it is 0) belong to steps that will be taken
        again: they are dropped. Only one host `writes`."""
        self._path = path
        self._writes = writes
        rows = read(path) if resume_step and path.exists() else []
        kept = [row for row in rows if row["step"] <= resume_step]
        self.seconds = float(kept[-1].get("seconds") or 0) if kept else 0.0
        """Training time, in seconds, up to the last row kept."""
        scratch = path.with_suffix(".tmp")
        self._write(scratch, "w", kept)
        if writes:
            os.replace(scratch, path)

    def append(self, row: dict[str, Any]) -> None:
        self._write(self._path, "a", [row])

    def _write(self, path: Path, mode: str, rows: list[dict[str, Any]]) -> None:
        if not self._writes:
            return
        try:
            with path.open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps({f: row.get(f) for f in FIELDS}) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}") from None


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
