"""Sample from a trained run: python generate_jax.py --run-dir runs/quickstart --prompt "def " """

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from gptjax import checkpoint, cli, corpus, devices, generate, model, tokenizers
from gptjax.config import LARGEST, DeviceKind
from gptjax.errors import UserError
from gptjax.places import place
from gptjax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class GenerateFlags:
    """Continue a prompt with a trained model. Needs nothing but the run's folder."""

    run_dir: str = "runs/quickstart"
    """The folder that train_jax.py wrote."""
    checkpoint: str = "best"
    """best (lowest validation loss), latest, or a step."""
    prompt: str = "\n"
    """Text to continue."""
    prompt_file: str | None = None
    """Read the prompt from this file instead; - is standard input."""
    max_new_tokens: int = 500
    """Tokens to make."""
    temperature: float = 0.8
    """Below 1 safer, above 1 wilder; 0 always takes the likeliest token."""
    top_k: int = 200
    """Draw from the k likeliest tokens only; 0 from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that have this probability together, in (0, 1]."""
    num_samples: int = 1
    """Continuations, drawn side by side."""
    seed: int = 1337
    """The same seed and settings give the same text."""
    stop: tuple[str, ...] = ()
    """End a sample before any of these texts; \\n and \\t are understood."""
    ignore_end_of_text: bool = False
    """Go on after the token that ends a document."""
    stream: bool = False
    """Print the first sample's tokens as they come."""
    overflow: generate.Overflow = "exact"
    """Past the model's block_size. exact: as an uncached model that sees the last block_size
    tokens; half: drop the older half and go on, much faster; stop: end there."""
    unknown: Literal["error", "skip"] = "error"
    """What to do with characters of the prompt that the tokenizer does not know."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision, and what the weights are read in. auto: the run's own setting, which
    by default is bfloat16 on GPU and TPU, float32 on CPU."""
    device: DeviceKind = "auto"
    """Kind of device to run on."""

    def problems(self) -> list[str]:
        """Each setting that is out of range, in words."""
        out = []
        for name, least in (("max_new_tokens", 1), ("num_samples", 1), ("top_k", 0), ("seed", 0)):
            if not least <= getattr(self, name) < LARGEST:
                flag = name.replace("_", "-")
                out.append(f"--{flag} must be at least {least} and below {LARGEST}")
        if not 0 <= self.temperature <= 1e6:
            out.append(f"--temperature {self.temperature} is outside [0, 1e6]")
        if not 0 < self.top_p <= 1:
            out.append(f"--top-p {self.top_p} is outside (0, 1]")
        if "" in self.stop:
            out.append("--stop must not be empty")
        return out


def read_prompt(flags: GenerateFlags) -> str:
    """The prompt's text, from the flag, a file or standard input."""
    try:
        if flags.prompt_file is None:
            # Arguments that are not UTF-8 come as lone surrogates.
            return flags.prompt.encode(errors="surrogateescape").decode()
        if flags.prompt_file == "-" and sys.stdin is None:
            raise UserError("--prompt-file -: standard input is closed")
        if flags.prompt_file == "-":
            return sys.stdin.buffer.read().decode()
        return Path(flags.prompt_file).read_bytes().decode()
    except OSError as error:
        raise UserError(
            f"cannot read --prompt-file {flags.prompt_file}: {error.strerror}"
        ) from None
    except UnicodeError:
        where = "--prompt" if flags.prompt_file is None else f"--prompt-file {flags.prompt_file}"
        raise UserError(f"{where} is not UTF-8 text") from None


class Sample:
    """One growing text, which knows when it has ended."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], eot: int | None):
        self.text = ""
        self.ended = False
        self._tokenizer, self._stops, self._eot = tokenizer, stops, eot
        self._ids: list[int] = []

    def extend(self, ids: np.ndarray) -> None:
        """Add tokens, up to the end-of-text token or a stop text."""
        if self.ended:
            return
        new = ids.tolist()
        if self._eot in new:
            new, self.ended = new[: new.index(self._eot)], True
        self._ids += new
        self.text = self._tokenizer.decode(self._ids)
        ends = [end for stop in self._stops if (end := self.text.find(stop)) >= 0]
        if ends:
            self.text, self.ended = self.text[: min(ends)], True

    def settled(self) -> str:
        """What later tokens cannot change: no half a character, no beginning of a stop text."""
        if self.ended:
            return self.text
        text = self.text.rstrip("\ufffd")
        open_ends = [
            n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])
        ]
        return text[: len(text) - max(open_ends, default=0)]


def main(argv: list[str]) -> None:
    _, flags = cli.parse(GenerateFlags(), argv, "python generate_jax.py")
    prompt_text = read_prompt(flags)
    devices.use_platform(flags.device)
    devices.use_compilation_cache(corpus.cache_dir() / "xla")

    step, facts, params, _ = checkpoint.load(place(flags.run_dir), flags.checkpoint)
    config = facts.config.model
    if flags.dtype != "auto":
        config = dataclasses.replace(config, dtype=flags.dtype)
    params = model.unstack(params, config, consume=True)
    tokenizer = tokenizers.from_json(facts.tokenizer, flags.run_dir)
    prompt = tokenizer.encode(prompt_text, skip_unknown=flags.unknown == "skip")
    if not len(prompt):
        raise UserError("the prompt is empty; give at least one character that the model knows")

    stops = [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in flags.stop]
    eot = None if flags.ignore_end_of_text else tokenizer.eot
    samples = [Sample(tokenizer, stops, eot) for _ in range(flags.num_samples)]
    if flags.stream:
        print(prompt_text, end="", flush=True)
    shown, made, began = 0, 0, time.perf_counter()
    for new in generate.generate(
        params,
        prompt,
        flags.max_new_tokens,
        config,
        generate.Sampling(flags.temperature, flags.top_k, flags.top_p),
        num_samples=flags.num_samples,
        seed=flags.seed,
        overflow=flags.overflow,
        chunk=1 if flags.stream else generate.CHUNK,
    ):
        made += new.shape[1]
        for sample, ids in zip(samples, new, strict=True):
            sample.extend(ids)
        if flags.stream:
            settled = samples[0].settled()
            print(settled[shown:], end="", flush=True)
            shown = len(settled)
        if all(sample.ended for sample in samples):
            break
    for number, sample in enumerate(samples):
        streamed = flags.stream and number == 0
        print(sample.text[shown:] if streamed else prompt_text + sample.text)
        if len(samples) > 1:
            print("---------------")
    seconds = time.perf_counter() - began
    print(
        f"[{flags.run_dir}, step {step}: {made} tokens x {flags.num_samples} in {seconds:.1f} s]",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
