"""gptjax report RUN ...: draw loss curves."""

import dataclasses

from gptjax import files
from gptjax.commands import flags
from gptjax.settings import Config


@dataclasses.dataclass(frozen=True)
class ReportFlags(Config):
    """Draw the training and validation loss of one or more runs over their steps."""

    out: str | None = None
    """The picture to write; its ending chooses the format (without one: .png). None: loss.png in
    the (first) run."""

    def problems(self) -> list[str]:
        return ["--out is empty"] * (self.out == "")


DEFAULTS = [ReportFlags()]


def main(argv: list[str], prog: str) -> None:
    """Raises UserError, RunError."""
    named, given = flags.parse(ReportFlags(), argv, prog, "RUN ...")
    run_dirs = [files.path(name) for name in named]
    out = files.path(given.out) if given.out else run_dirs[0] / "loss.png"
    out = out if out.suffix else out.with_name(f"{out.name}.png")
    from gptjax.viz import report  # JAX is not needed to print the help

    report.draw(run_dirs, out)
    print(f"drew {out}")
