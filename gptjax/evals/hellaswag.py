"""HellaSwag (Zellers et al. 2019, arXiv:1905.07830): which of four endings follows a context?"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax import files
from gptjax.config import ModelConfig
from gptjax.data.tokenizers import Tokenizer
from gptjax.devices import hosts
from gptjax.errors import UserError
from gptjax.evaluation import Losses
from gptjax.sampling import bucket

ENDINGS = 4


class Question(NamedTuple):
    """One context to finish: int32 tokens, and which ending is the right one."""

    context: np.ndarray
    endings: tuple[np.ndarray, ...]
    label: int


class HellaSwagResult(NamedTuple):
    """What `evaluate_questions` measured."""

    description: str
    acc: float
    """Share of questions whose likeliest ending is the right one."""
    acc_norm: float
    """The same by likelihood per token of the ending."""

    def report(self) -> str:
        """What was evaluated, and a line for each number."""
        return (
            f"{self.description}\nacc                 {self.acc:.4f}\n"
            f"acc_norm            {self.acc_norm:.4f}  (by likelihood per token of the ending)"
        )


def read_questions(path: Path, tokenizer: Tokenizer) -> list[Question]:
    """The questions of a file in the public jsonl format: `ctx`, four `endings` and a `label`.

    Context and ending are encoded separately; the space between them belongs to the ending.
    UserError: the file cannot be read, a line is not of that form, or has characters that the
    tokenizer does not know.
    """
    questions = []
    for number, line in enumerate(files.read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            context, endings, label = row["ctx"], row["endings"], int(str(row["label"]))
            four = isinstance(endings, list) and len(endings) == ENDINGS
            if not (context and four and 0 <= label < ENDINGS):
                raise ValueError
            encoded = tuple(tokenizer.encode(" " + ending) for ending in endings)
            questions.append(Question(tokenizer.encode(context), encoded, label))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"{path}, line {number} is not a HellaSwag question: expected `ctx`, four"
                " `endings` and a `label` from 0 to 3"
            ) from None
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    if not questions:
        raise UserError(f"{path} is empty; expected one JSON object a line")
    return questions


def evaluate_questions(
    losses: Losses, questions: list[Question], config: ModelConfig, *, name: str, batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> HellaSwagResult:  # fmt: skip
    """Accuracy on `questions`, which the report calls `name`. All hosts call this with the same
    arguments; for the others see `ending_losses`. UserError: an ending does not fit the block, or
    the hosts have different questions."""
    tokens = [[part.tolist() for part in (q.context, *q.endings)] + [q.label] for q in questions]
    if not hosts.all_equal(f"{tokens} {batch_size}"):
        raise UserError("the hosts have different questions or settings; start the same on all")
    nats = ending_losses(losses, questions, config, batch_size=batch_size, progress=progress)
    return HellaSwagResult(f"{name}: {len(questions):,} questions", *accuracies(nats, questions))


def ending_losses(
    losses: Losses, questions: list[Question], config: ModelConfig, *, batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:  # fmt: skip
    """float64 [questions, 4]: nats of each ending after its context. A context that does not fit
    the block together with the ending loses its beginning.

    Args:
        losses: the evaluation step over all devices, with its parameters.
        batch_size: endings at a time, over all devices.
        progress: told how many endings of how many are done.

    UserError: an ending alone does not fit the block.
    """
    size = config.block_size
    if too_long := [len(e) for q in questions for e in q.endings if len(e) > size]:
        raise UserError(
            f"{len(too_long)} endings are longer than the model's block_size {size}"
            f" (the longest has {max(too_long)} tokens)"
        )
    texts = [(q.context, ending) for q in questions for ending in q.endings]
    # Texts of similar length together, for little padding.
    order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
    ours = hosts.host_rows(batch_size)
    nats = np.zeros(len(texts))
    for done in range(0, len(order), batch_size):
        chosen = order[done : done + batch_size]
        parts = [np.concatenate(texts[i])[-size - 1 :] for i in chosen]
        length = bucket(max(map(len, parts)) - 1, size)
        batch, weights = (
            np.zeros((batch_size, length + 1), "i4"),
            np.zeros((batch_size, length), "f4"),
        )
        for row, (i, part) in enumerate(zip(chosen, parts, strict=True)):
            batch[row, : len(part)] = part
            # Those that predict the ending; its first token needs one before it.
            weights[row, max(0, len(part) - len(texts[i][1]) - 1) : len(part) - 1] = 1
        sums, _ = losses(batch[ours], weights[ours])
        nats[chosen] = sums[: len(chosen)]
        progress(min(done + batch_size, len(order)), len(order))
    return nats.reshape(len(questions), ENDINGS)


def accuracies(losses: np.ndarray, questions: list[Question]) -> tuple[float, float]:
    """(acc, acc_norm) of `ending_losses`, see `HellaSwagResult`."""
    labels = np.array([q.label for q in questions])
    lengths = np.array([[len(ending) for ending in q.endings] for q in questions])
    total, per_token = losses.argmin(-1), (losses / lengths).argmin(-1)
    return float((total == labels).mean()), float((per_token == labels).mean())
