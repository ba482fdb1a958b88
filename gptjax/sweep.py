"""Several runs that differ in one setting: which values it takes, and what came of each run."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax import config_io, files
from gptjax.config import TrainConfig
from gptjax.errors import UserError

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
VALUES = re.compile(rf"({NUMBER})\.\.({NUMBER})|({NUMBER}(?:,{NUMBER})+)")
"""1e-4..1e-2, or 1e-3,3e-3."""

RECORD = "sweep.json"
"""In a run's folder, once it is over: the settings and what came of them."""


def values(text: str, points: int, whole: bool) -> list[str]:
    """Those that a flag's text, which `VALUES` matches, names: a list, or a range, of which it
    takes `points` at equal ratios: the ends, and between them numbers rounded to three digits, or
    to `whole` ones. Raises UserError: a bad range."""
    found = VALUES.fullmatch(text)
    assert found, text
    if found[3]:
        return [*dict.fromkeys(found[3].split(","))]
    first, last = float(found[1]), float(found[2])
    if not (0 < first < math.inf and 0 < last < math.inf and first != last) or points < 2:
        raise UserError(
            f"{text}: a range takes two different numbers above 0, and --points of at least 2;"
            " or list the values: 0,0.1,0.2"
        )
    between = (first * (last / first) ** (n / (points - 1)) for n in range(1, points - 1))
    inner = (f"{round(x)}" if whole else f"{float(f'{x:.3g}'):g}" for x in between)
    # The ends as they were written; of equal numbers one, in order.
    numbers = {first: found[1], **{float(x): x for x in inner}, last: found[2]}
    numbers[first] = found[1]
    return [*numbers.values()]


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of one value."""

    value: str
    run_dir: Path
    final: float | None
    """Validation loss at the end, in nats per token; None: it diverged."""
    best: float | None
    """The lowest validation loss after step 0, if one was measured."""
    diverged: str | None = None
    """How, in words."""


def record(
    value: str, run_dir: Path, config: TrainConfig, losses: Sequence[float], diverged: str | None
) -> Result:
    """The result of a run that is over, from its validation losses; it is kept in the run's folder.
    Raises OSError."""
    final = losses[-1] if losses and not diverged else None
    found: dict[str, Any] = {
        "final": final, "best": min(losses, default=None), "diverged": diverged,
    }  # fmt: skip
    content = json.dumps({"settings": config_io.to_dict(config), "result": found}, indent=2)
    files.write_atomic(run_dir / RECORD, content + "\n")
    return Result(value, run_dir, **found)


def recorded(value: str, run_dir: Path, config: TrainConfig) -> Result | None:
    """That of an earlier sweep with the same settings; None: the run is still to be made, or to be
    finished."""
    path = run_dir / RECORD
    found: Any = files.read_json(path) if path.exists() else {}
    same = json.loads(json.dumps(config_io.to_dict(config)))
    if not isinstance(found, dict) or found.get("settings") != same:
        return None
    return Result(value, run_dir, **found["result"])


def best(results: Sequence[Result]) -> Result | None:
    """The one with the lowest final validation loss; None: all have diverged."""
    finished = [result for result in results if result.final is not None]
    return min(finished, key=lambda result: result.final or 0.0, default=None)


def table(name: str, results: Sequence[Result]) -> list[str]:
    """A line for each, in the order of their values; the best one is marked."""
    width, winner = max(len(name), *(len(result.value) for result in results)), best(results)
    lines = [f"{name:>{width}}  final loss  best loss"]
    for each in results:
        losses = [f"{loss:.4f}" if loss is not None else "-" for loss in (each.final, each.best)]
        mark = "  diverged" if each.diverged else "  best" if each is winner else ""
        lines.append(f"{each.value:>{width}}  {losses[0]:>10}  {losses[1]:>9}{mark}")
    return lines


def at_an_end(results: Sequence[Result]) -> str | None:
    """A warning where values beyond those that were tried may be better still."""
    winner, tried = best(results), sorted(results, key=lambda result: float(result.value))
    if winner is None or len(tried) < 2 or winner not in (tried[0], tried[-1]):
        return None
    end, more = ("smallest", "smaller") if winner is tried[0] else ("largest", "larger")
    return f"the best value, {winner.value}, is the {end} that was tried: {more} ones may be better"
