"""What the commands share: what counts as a run, texts that they read, a status line."""

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


def read(name: str, what: str) -> str:
    """A file, or standard input if it is called "-". Raises UserError, which says `what` it is."""
    return files.read_stdin(what) if name == "-" else files.read_text(files.path(name), what)


def read_lines(name: str, what: str, key: str) -> list[str]:
    """The lines of a file that are not empty; of a .jsonl file their values for `key`. Raises
    UserError: there is none, or no such value."""
    found = []
    for number, line in enumerate(read(name, what).split("\n"), 1):
        line = line.removesuffix("\r")
        if line and name.endswith(".jsonl"):
            where = f"{name}, line {number}"
            value = files.parse_json(line, where)
            if not isinstance(value, dict) or not isinstance(value.get(key), str):
                raise UserError(f'{where}: expected an object with a text "{key}"')
            line = value[key]
        elif not line:
            continue
        found.append(line)
    if not found:
        raise UserError(f"{what} has no {key}s; expected one in each line")
    return found


def status(text: str) -> None:
    """Say on a terminal's last line what is being done, and clear it with ""; nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}\r", end="", file=sys.stderr, flush=True)
