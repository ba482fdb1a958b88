"""The losses of a sweep over its values, drawn by matplotlib (the extra `viz`)."""

from collections.abc import Sequence
from pathlib import Path

from gptjax import sweep
from gptjax.sweep import Result
from gptjax.viz import figure


def draw(name: str, results: Sequence[Result], out: Path) -> None:
    """Final and best validation loss over the values of the setting `name`. The best value is
    marked, and those that diverged. The ending of `out` chooses the format.

    Raises:
        UserError: matplotlib is not installed.
        RunError: the picture cannot be written.
    """
    drawing, axes = figure.new()
    ordered = sorted(results, key=lambda result: float(result.value))
    for field, style, alpha in (("final", "o-", 1.0), ("best", "o--", 0.5)):
        points = [(float(r.value), y) for r in ordered if (y := getattr(r, field)) is not None]
        if points:
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, style, color="C0", alpha=alpha, label=field, ms=4, lw=1)
    winner = sweep.best(results)
    if winner is not None:
        mark = float(winner.value), winner.final or 0.0
        axes.plot(*mark, "*", color="C1", ms=14, label=f"best: {winner.value}")
    for number, each in enumerate(r for r in ordered if r.diverged):
        label = "diverged" if number == 0 else None
        axes.axvline(float(each.value), color="C3", ls=":", lw=1, label=label)
    if all(float(result.value) > 0 for result in results):
        axes.set_xscale("log")
    axes.set(xlabel=name, ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.save(drawing, out)
