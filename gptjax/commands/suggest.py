"""gptjax suggest --data TEXT --hours H: what to train on a text, here, in that time."""

import dataclasses
import itertools
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gptjax import config_io, console, program
from gptjax.commands import flags
from gptjax.config import DataConfig, TokenizerKind, TrainConfig
from gptjax.errors import UserError
from gptjax.runtime_config import DeviceKind, RuntimeConfig
from gptjax.settings import Config

if TYPE_CHECKING:
    from gptjax.data.token_files import Dataset
    from gptjax.guidance import Speed, Suggestion

DECIDED = "model.dtype", "model.vocab_size"
"""Settings that training decides in the same way."""

CHAR_BELOW = 50e6
"""Bytes of a text that is read as characters, unless another tokenizer is asked for."""


@dataclasses.dataclass(frozen=True)
class SuggestFlags(Config):
    """Suggest a model, a batch, a learning rate and a number of steps for a text, this machine and
    some time. Training steps of a few sizes are measured for half a minute; the rest are published
    rules, which are named. The last line is the command that trains."""

    data: DataConfig = DataConfig(None)  # noqa: RUF009
    hours: float = 1.0
    """Time for the whole run."""
    device: DeviceKind = "auto"
    """Kind of device to train on. auto: the fastest kind that is there."""

    def problems(self) -> list[str]:
        if not 0 < self.hours < math.inf:
            return [f"hours {self.hours} must be a number above 0"]
        return []


DEFAULTS = [SuggestFlags()]


def main(argv: list[str], prog: str) -> None:
    """Raises UserError, RunError."""
    _, given = flags.parse(SuggestFlags(), argv, prog)
    data = given.data
    if data.source is None and data.dir is None:
        raise UserError(f"no text; name one: {prog} --data my.txt --hours 2 (or --data.dir SET)")
    from gptjax import guidance, launch  # JAX is not needed to print the help
    from gptjax.devices import setup

    runtime, terminal = RuntimeConfig(device=given.device), console.make()
    with terminal.status("starting the devices"):
        launch.start_devices(runtime)
    data = data.replace(tokenizer=tokenizer_for(data))
    dataset = launch.open_data(TrainConfig(guidance.SMALL[0], data), None, terminal)[1]
    seconds, began = given.hours * 3600, time.monotonic()
    print(
        f"text       {len(dataset.train):,} training tokens ({dataset.tokenizer.kind},"
        f" {dataset.tokenizer.n_vocab:,} ids)\n"
        f"measured   speed of training, by steps taken here, on {setup.describe()}:"
    )
    measured = guidance.measure_sizes(data, dataset, runtime, print_speed)
    found = guidance.suggest(data, dataset, runtime, seconds, measured)
    print_speed(found.speed)
    print(explain(found, dataset, seconds))
    took = time.monotonic() - began
    print(f"\nMeasured in {took:.0f} s. To train it:\n\n    {command(found.config, found.runtime)}")


def tokenizer_for(data: DataConfig) -> TokenizerKind:
    """What was asked for; else by the text's size."""
    if "tokenizer" in data.given or data.dir:
        return data.tokenizer
    from gptjax.data import prepare

    sizes = [text.size for text in prepare.corpora(data)]
    return "char" if sum(size or CHAR_BELOW for size in sizes) < CHAR_BELOW else "gpt2"


def print_speed(speed: "Speed") -> None:
    """A line for one size."""
    model, rate = speed.model, speed.tokens / speed.step
    print(
        f"           {model.n_layer} layers x {model.n_embd}, block {model.block_size}:"
        f" {rate:,.0f} tokens/s ({speed.flops / 1e9:,.0f} GFLOP/s)",
        flush=True,
    )


def explain(found: "Suggestion", dataset: "Dataset", seconds: float) -> str:
    """What is suggested, and why, in a few lines."""
    from gptjax import guidance
    from gptjax.devices import memory
    from gptjax.progress import duration, short

    config, runtime, speed = found.config, found.runtime, found.speed
    model, optimizer = config.model, config.optimizer
    size, tokens, epochs = model.num_parameters(), found.tokens, found.tokens / len(dataset.train)
    evaluations = 1 + -(-config.max_steps // runtime.eval_interval)
    if optimizer.kind == "muon":
        rate = f"Muon at {optimizer.muon_learning_rate:g}, AdamW at {optimizer.learning_rate:g}"
        why = "measured with small models, see docs/leaderboard.md"
    else:
        rate, why = f"AdamW at {optimizer.learning_rate:g}", "arXiv:2005.14165, table 2.1"
    lines = [
        f"model      {model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, block"
        f" {model.block_size}: {short(size)} parameters; of the sizes that fit, the one with the"
        " least predicted loss after this time (arXiv:2305.16264)",
        f"tokens     {short(tokens)}, {tokens / size:.3g} per parameter; with text enough, about 20"
        " are best for a given time (arXiv:2203.15556)",
        f"text       read {epochs:.2g} times; up to 4 times teach nearly what new text would, after"
        " 40 times nothing is left to learn (arXiv:2305.16264)",
        f"dropout    {model.dropout:g}",
        f"batch      {config.batch_size} x {model.block_size} = {speed.tokens:,} tokens a step,"
        " in proportion to the root of all tokens, near those of the small configs",
        f"rate       {rate} ({why})",
        f"time       {duration(found.seconds)} of {duration(seconds)}: {config.max_steps:,} steps"
        f" of {speed.step:.3g} s, {evaluations} evaluations of"
        f" {runtime.eval_batches * speed.evaluation:.2g} s, {guidance.OTHER_SECONDS:.0f} s for the"
        " rest",
        f"memory     {memory.gib(found.peak)} of {memory.gib(memory.available(None)[0])}"
        f" ({memory.available(None)[1]})",
    ]
    if epochs > 4:
        lines.append(
            "warning    the text is short for this time: watch the validation loss, which rises"
            " when the model learns the text by heart (the best checkpoint is kept); more text"
            " would help most"
        )
    return "\n".join(lines)


def command(config: TrainConfig, runtime: RuntimeConfig) -> str:
    """The command line that trains it: what differs from the quickstart, which is the default."""
    given = list[object]()
    for chosen, usual in zip((config, runtime), config_io.load_config("quickstart"), strict=True):
        before = config_io.flatten(usual)
        for name, value in config_io.flatten(chosen).items():
            if value not in (before[name], None) and name not in DECIDED:
                name = name.removesuffix(".source").removesuffix(".kind")
                name = name.removeprefix("model.").removeprefix("optimizer.")
                given += [f"--{name.replace('_', '-')}", value]
    return program.command("train", *given, "--run-dir", free_folder(config.data))


def free_folder(data: DataConfig) -> Path:
    """A folder for the run that is not there yet."""
    name = Path(data.dir or data.source or "").stem
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path for path in (Path("runs") / each for each in names) if not path.exists())
