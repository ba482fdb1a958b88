"""What runs left behind, gathered for a page: losses, speeds, samples, settings, machines."""

import itertools
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
"""Of a run's rows that a page holds; every evaluation is among them."""
SERIES = ("step", "seconds", "train_loss", "val_loss", "learning_rate", "grad_norm",
          "tokens_per_second")  # fmt: skip


def gather(run_dirs: Sequence[Path]) -> dict[str, Any]:
    """All that a page shows of these runs, as JSON values; settings as [name, default, each run's].

    Raises:
        UserError: a run without losses, or a damaged file.
    """
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
    kinds = {run["tokenizer"] for run in runs}
    return {"runs": runs, "settings": rows, "same_tokens": len(kinds) == 1}


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """As short as they tell the runs apart."""
    names = [run_dir.name for run_dir in run_dirs]
    if len({*names}) == len(names):
        return names
    return [str(run_dir) for run_dir in run_dirs]


def _gather_one(run_dir: Path) -> dict[str, Any]:
    rows = run_logs.read_metrics(run_dir / "metrics.jsonl")
    if not any(row.get("val_loss") or row.get("train_loss") for row in rows):
        raise UserError(f"{run_dir}/metrics.jsonl has no losses yet")
    history = run_logs.read_history(run_dir / "history.jsonl")
    starts = [event for event in history if event["event"] == "start"]
    # Of a step that was taken twice the last sample counts.
    samples = {event["step"]: event["text"] for event in history if event["event"] == "sample"}
    settings, tokens_per_step, parameters, tokenizer = _settings(run_dir)
    newest = starts[-1] if starts else {}
    evaluated = [row for row in rows if row.get("val_loss") is not None]
    best = min(evaluated, key=lambda row: row["val_loss"], default=None)
    return {
        "folder": str(run_dir),
        "rows": {name: [row.get(name) for row in _thinned(rows)] for name in SERIES},
        "best": best and {"step": best["step"], "val_loss": best["val_loss"]},
        "last": rows[-1]["step"],
        "tokens_per_step": tokens_per_step,
        "parameters": parameters,
        "tokenizer": newest.get("tokenizer", tokenizer),
        "bytes_per_token": newest.get("bytes_per_token"),
        "starts": [
            {
                "step": event["step"],
                "time": event["time"],
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
        config.data.tokenizer,
    )


def _thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    stride = math.ceil(len(rows) / MOST_POINTS)
    chosen = (i % stride == 0 or row.get("val_loss") is not None for i, row in enumerate(rows))
    return [*itertools.compress(rows, chosen)]


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
