"""Loss curves as a picture, for papers and READMEs, by matplotlib (the extra `viz`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax import run_logs
from gptjax.errors import UserError
from gptjax.viz import figure


def draw(run_dirs: Sequence[Path], out: Path) -> None:
    """Training and validation loss of each run, in nats per token, over steps. The ending of `out`
    chooses the format.

    Raises:
        UserError: a run without losses, an unknown format, or matplotlib is not installed.
        RunError: the picture cannot be written.
    """
    logs = [run_logs.read_metrics(run_dir / "metrics.jsonl") for run_dir in run_dirs]
    if out.is_dir():
        raise UserError(f"cannot draw {out}: it is a folder; name a file in it")
    drawing, axes = figure.new()
    late = list[float]()
    for number, (run_dir, rows) in enumerate(zip(run_dirs, logs, strict=True)):
        prefix, color = ("", "C0") if len(run_dirs) == 1 else (f"{run_dir.name}: ", f"C{number}")
        train = _points(rows, "train_loss")
        val = _points(rows, "val_loss")
        if not train and not val:
            raise UserError(f"{run_dir}/metrics.jsonl has no losses yet")
        if train:
            label = f"{prefix}training, {train[-1][1]:.3f} at the end"
            axes.plot(*zip(*train, strict=True), color=color, alpha=0.5, lw=1, label=label)
        if val:
            color = color if prefix else "C1"
            step, loss = min(val, key=lambda point: point[1])
            label = f"{prefix}validation, best {loss:.3f} at step {step:,}"
            axes.plot(*zip(*val, strict=True), "o-", color=color, ms=4, lw=1.5, label=label)
            axes.plot(step, loss, "*", color=color, ms=12)
        # The first steps' losses would flatten all others.
        late += [loss for step, loss in train + val if step >= 0.03 * rows[-1]["step"]]
    margin = 0.05 * (max(late) - min(late)) or 0.1
    axes.set_ylim(min(late) - margin, max(late) + margin)
    title = ", ".join(run_dir.name for run_dir in run_dirs)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.save(drawing, out)


def _points(rows: Sequence[dict[str, Any]], field: str) -> list[tuple[int, float]]:
    found = ((row["step"], run_logs.finite(row.get(field))) for row in rows)
    return [(step, loss) for step, loss in found if loss is not None]
