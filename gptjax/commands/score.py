"""gptjax score RUN FILE: how likely a run finds texts, and each of their tokens."""

import dataclasses
import json
import math
import sys
from typing import Any, Literal

import numpy as np

from gptjax import files
from gptjax.commands import flags, terminal
from gptjax.errors import UserError
from gptjax.runtime_config import DeviceKind
from gptjax.settings import Config


@dataclasses.dataclass(frozen=True)
class ScoreFlags(Config):
    """Print the log-probability of each line of FILE (- is standard input), or of the "text" in
    each line of a .jsonl file; every line is a text of its own. The first token of a text has
    nothing before it, and does not count."""

    tokens: bool = False
    """Print the log-probability of each token too."""
    json: bool = False
    """Print a line of JSON for each text."""
    checkpoint: str = "best"
    """best (lowest validation loss), latest, or a step."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Compute precision. auto: the run's own."""
    device: DeviceKind = "auto"
    """Kind of device to run on."""


DEFAULTS = [ScoreFlags()]


def main(argv: list[str], prog: str) -> None:
    """Raises UserError."""
    (run_dir, name), given = flags.parse(ScoreFlags(), argv, prog, "RUN FILE")
    texts = terminal.read_lines(name, name, "text")
    terminal.need_run(run_dir)
    # JAX is imported when the command runs, not to print its help.
    from gptjax import run
    from gptjax.devices import setup
    from gptjax.serving.completions import spell

    setup.select_platform(given.device)
    setup.use_compilation_cache(files.cache_dir() / "xla")
    terminal.status(f"loading {run_dir} ...")
    model = run.load(run_dir, given.checkpoint, dtype=given.dtype)
    total, count = 0.0, 0
    for number, text in enumerate(texts, 1):
        terminal.status(f"{number:,} of {len(texts):,} texts")
        try:
            ids = model.tokenizer.encode(text)
        except UserError as error:
            raise UserError(f"text {number}: {error}") from None
        scores = model.score(ids)[1:]
        own = float(scores.sum(dtype=np.float64))
        total, count = total + own, count + len(scores)
        spelled = [spell(model.tokenizer, id_) for id_ in ids.tolist()]
        logprobs = [None, *(round(x, 6) for x in scores.tolist())]
        terminal.status("")
        if given.json:
            found: dict[str, Any] = {"text": text, "logprob": own, "scored_tokens": len(scores)}
            if given.tokens:
                found |= {"tokens": spelled, "token_logprobs": logprobs}
            print(json.dumps(found), flush=True)
            continue
        print(f"{own:12.4f} {len(scores):8,}  {text!r}", flush=True)
        if given.tokens:
            for token, logprob in zip(spelled, logprobs, strict=True):
                print(f"{'-' if logprob is None else format(logprob, '.4f'):>12}  {token!r}")
    mean = f", {-total / count:.4f} nats per token" if count else ""
    perplexity = f", perplexity {math.exp(min(-total / count, 700.0)):.4f}" if count else ""
    said = f"{len(texts)} texts: log-probability {total:.4f} of {count} tokens{mean}{perplexity}"
    print(f"[{run_dir}, step {model.step}, in {model.config.dtype}: {said}]", file=sys.stderr)
