"""LAMBADA (Paperno et al. 2016, arXiv:1606.06031): the last word of a passage, which only the
whole of it tells. Asked as in lm-evaluation-harness (`lambada_openai`)."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.config import ModelConfig
from gptjax.data import readers
from gptjax.data.tokenizers import Tokenizer
from gptjax.evals import continuations
from gptjax.evals.continuations import Continuation, Scores


class LambadaResult(NamedTuple):
    """What `evaluate_passages` measured."""

    description: str
    perplexity: float
    """Of a last word, however many tokens it has: exp of the mean over passages."""
    acc: float
    """Share of passages of whose last word each token is the likeliest one."""

    def report(self) -> str:
        """What was evaluated, and a line for each number."""
        return (
            f"{self.description}\nperplexity          {self.perplexity:.4f}  (of the last word)\n"
            f"acc                 {self.acc:.4f}  (the last word is the likeliest, token by token)"
        )


def read_passages(path: Path, tokenizer: Tokenizer) -> list[Continuation]:
    """The `text` of each line of JSON, or row; its last word follows the last space. UserError: it
    cannot be read, a passage has one word only, or characters that the tokenizer does not know."""

    def parse(row: dict[str, Any]) -> Continuation:
        before, _, word = readers.of_row(row, "text").rpartition(" ")
        if not (before.strip() and word):
            raise ValueError
        return continuations.encode(tokenizer, before, " " + word)

    what = "a LAMBADA passage: expected a `text` of several words"
    return readers.parse_rows(path, parse, what)


def evaluate_passages(
    scores: Scores, passages: list[Continuation], config: ModelConfig, *, name: str,
    batch_size: int, progress: Callable[[int, int], None] = lambda done, total: None,
) -> LambadaResult:  # fmt: skip
    """Perplexity and accuracy of the last words of `passages`, which the report calls `name`. See
    `continuations.score`."""
    nats, greedy = continuations.score(
        scores, passages, config, batch_size=batch_size, progress=progress
    )
    mean = min(float(nats.mean()), 700.0)  # of a larger one exp is no float
    return LambadaResult(
        f"{name}: {len(passages):,} passages", math.exp(mean), float(greedy.mean())
    )
