"""gptjax generate [RUN]: continue a prompt with a trained model."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Literal

from gptjax import files
from gptjax.commands import flags
from gptjax.config import Config
from gptjax.errors import UserError
from gptjax.runtime_config import DeviceKind


@dataclasses.dataclass(frozen=True)
class GenerateFlags(Config):
    """Continue a prompt with a trained model (runs/quickstart, if no RUN is named). The run's
    folder is all it needs."""

    checkpoint: str = "best"
    """best (lowest validation loss), latest, or a step."""
    prompt: str = "\n"
    """Text to continue."""
    prompt_file: str | None = None
    """Read the prompt from this file instead; - is standard input."""
    max_new_tokens: int = 500
    """Tokens to generate."""
    temperature: float = 0.8
    """Below 1 safer, above 1 wilder; 0 always takes the likeliest token."""
    top_k: int = 200
    """Draw from the k likeliest tokens only; 0 from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that have this probability together, in (0, 1]."""
    num_samples: int = 1
    """Continuations, generated side by side."""
    seed: int = 1337
    """The same seed and settings give the same text."""
    stop: tuple[str, ...] = ()
    """End a sample before any of these texts; \\n and \\t are understood."""
    ignore_end_of_text: bool = False
    """Go on after the token that ends a document."""
    stream: bool = False
    """Print the first sample's tokens as they come."""
    overflow: Literal["exact", "half", "stop"] = "exact"
    """Past the model's block_size. exact: as an uncached model that sees the last block_size
    tokens; half: drop the older half and go on, much faster; stop: end there."""
    unknown: Literal["error", "skip"] = "error"
    """What to do with characters of the prompt that the tokenizer does not know."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision, and what the weights are read in. auto: the run's own."""
    device: DeviceKind = "auto"
    """Kind of device to run on."""

    def problems(self) -> list[str]:
        out = self._check_ints(1, "max_new_tokens", "num_samples")
        out += self._check_ints(0, "top_k", "seed")
        if not 0 <= self.temperature <= 1e6:
            out.append(f"temperature {self.temperature} is outside [0, 1e6]")
        if not 0 < self.top_p <= 1:
            out.append(f"top_p {self.top_p} is outside (0, 1]")
        return out + ["--stop must not be empty"] * ("" in self.stop)


DEFAULTS = [GenerateFlags()]


def main(argv: list[str], prog: str) -> None:
    """Raises UserError."""
    named, given = flags.parse(GenerateFlags(), argv, prog, "[RUN]")
    run_dir = named[0] if named else "runs/quickstart"
    prompt_text = read_prompt(given)
    # JAX is imported when the command runs, not to print its help.
    from gptjax import run, sampling
    from gptjax.decode_layout import unstack
    from gptjax.devices import setup

    setup.select_platform(given.device)
    setup.use_compilation_cache(files.cache_dir() / "xla")
    model = run.load(run_dir, given.checkpoint, dtype=given.dtype)
    try:
        prompt = model.tokenizer.encode(prompt_text, skip_unknown=given.unknown == "skip")
    except UserError as error:
        raise UserError(f"{error}; --unknown skip leaves such characters out") from None
    if not len(prompt):
        raise UserError("the prompt is empty; give at least one character that the model knows")
    stops = [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in given.stop]
    eot = None if given.ignore_end_of_text else model.tokenizer.eot
    samples = [sampling.GrowingText(model.tokenizer, stops, eot) for _ in range(given.num_samples)]
    made, began = 0, time.perf_counter()
    if given.stream:
        print(prompt_text, end="", flush=True)
    # Not `run.generate`: this needs no second copy of the weights, and counts the tokens.
    params = unstack(model.params, model.config, consume=True)
    settings = sampling.Sampling(given.temperature, given.top_k, given.top_p)
    for new in sampling.generate(
        params, prompt, given.max_new_tokens, model.config, settings,
        num_samples=given.num_samples, seed=given.seed, overflow=given.overflow,
        chunk=1 if given.stream else sampling.CHUNK,
    ):  # fmt: skip
        made += new.shape[1]
        for sample, ids in zip(samples, new, strict=True):
            sample.extend(ids)
        if given.stream:
            print(samples[0].take(), end="", flush=True)
        if all(sample.ended for sample in samples):
            break
    for number, sample in enumerate(samples):
        sample.ended = True
        print(sample.take() if given.stream and number == 0 else prompt_text + sample.text)
        if len(samples) > 1:
            print("---------------")
    took = f"{made} tokens x {given.num_samples} in {time.perf_counter() - began:.1f} s"
    print(f"[{run_dir}, step {model.step}: {took}]", file=sys.stderr)


def read_prompt(given: GenerateFlags) -> str:
    """The prompt's text, from the flag, a file or standard input.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    name = given.prompt_file
    try:
        if name is None:
            # Arguments that are not UTF-8 come as lone surrogates.
            return given.prompt.encode(errors="surrogateescape").decode()
        if name == "-" and sys.stdin is None:
            raise UserError("--prompt-file -: standard input is closed")
        return (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode()
    except OSError as error:
        raise UserError(f"cannot read --prompt-file {name}: {error.strerror}") from None
    except UnicodeError:
        where = "--prompt" if name is None else f"--prompt-file {name}"
        raise UserError(f"{where} is not UTF-8 text") from None
