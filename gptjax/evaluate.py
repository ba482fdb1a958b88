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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

from gptjax import (
    checkpoint,
    cli,
    corpus,
    data,
    devices,
    parallel,
    tokenizers,
    train,
)
from gptjax.checkpoint import Facts
from gptjax.config import LARGEST, DeviceKind, ModelConfig
from gptjax.data import Tokens
from gptjax.errors import UserError
from gptjax.generate import bucket
from gptjax.places import place
from gptjax.tokenizers import Tokenizer

ENDINGS = 4
"""HellaSwag's choices per sentence."""

DECODED = 1 << 20
"""Tokens that are turned into text at a time, to count characters."""


Losses = Callable[..., tuple[np.ndarray, int]]
"""`train.eval_step` as a `parallel.Strategy` maps it, with the parameters given: (this host's
windows and weights, its stop signal or 0) -> (nats of every host's rows, the largest signal)."""


class Text(NamedTuple):
    """What is to be predicted: every token but the first."""

    tokens: Tokens
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
    pieces: list[np.ndarray] = []
    joint = "\n" if tokenizer.eot is None else None
    characters = size = 0
    for number, document in enumerate(corpus.read_documents(corpus.find_files(source))):
        if number:
            pieces.append(np.array([tokenizer.eot]) if joint is None else tokenizer.encode(joint))
            characters, size = characters + len(joint or ""), size + len(joint or "")
        for piece in document:
            pieces.append(tokenizer.encode(piece))
            characters, size = characters + len(piece), size + len(piece.encode())
    return _predicted(np.concatenate(pieces), characters, size, tokenizer)


def read_split(
    folder: Path, split: Literal["train", "val"], tokenizer: Tokenizer, fingerprint: str | None
) -> Text:
    """A split of the run's own data.

    Raises:
        UserError: the data are no longer there, or are others now.
    """
    if not folder.exists():
        raise UserError(f"the run's data are no longer at {folder}; name a text with --text")
    dataset = data.load(folder)
    if dataset.fingerprint != fingerprint:
        raise UserError(f"the tokens in {folder} are not those of the run; name a text with --text")
    tokens = getattr(dataset, split)
    return _predicted(tokens, *_spelled(tokens, tokenizer), tokenizer)


def _predicted(tokens: Tokens, characters: int, size: int, tokenizer: Tokenizer) -> Text:
    """Less the first token's text, unless that ends with half a character."""
    first = tokenizer.decode(tokens[:1].tolist()) if tokens[:1] != tokenizer.eot else ""
    first = "" if first.endswith("\ufffd") else first
    return Text(tokens, characters - len(first), size - len(first.encode()))


def _spelled(tokens: Tokens, tokenizer: Tokenizer) -> tuple[int, int]:
    """(characters, bytes) of the text, without end-of-text tokens, a part at a time."""
    characters = size = at = 0
    while at < len(tokens):
        end = min(at + DECODED, len(tokens))
        while True:
            part = tokens[at:end]
            text = tokenizer.decode(part[part != tokenizer.eot].tolist())
            # A character's bytes may be spread over tokens: do not cut it.
            if end == len(tokens) or not text.endswith("\ufffd") or end - at > DECODED + 8:
                break
            end += 1
        characters, size, at = characters + len(text), size + len(text.encode()), end
    return characters, size


def span_loss(
    losses: Losses,
    tokens: Tokens,
    some: Sequence[data.Span],
    config: ModelConfig,
    rows: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], int] = lambda: 0,
) -> tuple[float, int] | None:
    """(nats in all, tokens predicted); None where a host's `stop` is no longer 0.

    Args:
        some: of `data.spans`.
        rows: windows at a time, over all devices.
    """
    mine = parallel.host_rows(rows)
    loss, count = 0.0, 0
    for at in range(0, len(some), rows):
        windows, weights = data.windows_at(tokens, some[at : at + rows], config.block_size, rows)
        data.check_ids(windows, config.vocab_size)
        sums, stopped = losses(windows[mine], weights[mine], stop())
        if stopped:
            return None
        loss, count = loss + float(sums.sum(dtype=np.float64)), count + int(weights.sum())
        progress(min(at + rows, len(some)), len(some))
    return loss, count


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
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"cannot read {path}: {reason}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            context, endings, label = row["ctx"], row["endings"], int(str(row["label"]))
            if not isinstance(endings, list) or len(endings) != ENDINGS:
                raise ValueError
            if not 0 <= label < ENDINGS or not context:
                raise ValueError
            encoded = tuple(tokenizer.encode(" " + ending) for ending in endings)
            questions.append(Question(tokenizer.encode(context), encoded, label))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"{path}, line {number} is not HellaSwag's: expected `ctx`, four `endings` and a"
                " `label` from 0 to 3"
            ) from None
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    if not questions:
        raise UserError(f"{path} is empty; expected one JSON object a line")
    return questions


