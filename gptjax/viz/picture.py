"""Loss curves, drawn from metrics.jsonl by matplotlib (the extra `viz`)."""

from collections.abc import Sequence
from pathlib import Path

from gptjax import metrics
from gptjax.errors import RunError, UserError


def draw(run_dirs: Sequence[Path], out: Path) -> None:
    """Training and validation loss of each run, in nats per token, over steps. The ending of `out`
    chooses the format.

    Raises:
        UserError: a run without losses, an unknown format, or matplotlib is not installed.
        RunError: the picture cannot be written.
    """
    try:  # optional
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from None
    # Not pyplot: it keeps a global state and may open a screen.
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, run_dir in enumerate(run_dirs):
        rows = metrics.read(run_dir / "metrics.jsonl")
        before = len(axes.lines)
        for field, kind, style, alpha in (
            ("train_loss", "training", "-", 0.5),
            ("val_loss", "validation", "o--", 1.0),
        ):
            points = [(row["step"], row[field]) for row in rows if row.get(field) is not None]
            if points:
                name = kind if len(run_dirs) == 1 else f"{run_dir.name}: {kind}"
                axes.plot(
                    *zip(*points, strict=True), style, color=f"C{number}", alpha=alpha, label=name,
                    ms=4, lw=1,
                )  # fmt: skip
        if len(axes.lines) == before:
            raise UserError(f"{run_dir}/metrics.jsonl has no losses yet")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    if out.is_dir():
        raise UserError(f"cannot draw {out}: it is a folder; name a file in it")
    try:
        figure.savefig(out, dpi=120)
    except ValueError as error:
        raise UserError(f"cannot draw {out}: {error}") from None
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror}") from None
