"""gptjax generate [RUN]: continue a prompt with a trained model."""

import dataclasses
import sys
import time
from typing import Literal

from gptjax import config_io, files
from gptjax.commands import flags, terminal
from gptjax.errors import UserError
from gptjax.generation_config import GenerationConfig
from gptjax.runtime_config import DeviceKind


@dataclasses.dataclass(frozen=True)
class GenerateFlags(GenerationConfig):
    """Continue a prompt with a trained model (runs/quickstart, if no RUN is named). The run's
    folder is all it needs."""

    checkpoint: str = "best"
    """best (lowest validation loss), latest, or a step."""
    prompt: str | None = None
    """Text to continue; \\n, \\t and \\\\ are understood. None: a line end. An empty one begins a
    new document, where the model knows their ends."""
    stop: tuple[str, ...] = ()
    """End a sample before any of these texts; \\n, \\t and \\\\ are understood."""
    prompt_file: str | None = None
    """Read the prompt from this file instead; - is standard input."""
    stream: bool = False
    """Print the first sample's tokens as they come. (On if --max-new-tokens is 0.)"""
    unknown: Literal["error", "skip"] = "error"
    """What to do with characters of the prompt that the tokenizer does not know."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision, and what the weights are read in. auto: the run's own."""
    device: DeviceKind = "auto"
    """Kind of device to run on."""
    sharded: bool = False
    """Share the weights out over all devices, where one cannot hold them. (Else several samples are
    shared out.)"""
    dry_run: bool = False
    """Only say what it needs and how fast it can be at most on one chip of --topology. RUN may be a
    config then (its --prompt is counted in bytes)."""
    topology: str | None = None
    """The TPU to compile for in a dry run, which need not be here: v5e-1, v4-8, ... (It takes
    jax[tpu].)"""

    def problems(self) -> list[str]:
        out = super().problems()
        if self.dry_run != (self.topology is not None):
            out.append("--dry-run and --topology go together")
        if self.dry_run and self.sharded:
            out.append("a dry run of sampling is for one chip; leave out --sharded")
        return out


DEFAULTS = [GenerateFlags()]


def main(argv: list[str], prog: str) -> None:
    """Raises UserError."""
    named, given = flags.parse(GenerateFlags(), argv, prog, "[RUN]")
    run_dir = named[0] if named else "runs/quickstart"
    if not named and given.stop and terminal.is_run(files.path(given.stop[-1])):
        raise UserError(f"--stop takes all that follows it; name the run before: {prog} RUN --stop")
    prompt_text = read_prompt(given)
    if given.topology:
        dry_run(run_dir, given, prompt_text or "\n")
        return
    terminal.need_run(run_dir)
    # JAX is imported when the command runs, not to print its help.
    from gptjax import run
    from gptjax.decode_layout import unstack
    from gptjax.devices import setup
    from gptjax.generation import GrowingText, grow, prompt_ids

    setup.select_platform(given.device)
    setup.use_compilation_cache(files.cache_dir() / "xla")
    terminal.status(f"loading {run_dir} ...")
    model = run.load(run_dir, given.checkpoint, dtype=given.dtype, sharded=given.sharded)
    skip = given.unknown == "skip"
    try:
        prompt = prompt_ids(model.tokenizer, prompt_text, skip_unknown=skip)
    except UserError as error:
        hint = "" if skip or not prompt_text else "; --unknown skip leaves out unknown characters"
        raise UserError(f"{error}{hint}") from None
    if prompt_text is None:
        prompt_text = model.tokenizer.decode(prompt.tolist())
    stops = [flags.unescape(flags.text("--stop", text)) for text in given.stop]
    eot = None if given.ignore_end_of_text else model.tokenizer.eot
    # Not `run.generate`: this needs no second copy of the weights, and counts the tokens.
    stream = given.stream or not given.max_new_tokens
    tokens = run.tokens(
        unstack(model.params, model.config, consume=True), prompt, model.config, given,
        stream=stream,
    )  # fmt: skip
    samples = [GrowingText(model.tokenizer, stops, eot) for _ in range(given.num_samples)]
    made, began = 0, time.perf_counter()
    terminal.status("compiling ...")
    for count in grow(samples, tokens):
        if stream and not made:
            terminal.status("")
            print(prompt_text, end="", flush=True)
        made += count
        if stream:
            print(samples[0].take(keep=False), end="", flush=True)
        else:
            terminal.status(f"{made:,} of {given.max_new_tokens:,} tokens" if count else "")
    for number, sample in enumerate(samples):
        print("" if stream and number == 0 else prompt_text + sample.text)
        if len(samples) > 1:
            print("---------------")
    took = f"{made} tokens x {given.num_samples} in {time.perf_counter() - began:.1f} s"
    print(f"[{run_dir}, step {model.step}: {took}]", file=sys.stderr)


def dry_run(name: str, given: GenerateFlags, prompt: str) -> None:
    """Raises UserError, RunError."""
    assert given.topology
    from gptjax import dry_run, run_metadata
    from gptjax.data import tokenizers
    from gptjax.devices import setup, topology
    from gptjax.generation import prompt_ids

    setup.select_platform("cpu")
    setup.use_compilation_cache(files.cache_dir() / "xla")
    device = topology.devices(given.topology)[0]
    folder = files.path(name)
    if terminal.is_run(folder) and (metadata := run_metadata.newest_metadata(folder)):
        config = metadata.config.model
        tokenizer = tokenizers.from_json(metadata.tokenizer, name)
        count = len(prompt_ids(tokenizer, prompt, skip_unknown=given.unknown == "skip"))
    else:
        try:
            config, count = config_io.load_config(name)[0].model, len(prompt.encode())
        except UserError as error:
            raise UserError(f"there is no run {name}, and {error}") from None
        config = config.replace(vocab_size=config.vocab_size or 50257)
    dtype = config.replace(dtype=given.dtype if given.dtype != "auto" else config.dtype)
    dry_run.print_sampling(
        setup.resolve_dtype(dtype, device), device, prompt=min(count, config.block_size),
        max_new_tokens=given.max_new_tokens or config.block_size, num_samples=given.num_samples,
    )  # fmt: skip


def read_prompt(given: GenerateFlags) -> str | None:
    """The prompt's text, from the flag, a file or standard input; None where there is none.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    name = given.prompt_file
    if name is None:
        return (
            None if given.prompt is None else flags.unescape(flags.text("--prompt", given.prompt))
        )
    what = f"--prompt-file {name}"
    return files.read_stdin(what) if name == "-" else files.read_text(files.path(name), what)
