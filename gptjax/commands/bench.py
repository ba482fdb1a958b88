"""gptjax bench: the benchmark beside PyTorch, which comes with a checkout only."""

import dataclasses
import importlib
import sys
from pathlib import Path

from gptjax.errors import UserError
from gptjax.settings import Config

CHECKOUT = Path(__file__).parent.parent.parent


@dataclasses.dataclass(frozen=True)
class BenchFlags(Config):
    """Measure speed and memory beside PyTorch's."""


DEFAULTS = [BenchFlags()]


def main(argv: list[str], prog: str) -> None:
    """Raises UserError, RunError."""
    if not (CHECKOUT / "benchmarks" / "bench.py").is_file():
        raise UserError("the benchmark is not installed; run this command in a checkout of gptjax")
    sys.path.insert(0, str(CHECKOUT))
    importlib.import_module("benchmarks.bench").main(argv, prog)
