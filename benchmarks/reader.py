"""Measure how fast training's batches are read, beside nanoGPT's way (rows of a memory map):

    python benchmarks/reader.py FOLDER [flags]      FOLDER: a prepared set, also gs://BUCKET/...

Nothing is computed meanwhile. Rounds take turns, so that a machine that is slow for a while is slow
for both.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from gptjax import files
from gptjax.commands import flags, process
from gptjax.data import batches, token_files
from gptjax.data.prefetch import Prefetch
from gptjax.errors import UserError
from gptjax.settings import Config

PROG = "python benchmarks/reader.py"


@dataclasses.dataclass(frozen=True)
class ReaderFlags(Config):
    """Measure how fast training's batches are read, beside nanoGPT's way."""

    rows: int = 128
    """Sequences of this host in a step."""
    block_size: int = 1024
    """Tokens in one."""
    steps: int = 50
    """In a round."""
    rounds: int = 7
    """Of both, in turn."""

    def problems(self) -> list[str]:
        return self._check_ints(1, "rows", "block_size", "steps", "rounds")


def ours(tokens: token_files.Split, given: ReaderFlags, first: int) -> None:
    """Steps from `first` on, as the trainer reads them."""

    def read(step: int) -> np.ndarray:
        return batches.batch_at(
            tokens, 0, step, batch_size=given.rows, block_size=given.block_size
        )  # fmt: skip

    with Prefetch(read, first + given.steps) as prefetch:
        for step in range(first, first + given.steps):
            prefetch(step)


def nanogpt(file: Path, dtype: np.dtype, given: ReaderFlags, first: int) -> None:
    """As many, as nanoGPT's get_batch does: inputs and targets, int64, from a memory map that is
    opened for each batch."""
    random = np.random.default_rng(first)
    for _ in range(given.steps):
        data = np.memmap(file, dtype=dtype, mode="r")
        starts = random.integers(len(data) - given.block_size, size=given.rows)
        for offset in (0, 1):
            np.stack([data[i + offset : i + offset + given.block_size].astype(np.int64)
                      for i in starts])  # fmt: skip


def main(argv: list[str], prog: str) -> None:
    """Raises UserError."""
    named, given = flags.parse(ReaderFlags(), argv, prog, "FOLDER")
    folder = files.path(named[0])
    tokens = token_files.load(folder).train
    if len(tokens) <= given.block_size:
        raise UserError(f"{folder} has {len(tokens):,} tokens; expected more than --block-size")
    sides: dict[str, Callable[[int], None]] = {"gptjax": lambda first: ours(tokens, given, first)}
    if not files.is_remote(file := folder / "train.bin") and file.is_file():
        sides["nanoGPT's way"] = lambda first: nanogpt(file, tokens.dtype, given, first)
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(given.rounds):
        for side, run in sides.items():
            began = time.perf_counter()
            run(number * given.steps)
            seconds = time.perf_counter() - began
            speeds[side].append(given.steps * given.rows * given.block_size / seconds)
    for side, found in speeds.items():
        print(f"{side:14} {statistics.median(found) / 1e6:8.2f} million tokens/s")
    if len(sides) > 1:
        pairs = zip(*speeds.values(), strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"gptjax is {ratio:.2f} times as fast (median of {given.rounds} rounds in turn)")


if __name__ == "__main__":
    sys.exit(process.run(main, PROG))
