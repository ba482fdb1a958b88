"""HellaSwag (Zellers et al. 2019, arXiv:1905.07830): which of four endings follows a context?

Two ways to ask are in use, whose numbers differ. "completion" is build-nanogpt's: the texts as they
are. "harness" is that of lm-evaluation-harness, which papers and leaderboards cite: the activity
before the context, and WikiHow's marks taken out.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from gptjax.config import ModelConfig
from gptjax.data import readers
from gptjax.data.tokenizers import Tokenizer
from gptjax.evals import continuations
from gptjax.evals.continuations import Continuation, Scores

Style = Literal["completion", "harness"]

ENDINGS = 4

FIELDS = {
    "completion": "`ctx`, four `endings` and a `label` from 0 to 3",
    "harness": "`activity_label`, `ctx_a`, `ctx_b`, four `endings` and a `label` from 0 to 3",
}

PER = {
    "completion": {"acc_norm": "token"},
    "harness": {"acc_norm": "character", "acc_bytes": "byte"},
}
"""{metric: of which the likelihood of an ending is taken}. The harness's acc_norm is by characters,
though it is often said to be by bytes; endings that are not all ASCII tell."""


class Question(NamedTuple):
    """Which of four texts is the likeliest after its context (the same for all)?"""

    endings: tuple[Continuation, ...]
    sizes: dict[str, tuple[int, ...]]
    """{metric: of each ending what `PER` says}."""
    label: int
    """The number of the right one."""


class HellaSwagResult(NamedTuple):
    """What `evaluate_questions` measured: shares of questions whose likeliest ending is right."""

    description: str
    style: Style
    acc: float
    """By the likelihood of the whole ending."""
    acc_norm: float
    """By likelihood per token (completion) or per character (harness)."""
    acc_bytes: float | None
    """By likelihood per byte (harness)."""

    def report(self) -> str:
        """What was evaluated, and a line for each number."""
        lines = [self.description, f"acc                 {self.acc:.4f}"]
        for metric, unit in PER[self.style].items():
            value = getattr(self, metric)
            lines.append(f"{metric:19} {value:.4f}  (by likelihood per {unit} of the ending)")
        return "\n".join(lines)


def read_questions(path: Path, tokenizer: Tokenizer, style: Style = "completion") -> list[Question]:
    """The questions of a file with the fields of the public one, as JSON lines or a table.
    UserError: it cannot be read, an object has not these fields, or has characters that the
    tokenizer does not know."""
    ask = _completion if style == "completion" else _harness

    def parse(row: dict[str, Any]) -> Question:
        endings, label = row["endings"], int(str(row["label"]))
        if not (isinstance(endings, list) and len(endings) == ENDINGS and 0 <= label < ENDINGS):
            raise ValueError
        return ask(row, endings, label, tokenizer)

    what = f"a HellaSwag question: expected {FIELDS[style]}"
    return readers.parse_rows(path, parse, what)


def _completion(row: Any, endings: list[str], label: int, tokenizer: Tokenizer) -> Question:
    """Context and ending are encoded apart; the space between them belongs to the ending."""
    context = tokenizer.encode(readers.of_row(row, "ctx"))
    if not len(context):
        raise ValueError
    texts = tuple(Continuation(context, tokenizer.encode(" " + ending)) for ending in endings)
    return Question(texts, {"acc_norm": tuple(len(text.tokens) for text in texts)}, label)


def _harness(row: Any, endings: list[str], label: int, tokenizer: Tokenizer) -> Question:
    """Context and ending are encoded as one text."""
    activity, first, second = (readers.of_row(row, x) for x in ("activity_label", "ctx_a", "ctx_b"))
    # `capitalize` also makes all other letters small.
    context = _clean(f"{activity}: {first} {second.capitalize()}")
    cleaned = [_clean(ending) for ending in endings]
    texts = tuple(continuations.encode(tokenizer, context, " " + ending) for ending in cleaned)
    sizes = {
        "acc_norm": tuple(max(1, len(ending)) for ending in cleaned),
        "acc_bytes": tuple(max(1, len(ending.encode("utf-8", "replace"))) for ending in cleaned),
    }
    return Question(texts, sizes, label)


def _clean(text: str) -> str:
    """Without the marks of WikiHow's pages: " [title]" ends a sentence, the others are dropped."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[[^\]\n]*\]", "", text).replace("  ", " ")


def evaluate_questions(
    scores: Scores, questions: list[Question], config: ModelConfig, *, name: str, batch_size: int,
    style: Style = "completion",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> HellaSwagResult:  # fmt: skip
    """Accuracy on `questions`, which the report calls `name`. All hosts call this with the same
    arguments; for the others see `continuations.score`. UserError: an ending does not fit the
    block, or the hosts have different questions."""
    texts = [text for question in questions for text in question.endings]
    nats, _ = continuations.score(scores, texts, config, batch_size=batch_size, progress=progress)
    found = accuracies(nats.reshape(-1, ENDINGS), questions)
    described = f"{name}: {len(questions):,} questions in the {style} style"
    return HellaSwagResult(
        described, style, found["acc"], found["acc_norm"], found.get("acc_bytes")
    )


def accuracies(nats: np.ndarray, questions: list[Question]) -> dict[str, float]:
    """Of the nats [questions, 4] of the endings, see `HellaSwagResult`."""
    labels = np.array([question.label for question in questions])
    sizes = {"acc": np.ones_like(nats)}
    for metric in questions[0].sizes:
        sizes[metric] = np.array([question.sizes[metric] for question in questions])
    return {
        metric: float(((nats / size).argmin(-1) == labels).mean()) for metric, size in sizes.items()
    }
