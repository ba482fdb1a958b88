"""How well does a run predict a text, or finish sentences?

    python -m gptjax.evaluate RUN_DIR --text FILE | --split val | --hellaswag FILE

Over all devices. Losses are in nats per token; bits per character and per byte compare models with
different tokenizers.
"""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from gptjax import (
    checkpoint,
    cli,
    corpus,
    data,
    parallel,
    tokenizers,
    train,
)
from gptjax.config import LARGEST, DeviceKind, ModelConfig
from gptjax.errors import UserError
from gptjax.generate import bucket
from gptjax.model import apply
from gptjax.tokenizers import Tokenizer

ENDINGS = 4
"""HellaSwag's choices per sentence."""


class Text(NamedTuple):
    """What is to be predicted: every token but the first."""

    tokens: np.ndarray
    """int [n]."""
    characters: int
    """Of what is predicted."""
    bytes: int
    """The same in UTF-8."""


def read_text(source: str, tokenizer: Tokenizer) -> Text:
    """The documents of a file, folder or glob, end to end; between them stands the end-of-text
    token where the tokenizer has one, else a line end.

    Raises:
        UserError: it cannot be read, or holds characters that the tokenizer does not know.
    """
    pieces, joint = [], "\n" if tokenizer.eot is None else None
    characters = size = 0
    for number, document in enumerate(corpus.read_documents(corpus.find_files(source))):
        if number:
            pieces.append(np.array([tokenizer.eot]) if joint is None else tokenizer.encode(joint))
            characters, size = characters + len(joint or ""), size + len(joint or "")
        for piece in document:
            pieces.append(tokenizer.encode(piece))
            characters, size = characters + len(piece), size + len(piece.encode())
    tokens = np.concatenate(pieces)
    first = tokenizer.decode(tokens[:1])
    return Text(tokens, characters - len(first), size - len(first.encode()))


def read_split(folder: Path, split: Literal["train", "val"], tokenizer: Tokenizer) -> Text:
    """A split of the run's own data.

    Raises:
        UserError: the data are no longer there, or have another tokenizer.
    """
    if not folder.exists():
        raise UserError(f"the run's data are no longer at {folder}; name a text with --text")
    dataset = data.load(folder)
    if dataset.tokenizer.state() != tokenizer.state():
        raise UserError(f"{folder} was made with another tokenizer than the run's")
    tokens = getattr(dataset, split)
    text = tokenizer.decode(tokens[1:].tolist())
    return Text(tokens, len(text), len(text.encode()))


