"""What pictures by matplotlib (the extra `viz`) share."""

from pathlib import Path
from typing import Any

from gptjax.errors import RunError, UserError


def new() -> tuple[Any, Any]:
    """(a figure, its axes). UserError: matplotlib is not installed."""
    try:  # optional
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'gptjax[viz]'") from None
    # Not pyplot: it keeps a global state and may open a screen.
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def save(figure: Any, out: Path) -> None:
    """In the format that the ending of `out` names. UserError: there is none of that name.
    RunError: it cannot be written."""
    try:
        figure.savefig(out, dpi=120)
    except ValueError as error:
        raise UserError(f"cannot draw {out}: {error}") from None
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror}") from None
