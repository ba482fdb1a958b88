"""What a run writes about itself as it goes, one JSON object a line: metrics.jsonl (`metrics`) and
history.jsonl (`history`). Reading them needs no JAX."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptjax import files
from gptjax.errors import UserError

FIELDS = (
    "step", "train_loss", "val_loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds",
    "time", "goodput",
)  # fmt: skip
"""Of a row of metrics.jsonl, as `trainer.Row`; `seconds` of all processes of the run; `time`: when,
in seconds since 1970; and `goodput`, the share of the time since the first row that was training
which still counts: not evaluating, saving, compiling, waiting for a machine, or steps that were
lost and taken again."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. A last line cut short by a crash is left out. Raises UserError
    if there is no such file, or a line before the last is damaged."""
    return _read(path, _is_row)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The events of a history.jsonl, as `history.History` writes them; none of a run that has no
    such file. Raises UserError if it is damaged."""
    return _read(path, _is_event) if path.exists() else []


def finite(value: Any) -> Any:
    """None for what JSON and a picture do not have: NaN and infinities, which a log may."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _read(path: Path, is_right: Callable[[Any], bool]) -> list[dict[str, Any]]:
    lines, rows = files.read_text(path).splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break  # cut short
            row = None
        if not is_right(row):
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


def _is_event(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("event"), str)
        and type(row.get("step")) is int
        and type(row.get("time")) in (int, float)
        and (row["event"] != "sample" or isinstance(row.get("text"), str))
    )
