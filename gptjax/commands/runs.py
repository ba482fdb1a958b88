"""gptjax runs [FOLDER]: list the runs there, from their small files, without starting JAX."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from gptjax import files
from gptjax.commands import flags, terminal
from gptjax.errors import UserError
from gptjax.settings import Config

TITLES = ("run", "step", "best loss", "parameters", "size", "changed")


@dataclasses.dataclass(frozen=True)
class RunsFlags(Config):
    """List the runs in a folder (without one, in runs/): their last step, best validation loss in
    nats per token, parameters, size on disk, and when they were last written to."""


DEFAULTS = [RunsFlags()]


def main(argv: list[str], prog: str) -> None:
    """Raises UserError."""

    named, _ = flags.parse(RunsFlags(), argv, prog, "[FOLDER]")
    folder = files.path(named[0] if named else "runs")
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; name one: {prog} FOLDER")
    rows = [describe(path) for path in sorted(folder.iterdir()) if terminal.is_run(path)]
    if not rows and terminal.is_run(folder):
        rows = [describe(folder)]
    if not rows:
        raise UserError(f"no runs in {folder}")
    widths = [max(map(len, column)) for column in zip(TITLES, *rows, strict=True)]
    for name, *cells in [TITLES, *rows]:
        right = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([f"{name:{widths[0]}}", *right]))


def describe(run_dir: Path) -> tuple[str, ...]:
    """What stands under TITLES. "-": not known; "damaged": no checkpoint can be read."""
    from gptjax import run_metadata  # imports JAX, which printing the help does not need
    from gptjax.checkpoint import finished_steps

    step = loss = parameters = changed = "-"
    if steps := finished_steps(run_dir):
        step = str(steps[-1])
        try:
            metadata = run_metadata.newest_metadata(run_dir)
            assert metadata is not None
            parameters = f"{metadata.config.model.num_parameters():,}"
            if metadata.best_val_loss is not None:
                loss = f"{metadata.best_val_loss:.4f}"
        except UserError:
            loss = parameters = "damaged"
    found = [_size_and_time(path) for path in run_dir.rglob("*") if path.is_file()]
    if found:
        newest = time.localtime(max(seconds for _, seconds in found))
        changed = time.strftime("%Y-%m-%d %H:%M", newest)
    size = _in_units(sum(size for size, _ in found))
    return run_dir.name, step, loss, parameters, size, changed


def _size_and_time(path: Path) -> tuple[int, float]:
    """(bytes, seconds since the epoch) of a file; in a bucket the fields have other names."""
    stat: Any = path.stat()
    return (stat.length, stat.mtime) if files.is_remote(path) else (stat.st_size, stat.st_mtime)


def _in_units(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
