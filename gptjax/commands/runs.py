"""gptjax runs [FOLDER]: list the runs there, from their small files, without starting JAX."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from gptjax import config_io, files
from gptjax.commands import flags, terminal
from gptjax.config import Config
from gptjax.errors import UserError

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
    """What stands under TITLES. "-": not known; "damaged": the file that says it is."""
    from gptjax import metrics  # imports JAX, which printing the help does not need
    from gptjax.checkpoint import finished_steps

    step = loss = parameters = "-"
    checkpoints = run_dir / "checkpoints"
    if checkpoints.is_dir():
        step = str(max(finished_steps(run_dir), default="-"))
    try:
        if (run_dir / "metrics.jsonl").exists():
            rows = metrics.read(run_dir / "metrics.jsonl")
            losses = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
            loss = f"{min(losses):.4f}" if losses else "-"
    except UserError:
        loss = "damaged"
    try:
        if (run_dir / "config.json").exists():
            path = run_dir / "config.json"
            config, _ = config_io.run_settings(files.read_json(path), str(path))
            parameters = f"{config.model.num_parameters():,}" if config.model.vocab_size else "-"
    except UserError:
        parameters = "damaged"
    found = [_size_and_time(path) for path in run_dir.rglob("*") if path.is_file()]
    newest = time.localtime(max((seconds for _, seconds in found), default=0))
    size = _in_units(sum(size for size, _ in found))
    return run_dir.name, step, loss, parameters, size, time.strftime("%Y-%m-%d %H:%M", newest)


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
