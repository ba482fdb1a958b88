"""What the commands share: what counts as a run, a status line."""

import sys
from pathlib import Path

from gptjax import files
from gptjax.errors import UserError


def is_run(path: Path) -> bool:
    """Whether training, or an import, has written to this folder. (A config.json alone may be
    another program's.)"""
    stopped_early = all((path / name).exists() for name in ("config.json", "metrics.jsonl"))
    return (path / "checkpoints").exists() or stopped_early


def need_run(name: str) -> Path:
    """The folder of a run, before anything slow is imported. Raises UserError: it is none."""
    path = files.path(name)
    if not is_run(path):
        raise UserError(f"no run in {path}: expected a folder that training has written")
    return path


def status(text: str) -> None:
    """Say on a terminal's last line what is being done, and clear it with ""; nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}\r", end="", file=sys.stderr, flush=True)