def hellaswag_losses(
    losses: Losses,
    questions: list[Question],
    config: ModelConfig,
    *,
    rows: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """float64 [questions, 4]: nats of each ending after its context. Where both do not fit the
    block, the context loses its beginning.

    Raises:
        UserError: an ending alone does not fit the block.
    """
    too_long = [e for q in questions for e in q.endings if len(e) > config.block_size]
    if too_long:
        raise UserError(
            f"{len(too_long)} endings are longer than the model's block_size {config.block_size}"
            f" (the longest has {max(map(len, too_long))} tokens)"
        )
    texts = [(q.context, ending) for q in questions for ending in q.endings]
    longest = config.block_size + 1
    # Alike lengths together, so that little is padding.
    order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
    mine = parallel.host_rows(rows)
    found = np.zeros(len(texts))
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
        sums, _ = losses(batch[mine], weights[mine])
        found[chosen] = sums[: len(chosen)]
        progress(min(at + rows, len(order)), len(order))
    return found.reshape(len(questions), ENDINGS)


def accuracies(losses: np.ndarray, questions: list[Question]) -> tuple[float, float]:
    """(acc, acc_norm): the share of questions whose likeliest ending is the right one, and the same
    by likelihood per token of the ending."""
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
    batch_size: int | None = None
    """Windows at a time, over all devices. None: 8, or more where there are more devices."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What to compute in; float32 is at the highest precision of matrix products."""
    device: DeviceKind = "auto"
    """Kind of device to run on."""
    num_devices: int | None = None
    """CPU devices to split this machine's cores into. None: as in training."""

    def problems(self) -> list[str]:
        """Each setting that is out of range, in words."""
        out = []
        if sum(value is not None for value in (self.text, self.split, self.hellaswag)) != 1:
            out.append("on what? give one of --text, --split and --hellaswag")
        out += [f"--{name} is empty" for name in ("text", "hellaswag") if getattr(self, name) == ""]
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
    run_dir = place(named[0])
    newest = checkpoint.newest_facts(run_dir)
    size = newest.config.model.num_parameters(embeddings=False) if newest else 0
    devices.start(flags.device, flags.num_devices, size)
    devices.use_compilation_cache(corpus.cache_dir() / "xla")
    count = devices.device_count()
    rows = flags.batch_size or -(-8 // count) * count
    if rows % count:
        raise UserError(f"--batch-size {rows} does not divide over {count} devices")

    strategy = parallel.strategy("pmap")
    number, facts, params, _ = checkpoint.load(run_dir, flags.checkpoint, strategy.targets)
    config = dataclasses.replace(facts.config.model, dtype=flags.precision)
    if flags.stride and flags.stride > config.block_size:
        raise UserError(f"--stride {flags.stride} exceeds the block_size {config.block_size}")
    tokenizer = tokenizers.from_json(facts.tokenizer, named[0])
    highest = "highest" if flags.precision == "float32" else "default"
    on = _on_hellaswag if flags.hellaswag else _on_text
    step = strategy.map_eval_step(functools.partial(train.eval_step, config=config))
    losses = functools.partial(step, strategy.place(params))
    with jax.default_matmul_precision(highest):
        what, numbers = on(losses, facts, config, tokenizer, flags, rows)
    if devices.is_main_host():
        print(f"{run_dir}, step {number}, in {flags.precision}, on {what}\n{numbers}")


def _on_text(
    losses: Losses,
    facts: Facts,
    config: ModelConfig,
    tokenizer: Tokenizer,
    flags: EvaluateFlags,
    rows: int,
) -> tuple[str, str]:
    """(what was evaluated, the numbers)."""
    folder = facts.config.data.dir
    if flags.text:
        text = read_text(flags.text, tokenizer)
    elif folder is None:
        raise UserError("these weights have no data of their own; name a text with --text")
    else:
        split = flags.split or "val"
        text = read_split(Path(folder), split, tokenizer, facts.data_fingerprint)
    stride = flags.stride or config.block_size
    some = data.spans(len(text.tokens), config.block_size, stride=stride)
    if not some or not text.characters:
        raise UserError("the text is one token; nothing can be predicted in it")
    total = span_loss(losses, text.tokens, some, config, rows, _progress)
    assert total is not None, "nobody stops it"
    loss, count = total
    bits = loss / math.log(2)
    return (
        f"{flags.text or f'the {flags.split} split'}: {count:,} tokens predicted in windows of"
        f" {config.block_size}, {stride} apart",
        f"loss                {loss / count:.4f} nats per token\n"
        f"perplexity          {math.exp(min(700.0, loss / count)):.4f}\n"
        f"bits per character  {bits / text.characters:.4f}\n"
        f"bits per byte       {bits / text.bytes:.4f}",
    )


def _on_hellaswag(
    losses: Losses,
    facts: Facts,
    config: ModelConfig,
    tokenizer: Tokenizer,
    flags: EvaluateFlags,
    rows: int,
) -> tuple[str, str]:
    """(what was evaluated, the numbers)."""
    questions = read_hellaswag(Path(flags.hellaswag or ""), tokenizer)
    found = hellaswag_losses(losses, questions, config, rows=rows, progress=_progress)
    acc, acc_norm = accuracies(found, questions)
    return (
        f"{flags.hellaswag}: {len(questions):,} questions",
        f"acc                 {acc:.4f}\n"
        f"acc_norm            {acc_norm:.4f}  (by likelihood per token of the ending)",
    )


def _progress(done: int, total: int) -> None:
    if devices.is_main_host():
        cli.status(f"{done:,} of {total:,}" if done < total else "")


if __name__ == "__main__":
    sys.exit(cli.run(main))
