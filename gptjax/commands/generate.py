"""gptjax generate [RUN]: continue a prompt with a trained model."""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from gptjax import config_io, files
from gptjax.commands import flags, terminal
from gptjax.errors import UserError
from gptjax.generation_config import GenerationConfig
from gptjax.runtime_config import DeviceKind

if TYPE_CHECKING:
    from gptjax.run import Run


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
    prompts: str | None = None
    """Continue each line of this file (- is standard input), or the "prompt" of each line of a
    .jsonl file, many at a time."""
    json: bool = False
    """Print a line of JSON for each sample."""
    logprobs: int | None = None
    """Print the log-probability of each token drawn, and of so many of the likeliest in its place
    (0 to 10)."""
    rows: int = 32
    """With --prompts, --json and --logprobs: texts drawn at the same time."""
    num_beams: int | None = None
    """Beam search: keep so many of the likeliest texts, instead of drawing; prints the likeliest
    --num-samples of them. It ends where the block is full."""
    length_penalty: float = 1.0
    """With --num-beams: texts compete by their log-probability, divided by their length to this
    power. Above 1 longer ones gain."""
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
        if len([x for x in (self.prompt, self.prompt_file, self.prompts) if x is not None]) > 1:
            out.append("--prompt, --prompt-file and --prompts exclude each other")
        if self.shares_rows and (self.stream or self.sharded or not self.max_new_tokens):
            out.append(
                "--stream, --sharded and --max-new-tokens 0 do not go with --prompts, --json or"
                " --logprobs"
            )
        drawing = {
            "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop",
            "overflow", "stream", "sharded", "prompts", "json", "logprobs", "dry_run",
        }  # fmt: skip
        if self.num_beams is not None:
            wrong = [f"--{name.replace('_', '-')}" for name in sorted(drawing & self.given)]
            if wrong or not self.max_new_tokens:
                out.append(f"--num-beams does not go with {', '.join(wrong or ['endless text'])}")
            if self.num_samples > self.num_beams:
                out.append(f"of {self.num_beams} beams there cannot be {self.num_samples} samples")
        elif "length_penalty" in self.given:
            out.append("--length-penalty goes with --num-beams")
        if not -1e6 <= self.length_penalty <= 1e6:
            out.append(f"length_penalty {self.length_penalty} is outside [-1e6, 1e6]")
        if not 0 <= (self.logprobs or 0) <= 10:
            out.append(f"logprobs {self.logprobs} is outside [0, 10]")
        return out + self._check_ints(1, "rows", "num_beams")

    @property
    def shares_rows(self) -> bool:
        """Whether the texts are drawn in the rows of a batch, as a server's are."""
        return self.json or self.prompts is not None or self.logprobs is not None


DEFAULTS = [GenerateFlags()]


def main(argv: list[str], prog: str) -> None:
    """Raises UserError."""
    named, given = flags.parse(GenerateFlags(), argv, prog, "[RUN]")
    run_dir = named[0] if named else "runs/quickstart"
    if not named and given.stop and terminal.is_run(files.path(given.stop[-1])):
        raise UserError(f"--stop takes all that follows it; name the run before: {prog} RUN --stop")
    prompts = read_prompts(given)
    if given.topology:
        dry_run(run_dir, given, prompts[0] or "\n")
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
    skip, encoded = given.unknown == "skip", []
    for number, text in enumerate(prompts, 1):
        try:
            ids = prompt_ids(model.tokenizer, text, skip_unknown=skip)
            encoded.append((model.tokenizer.decode(ids.tolist()) if text is None else text, ids))
        except UserError as error:
            where = f"prompt {number}: " if given.prompts is not None else ""
            hint = "" if skip or not text else "; --unknown skip leaves out unknown characters"
            raise UserError(f"{where}{error}{hint}") from None
    stops = [flags.unescape(flags.text("--stop", text)) for text in given.stop]
    if given.shares_rows:
        share_rows(run_dir, model, encoded, given, stops)
        return
    ((prompt_text, prompt),) = encoded
    if given.num_beams:
        terminal.status("compiling ...")
        found = model.beam_search(
            prompt, max_new_tokens=given.max_new_tokens, num_beams=given.num_beams,
            length_penalty=given.length_penalty, ignore_end_of_text=given.ignore_end_of_text,
        )  # fmt: skip
        terminal.status("")
        for score, text in found[: given.num_samples]:
            print(f"{prompt_text}{text}\n[score {score:.4f}]")
        return
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


def share_rows(
    run_dir: str, model: "Run", prompts: list[tuple[str, Any]], given: GenerateFlags,
    stops: list[str],
) -> None:  # fmt: skip
    """Print the samples of all prompts. Raises UserError: the rows do not fit the memory."""
    from gptjax.decode_layout import unstack
    from gptjax.devices import memory
    from gptjax.serving import batch
    from gptjax.serving.completions import Prompt
    from gptjax.serving.decoder import Decoder
    from gptjax.serving.engine import Engine

    config, total = model.config, len(prompts) * given.num_samples
    began, drawn = time.perf_counter(), 0
    memory.refuse_too_many(config, given.rows, config.block_size, setting="--rows")
    terminal.status("compiling ...")
    decoder = Decoder(unstack(model.params, config, consume=True), config, given.rows)
    engine, settings = Engine(decoder, 2 * decoder.rows), given.replace(stop=tuple(stops))
    texts = [Prompt(*each) for each in prompts]
    samples = batch.complete(engine, model.tokenizer, texts, settings, given.logprobs)
    for done, sample in enumerate(samples, 1):
        terminal.status("")
        drawn += sample["completion_tokens"]
        if given.json:
            print(json.dumps(sample), flush=True)
        else:
            print(sample["prompt"] + sample["text"])
            if given.logprobs is not None:
                print("\n".join(["", *table(sample["logprobs"], given.logprobs)]))
            if total > 1:
                print("---------------", flush=True)
        terminal.status(f"{done:,} of {total:,} texts" if done < total else "")
    took = f"{total} texts, {drawn} tokens in {time.perf_counter() - began:.1f} s"
    print(f"[{run_dir}, step {model.step}: {took}]", file=sys.stderr)


def table(logprobs: dict[str, Any], alternatives: int) -> Iterator[str]:
    """A line for each token: its log-probability, itself, and the likeliest in its place."""
    columns = (logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs"))
    for token, logprob, top in zip(*columns, strict=True):
        likeliest = "  ".join(f"{other!r} {x:.4f}" for other, x in [*top.items()][:alternatives])
        own = "       -" if logprob is None else f"{logprob:8.4f}"
        yield f"{own}  {token!r:16}{likeliest}".rstrip()


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


def read_prompts(given: GenerateFlags) -> list[str | None]:
    """The prompts' texts, from the flag, a file or standard input; [None] where there is none.

    Raises:
        UserError: they cannot be read, or are not UTF-8.
    """
    flag = "--prompts" if given.prompts is not None else "--prompt-file"
    name = given.prompt_file if given.prompts is None else given.prompts
    if name is None:
        if given.prompt is None:
            return [None]
        return [flags.unescape(flags.text("--prompt", given.prompt))]
    what = f"{flag} {name}"
    if flag == "--prompts":
        return [*terminal.read_lines(name, what, "prompt")]
    return [terminal.read(name, what)]
