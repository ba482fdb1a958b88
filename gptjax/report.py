"""Draw a run's loss curve: python -m gptjax.report RUN_DIR [RUN_DIR ...] [--out loss.png]"""

import dataclasses
import sys
from pathlib import Path

import matplotlib

from gptjax import cli, metrics
from gptjax.errors import RunError, UserError
from gptjax.places import place

matplotlib.use("Agg")  # draws into files, needs no screen
from matplotlib import pyplot


@dataclasses.dataclass(frozen=True)
class ReportFlags:
    """Draw training and validation loss over steps, from metrics.jsonl."""

    out: str | None = None
    """The picture to write; its ending chooses the format. None: RUN_DIR/loss.png."""

    def problems(self) -> list[str]:
        """None: any name may do."""
        return []


def draw(run_dirs: list[Path], out: Path) -> None:
    """One curve of training loss and one of validation loss per run.

    Raises:
        UserError: a run without metrics, or a picture format that is not known.
        RunError: the picture cannot be written.
    """
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for number, run_dir in enumerate(run_dirs):
        rows = metrics.read(run_dir / "metrics.jsonl")
        if not any(row.get(f) is not None for row in rows for f in ("train_loss", "val_loss")):
            raise UserError(f"{run_dir}/metrics.jsonl has no losses yet")
        for field, style in (("train_loss", "-"), ("val_loss", "o--")):
            points = [(row["step"], row[field]) for row in rows if row.get(field) is not None]
            if points:
                kind = "training" if field == "train_loss" else "validation"
                name = kind if len(run_dirs) == 1 else f"{run_dir.name}: {kind}"
                light = 0.5 if field == "train_loss" else 1.0
                steps, losses = zip(*points, strict=True)
                axes.plot(
                    steps, losses, style, color=f"C{number}", alpha=light, label=name, ms=4, lw=1
                )
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        if out.is_dir():
            raise UserError(f"cannot draw {out}: it is a folder; name a picture in it")
        figure.savefig(out, dpi=120)
    except ValueError as error:
        raise UserError(f"cannot draw {out}: {error}") from None
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror}") from None
    finally:
        pyplot.close(figure)


def main(argv: list[str]) -> None:
    """`python -m gptjax.report RUN_DIR [RUN_DIR ...] [--out loss.png]`."""
    named, flags = cli.parse(ReportFlags(), argv, "python -m gptjax.report", "RUN_DIR ...")
    runs = [place(run) for run in named]
    if not runs:
        raise UserError("which run? python -m gptjax.report RUN_DIR [RUN_DIR ...]")
    out = Path(flags.out) if flags.out else runs[0] / "loss.png"
    draw(runs, out)
    print(f"drew {out}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