def windows_of(n_tokens: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first): predict tokens [first, end) from windows [start, end), so that each
    token but the first is predicted once, and all but the first window's have at least
    `block_size - stride` tokens before them."""
    first = 1
    for start in range(0, n_tokens - 1, stride):
        end = min(start + block_size + 1, n_tokens)
        if end > first:
            yield start, end, first
        first = end


def text_loss(
    params: Any,
    tokens: np.ndarray,
    config: ModelConfig,
    *,
    stride: int,
    rows: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, int]:
    """(nats in all, tokens predicted).

    Args:
        params: stacked over the devices, as `parallel.replicate` makes them.
        stride: tokens from one window to the next, in [1, block_size]; block_size is the exact
            loss over windows that do not overlap, less gives tokens more context.
        rows: windows at a time, over all devices.
    """
    step = parallel.map_eval_step(functools.partial(train.eval_step, config=config))
    block = config.block_size
    todo = list(windows_of(len(tokens), block, stride))
    mine = parallel.host_rows(rows)
    loss = count = 0.0
    for at in range(0, len(todo), rows):
        batch = np.zeros((rows, block + 1), np.int32)
        weights = np.zeros((rows, block), np.float32)
        for row, (start, end, first) in enumerate(todo[at : at + rows]):
            batch[row, : end - start] = tokens[start:end]
            weights[row, first - start - 1 : end - start - 1] = 1
        share = (parallel.split_rows(part[mine], 1)[:, 0] for part in (batch, weights))
        sums = step(params, *share)
        got = parallel.fetch({"loss": sums[0], "count": sums[1]})
        loss, count = loss + got["loss"], count + got["count"]
        progress(min(at + rows, len(todo)), len(todo))
    return loss, int(count)


# ------------------------------------------------------------------------------- HellaSwag


class Question(NamedTuple):
    """One sentence to finish."""

    context: np.ndarray
    endings: tuple[np.ndarray, ...]
    label: int


def read_hellaswag(path: Path, tokenizer: Tokenizer) -> list[Question]:
    """The public jsonl format (Zellers et al., arXiv:1905.07830): `ctx`, four `endings`, `label`.

    Context and ending are encoded apart, with a space between them that belongs to the ending.

    Raises:
        UserError: a line is not of that form.
    """
    questions = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"cannot read {path}: {reason}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            context, endings, label = row["ctx"], row["endings"], int(row["label"])
            if len(endings) != ENDINGS or not 0 <= label < ENDINGS or not context:
                raise ValueError
            encoded = tuple(tokenizer.encode(" " + ending) for ending in endings)
            questions.append(Question(tokenizer.encode(context), encoded, label))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}, line {number} is not HellaSwag's: expected `ctx`, four `endings` and a"
                " `label` from 0 to 3"
            ) from None
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    if not questions:
        raise UserError(f"{path} is empty; expected one JSON object a line")
    return questions


def row_losses(
    params: Any, windows: jax.Array, weights: jax.Array, config: ModelConfig, axis_name: str
) -> jax.Array:
    """float32 [rows of all devices]: the weighted sum of nats of each of this device's windows
    [b, T + 1], gathered from all."""
    logits, _ = apply(config, params, windows[:, :-1])
    sums = (train.cross_entropy(logits, windows[:, 1:]) * weights).sum(-1)
    return jax.lax.all_gather(sums, axis_name, tiled=True)


def hellaswag_losses(
    params: Any,
    questions: list[Question],
    config: ModelConfig,
    *,
    rows: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """float64 [questions, 4]: nats of each ending after its context. Where both do not fit the
    block, the context loses its beginning."""
    step = parallel.map_eval_step(functools.partial(row_losses, config=config))
    texts = [(q.context, ending) for q in questions for ending in q.endings]
    longest = config.block_size + 1
    # Alike lengths together, so that little is padding.
    order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
    mine = parallel.host_rows(rows)
    losses = np.zeros(len(texts))
    for at in range(0, len(order), rows):
        chosen = order[at : at + rows]
        length = bucket(min(longest, sum(map(len, texts[chosen[-1]]))) - 1, config.block_size)
        batch = np.zeros((rows, length + 1), np.int32)
        weights = np.zeros((rows, length), np.float32)
        for row, i in enumerate(chosen):
            context, ending = texts[i]
            whole = np.concatenate([context, ending])[-longest:]
            batch[row, : len(whole)] = whole
            weights[row, max(0, len(whole) - 1 - len(ending)) : len(whole) - 1] = 1
        share = (parallel.split_rows(part[mine], 1)[:, 0] for part in (batch, weights))
        sums = parallel.first_copy(step(params, *share))
        losses[chosen] = np.asarray(sums)[: len(chosen)]
        progress(min(at + rows, len(order)), len(order))
    return losses.reshape(len(questions), ENDINGS)


def accuracies(losses: np.ndarray, questions: list[Question]) -> tuple[float, float]:
    """(share of questions whose likeliest ending is the right one, the same by likelihood per
    token of the ending)."""
    labels = np.array([q.label for q in questions])
    lengths = np.array([[len(ending) for ending in q.endings] for q in questions])
    plain, normalised = losses.argmin(-1), (losses / lengths).argmin(-1)
    return float((plain == labels).mean()), float((normalised == labels).mean())


# -------------------------------------------------------------------------------- command


@dataclasses.dataclass(frozen=True)
class EvaluateFlags:
    """Evaluate a run on a text, on its own data, or on HellaSwag."""

    text: str | None = None
    """A .txt or .jsonl file, a folder or a glob."""
    split: Literal["train", "val"] | None = None
    """A split of the data that the run was trained on."""
    hellaswag: str | None = None
    """A file in HellaSwag's jsonl format."""
    stride: int | None = None
    """Tokens from one window to the next. None: block_size, windows that do not overlap; less
    takes longer and gives tokens more context."""
    checkpoint: str = "best"
    """best (lowest validation loss), latest, or a step."""
    batch_size: int = 8
    """Windows at a time, over all devices."""
    device: DeviceKind = "auto"
    """Kind of device to run on."""
    num_devices: int | None = None
    """CPU devices to split this machine's cores into. None: as in training."""

    def problems(self) -> list[str]:
        """Each setting that is out of range, in words."""
        out = []
        if sum(value is not None for value in (self.text, self.split, self.hellaswag)) != 1:
            out.append("on what? give one of --text, --split and --hellaswag")
        for name in ("stride", "batch_size", "num_devices"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < LARGEST:
                out.append(f"--{name.replace('_', '-')} {value} must be at least 1")
        return out


def main(argv: list[str]) -> None:
    """`python -m gptjax.evaluate RUN_DIR [flags]`."""
    named, flags = cli.parse(EvaluateFlags(), argv, "python -m gptjax.evaluate", "RUN_DIR")
    if not named:
        raise UserError("which run? python -m gptjax.evaluate RUN_DIR")
    run_dir = Path(named[0])
    facts = checkpoint.newest_facts(run_dir)
    size = facts.config.model.num_parameters(embeddings=False) if facts else 0
    parallel.start(flags.device, flags.num_devices, size, flags.batch_size)
    parallel.use_compilation_cache(corpus.cache_dir() / "xla")
    devices = parallel.device_count()
    if flags.batch_size % devices:
        raise UserError(f"--batch-size {flags.batch_size} does not divide over {devices} devices")

    step, facts, params = checkpoint.load(run_dir, flags.checkpoint, parallel.one_per_host())
    config = facts.config.model
    stride = flags.stride or config.block_size
    if stride > config.block_size:
        raise UserError(f"--stride {stride} exceeds the block_size {config.block_size}")
    tokenizer = tokenizers.from_json(facts.tokenizer, named[0])
    where = f"{run_dir}, step {step}"
    if flags.hellaswag:
        questions = read_hellaswag(Path(flags.hellaswag), tokenizer)
        losses = hellaswag_losses(
            parallel.replicate(params), questions, config, rows=flags.batch_size, progress=_progress
        )
        plain, normalised = accuracies(losses, questions)
        say = (
            f"{where} on {flags.hellaswag}: {len(questions):,} questions\n"
            f"accuracy                 {plain:.4f}\n"
            f"accuracy, per token      {normalised:.4f}"
        )
    else:
        if flags.text:
            text = read_text(flags.text, tokenizer)
        elif facts.config.data.dir is None:
            raise UserError(f"{run_dir} has no data of its own; name a text with --text")
        else:
            assert flags.split is not None
            text = read_split(Path(facts.config.data.dir), flags.split, tokenizer)
        if len(text.tokens) < 2:
            raise UserError("the text is one token; nothing can be predicted in it")
        loss, count = text_loss(
            parallel.replicate(params), text.tokens, config, stride=stride, rows=flags.batch_size,
            progress=_progress,
        )  # fmt: skip
        bits = loss / math.log(2)
        say = (
            f"{where} on {flags.text or f'the {flags.split} split'}: {count:,} tokens predicted in"
            f" windows of {config.block_size}, {stride} apart\n"
            f"loss                {loss / count:.4f} nats per token\n"
            f"perplexity          {math.exp(min(700.0, loss / count)):.4f}\n"
            f"bits per character  {bits / text.characters:.4f}\n"
            f"bits per byte       {bits / text.bytes:.4f}"
        )
    if parallel.is_main_host():
        print(say)


def _progress(done: int, total: int) -> None:
    if parallel.is_main_host():
        cli.status(f"{done:,} of {total:,}" if done < total else "")


if __name__ == "__main__":
    sys.exit(cli.run(main))
