"""`bench race`: whole processes that train on Tiny Shakespeare, recipe beside recipe: seconds from
their start to their end, compilation included, and the loss that they reach.

All evaluate as nanoGPT does, 20 batches now and then, write a checkpoint, and draw no sample. The
exact loss is measured afterwards, outside the time. To add a recipe, add a line to RECIPES.
"""

import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import bench, sweep
from gptjax import config_io, machine
from gptjax.commands import flags, terminal
from gptjax.data.prepare import prepare
from gptjax.errors import RunError, UserError
from gptjax.settings import Config

NANOGPT = "shakespeare_char_cpu --tied-head True"
FAST = "shakespeare_char_cpu_fast"
LONGER = f"{FAST} --n-layer 3 --n-head 3 --n-embd 96 --batch-size 32 --max-steps 1300"
RECIPES = {
    "nanoGPT's, PyTorch": ("torch", NANOGPT),
    "nanoGPT's": ("gptjax", NANOGPT),
    "fast, PyTorch": ("torch", FAST),
    "fast": ("gptjax", FAST),
    "fast, longer, PyTorch": ("torch", LONGER),
    "fast, longer": ("gptjax", LONGER),
}
"""name -> (side, config and flags). The first is what the others are compared with."""


@dataclasses.dataclass(frozen=True)
class RaceFlags(Config):
    """Train on Tiny Shakespeare by several recipes, in turn, in gptjax and in PyTorch: seconds of
    the whole process, nothing compiled before, and the exact loss over the validation split."""

    only: str | None = None
    """Recipes whose names contain this, beside the first."""
    seeds: int = 3
    """Each recipe runs with the seeds 1, 2, ..."""
    json: str | None = None
    """Write all numbers to this file too."""

    def problems(self) -> list[str]:
        return self._check_ints(1, "seeds")


def main(argv: Sequence[str], prog: str) -> None:
    """Raises UserError: bad flags, no such recipe, or --json cannot be written. RunError: a process
    fails."""
    _, given = flags.parse(RaceFlags(), argv, prog)
    wanted = [name for name in RECIPES if (given.only or "") in name]
    if not wanted:
        raise UserError(f"no recipe contains {given.only!r}; there are {'; '.join(RECIPES)}")
    first, *_ = RECIPES
    chosen = {name: recipe for name, recipe in RECIPES.items() if name in (first, *wanted)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    kept = {"machine": machine.describe(), "commit": sweep.commit(), "recipes": found}

    def keep() -> None:
        if given.json:
            Path(given.json).write_text(json.dumps(kept, indent=1) + "\n")

    keep()  # a path that cannot be written is refused now
    with tempfile.TemporaryDirectory(prefix="gptjax-race-") as folder:
        config, _ = config_io.load_config(FAST)
        data = Path(folder) / "data"
        prepare(config.data, data, Console(quiet=True))
        for side in sorted({side for side, _ in chosen.values()}):  # so that files are in memory
            terminal.status(f"starting {side} ...")
            words = f"{FAST} --max-steps 1 --eval-interval 1"
            train(side, words, Path(folder) / f"first {side}", data)
        for seed in range(1, given.seeds + 1):
            for name, (side, words) in chosen.items():
                terminal.status(f"seed {seed}: {name} ...")
                run_dir = Path(folder) / f"{seed} {name}"
                found[name].append(train(side, f"{words} --seed {seed}", run_dir, data))
                terminal.status("")
                print(f"seed {seed}: {name}: {line(found[name][-1])}", flush=True)
                keep()
    print("\n".join(["", machine.describe(), *table(found)]))


def train(side: str, words: str, run_dir: Path, data: Path) -> dict[str, float]:
    """{seconds, exact loss} of a whole process by the config and flags of `words`."""
    _, (job, *_) = bench.settings(
        ["train", "--device", "cpu", "--config", *words.split()], bench.PROG
    )
    config = job.config.replace({"data.dir": str(data)})
    runtime = job.runtime.replace(eval_full_split=False, eval_batches=20, sample_tokens=0)
    run_dir.mkdir()
    config_io.save_run_settings(run_dir / "config.json", config, runtime)
    command = ["train_jax.py", "--run-dir", str(run_dir)]
    measure = ["-m", "gptjax", "evaluate", str(run_dir), "--split", "val", "--checkpoint", "latest"]
    if side == "torch":
        command = ["-m", "benchmarks.pytorch", str(run_dir)]
        measure = [*command, "exact"]
    environment = {"GPTJAX_CACHE_DIR": str(run_dir / "cache")}
    process = bench.time_process(side, [sys.executable, *command], environment)
    measured = subprocess.run(
        [sys.executable, *measure], cwd=bench.ROOT, env=os.environ | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    loss = re.search(r"(\d+\.\d+) nats", measured.stdout)
    if not loss:
        raise RunError(f"the {side} side's loss: {bench.last_line(measured.stderr)}")
    return {"seconds": process["whole"], "loss": float(loss[1])}


def line(result: Mapping[str, float]) -> str:
    return f"{result['seconds']:.1f} s, loss {result['loss']:.4f}"


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """A line a recipe: median seconds, how often that fits into the first's, the losses."""
    width = max(map(len, found))
    lines = [f"{'':{width}}  seconds   faster  mean loss  losses"]
    first = None
    for name, results in found.items():
        seconds = statistics.median(one["seconds"] for one in results)
        losses = [one["loss"] for one in results]
        first = first or seconds
        mean, each = statistics.mean(losses), ", ".join(f"{loss:.4f}" for loss in losses)
        lines.append(
            f"{name:{width}}  {seconds:7.1f}  {first / seconds:6.2f}x  {mean:9.4f}  {each}"
        )
    return lines
