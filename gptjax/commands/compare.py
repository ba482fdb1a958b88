"""gptjax compare RUN: does a run's model compute what PyTorch's computes?"""

import dataclasses
import math
from typing import Literal

from gptjax import config_io, files
from gptjax.commands import flags, terminal
from gptjax.config import OptimizerKind
from gptjax.runtime_config import DeviceKind
from gptjax.settings import Config


@dataclasses.dataclass(frozen=True)
class CompareFlags(Config):
    """Compare a run's model with PyTorch's (on the CPU), number by number, from the same weights
    and the same batches, and say where they begin to differ. Exit code 1 if any number is beyond
    its tolerance. Needs PyTorch, and transformers for --against hf.

    The relative error is the Euclidean norm of the difference over that of PyTorch's values, or the
    largest difference over the largest value, whichever is larger; after the optimizer's steps,
    over how far PyTorch's parameters moved.
    """

    against: Literal["hf", "nanogpt-style"] = "hf"
    """hf: transformers.GPT2LMHeadModel; nanogpt-style: a plain GPT of torch.nn modules, for what
    Hugging Face's cannot express."""
    steps: int = 100
    """Training steps to take side by side, from the run's weights."""
    batch_size: int = 2
    """Sequences per batch."""
    sequence_length: int | None = None
    """Tokens per sequence. None: the model's block_size."""
    text: str | None = None
    """Text for the batches: a file, a folder or a glob. None: the run's own training tokens if
    they are still there, else random ones."""
    learning_rate: float = 1e-4
    """Peak rate of the training steps, after 10 steps of warm-up; it decays to a tenth."""
    optimizer: OptimizerKind = "adamw"
    """What the training steps update with; muon is beside torch.optim.Muon (in float32)."""
    greedy_tokens: int = 200
    """Tokens to continue a prompt by, always taking the likeliest."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """float32: at the highest precision of matrix products; bfloat16: under PyTorch's autocast."""
    checkpoint: str = "best"
    """best (lowest validation loss), latest, or a step."""
    seed: int = 1337
    """Seeds the choice of batches."""
    verbose: bool = False
    """Every parameter of every layer, and the loss at every step."""
    device: DeviceKind = "auto"
    """Kind of device for our side."""

    def problems(self) -> list[str]:
        out = self._check_ints(1, "steps", "batch_size", "sequence_length", "greedy_tokens")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            out.append(f"learning_rate {self.learning_rate} must be a number of at least 0")
        return out + self._check_ints(0, "seed")


DEFAULTS = [CompareFlags()]


def main(argv: list[str], prog: str) -> None:
    """Raises UserError; RunError if a number is beyond its tolerance."""
    named, given = flags.parse(CompareFlags(), argv, prog, "RUN")
    run_dir = terminal.need_run(named[0])
    # JAX and PyTorch are imported when the command runs, not to print its help.
    from gptjax.devices import setup
    from gptjax.parity import compare

    setup.select_platform(given.device)
    setup.use_compilation_cache(files.cache_dir() / "xla")
    options = config_io.to_dict(given)
    for name in ("verbose", "device"):
        del options[name]
    comparison = compare.open_comparison(run_dir, **options)
    print(comparison.title, flush=True)
    rows = comparison.run(terminal.status)
    terminal.status("")
    print("\n".join(compare.table(rows, every=given.verbose)))
    print(compare.verdict(rows))
