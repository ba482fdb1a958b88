"""What runs left behind, gathered for a page: losses, speeds, samples, settings, machines."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax import config_io, files, run_logs
from gptjax.config import TrainConfig
from gptjax.errors import UserError
from gptjax.runtime_config import RuntimeConfig
from gptjax.viz import page

MOST_POINTS = 4000
"""Of a run's training losses, and of its evaluations, that a page holds; the best is among them."""
LOSSES = "train_loss", "val_loss"
SERIES = ("step", "seconds", "train_loss", "val_loss", "learning_rate", "grad_norm",
          "tokens_per_second")  # fmt: skip


def gather(run_dirs: Sequence[Path]) -> dict[str, Any]:
    """All that a page shows of these runs, as JSON values; settings as [name, default, each run's].

    Raises:
        UserError: a run without losses, or a damaged file.
    """
    run_dirs = [*dict.fromkeys(run_dirs)]
    runs = [_gather_one(run_dir) for run_dir in run_dirs]
    for run, name in zip(runs, _names(run_dirs), strict=True):
        run["name"] = name
    usual = {
        key: str(value)
        for part in (TrainConfig(), RuntimeConfig())
        for key, value in config_io.flatten(part).items()
    }
    names = [key for key in usual if any(key in run["settings"] for run in runs)]
    rows = [[key, usual[key], *(run["settings"].get(key, "") for run in runs)] for key in names]
    return {
        "runs": runs,
        "settings": rows,
        "same_tokens": _same(runs, "tokenizer"),
        "same_text": _same(runs, "text"),
    }


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """As short as they tell the runs apart."""
    names = [run_dir.absolute().name for run_dir in run_dirs]
    if len({*names}) == len(names):
        return names
    return [str(run_dir) for run_dir in run_dirs]


def _gather_one(run_dir: Path) -> dict[str, Any]:
    rows = run_logs.read_metrics(run_dir / "metrics.jsonl")
    if not any(run_logs.finite(row.get(name)) is not None for row in rows for name in LOSSES):
        raise UserError(f"{run_dir}/metrics.jsonl has no losses yet")
    history = run_logs.read_history(run_dir / "history.jsonl")
    starts = [event for event in history if event["event"] == "start"]
    # Of a step that was taken twice the last sample counts.
    samples = {event["step"]: event["text"] for event in history if event["event"] == "sample"}
    settings, tokens_per_step, parameters, tokenizer = _settings(run_dir)
    newest = starts[-1] if starts else {}
    evaluated = [row for row in rows if run_logs.finite(row.get("val_loss")) is not None]
    best = min(evaluated, key=lambda row: row["val_loss"], default=None)
    thinned = _thinned(rows, best)
    return {
        "folder": str(run_dir),
        "rows": {name: [run_logs.finite(row.get(name)) for row in thinned] for name in SERIES},
        "best": best and {"step": best["step"], "val_loss": best["val_loss"]},
        "last": rows[-1]["step"],
        "tokens_per_step": tokens_per_step,
        "parameters": parameters,
        "tokenizer": newest.get("tokenizer", tokenizer),
        "text": newest.get("data"),
        "bytes_per_token": run_logs.finite(newest.get("bytes_per_token")),
        "starts": [
            {
                "step": event["step"],
                "time": run_logs.finite(event["time"]),
                "end": (ended := _end(history, event)).get("step"),
                "early": ended.get("stopped_early", False),
                "machine": f"{event.get('devices', '')}, {event.get('machine', '')}",
                "versions": f"gptjax {event.get('gptjax')}, JAX {event.get('jax')}",
            }
            for event in starts
        ],
        "samples": sorted(samples.items()),
        "settings": settings,
    }


def _settings(run_dir: Path) -> tuple[dict[str, str], int | None, int | None, str]:
    """({setting: value}, tokens a step, parameters, kind of tokenizer), if they are known."""
    path = run_dir / "config.json"
    if not path.exists():
        return {}, None, None, ""
    config, runtime = config_io.run_settings(files.read_json(path), str(path))
    found = config_io.flatten(config) | config_io.flatten(runtime)
    del found["run_dir"]
    model, counted = config.model, config.model.vocab_size is not None
    return (
        {name: str(value) for name, value in found.items()},
        config.batch_size * model.block_size,
        model.num_parameters() if counted else None,
        f"{config.data.tokenizer}, {model.vocab_size or 0:,} ids" if counted else "",
    )


def _thinned(rows: list[dict[str, Any]], best: Any) -> list[dict[str, Any]]:
    chosen = {0, len(rows) - 1, *(i for i, row in enumerate(rows) if row is best)}
    for name in LOSSES:
        found = [i for i, row in enumerate(rows) if row.get(name) is not None]
        chosen.update(found[:: math.ceil(len(found) / MOST_POINTS) or 1])
    return [rows[i] for i in sorted(chosen)]


def _same(runs: Sequence[dict[str, Any]], name: str) -> bool:
    """Whether nothing is known that tells them apart. (A part in parentheses is not always.)"""
    known = [run[name] for run in runs if run[name]]
    whole = {each for each in known if "(" in each}
    return len({each.partition(" (")[0] for each in known}) < 2 and len(whole) < 2


def _end(history: list[dict[str, Any]], start: dict[str, Any]) -> dict[str, Any]:
    """The event with which a process ended; {}: it was killed, or is at work."""
    after = history[history.index(start) + 1 :]
    ended = next((event for event in after if event["event"] in ("start", "end")), None)
    return ended if ended and ended["event"] == "end" else {}


def to_html(gathered: dict[str, Any], *, live: bool = False) -> str:
    """The page. UserError: a library is missing."""
    try:  # optional
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("reports need plotly: pip install 'gptjax[viz]'") from None
    names = ", ".join(run["name"] for run in gathered["runs"])
    return page.render(
        "report.html", title=names, gathered=gathered, live=live, plotly=get_plotlyjs()
    )
