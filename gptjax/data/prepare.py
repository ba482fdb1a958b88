"""Text into token files, in one streaming pass over any amount of text (see `token_files`)."""

import hashlib
import itertools
import json
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from gptjax import files
from gptjax.config import DataConfig
from gptjax.data import tokenizers, writing
from gptjax.data.corpus import Corpus
from gptjax.data.token_files import read_tokenizer
from gptjax.data.tokenizers import (
    END_OF_TEXT,
    BpeTokenizer,
    CharTokenizer,
    Gpt2Tokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from gptjax.data.writing import Record, Writer
from gptjax.errors import RunError, UserError

SENTENCEPIECE_SAMPLE = 10_000_000
"""Characters, taken evenly from the whole text, that sentencepiece learns from at most."""

IN_FLIGHT = min(8, 2 * (os.cpu_count() or 1))
"""Pieces (of about a megabyte) that are encoded at the same time."""


def prepare(
    config: DataConfig,
    out: Path,
    console: Console,
    tokenizer: Tokenizer | None = None,
    shard_tokens: int | None = None,
) -> None:
    """Tokenise `config.source` into the new folder `out`, which appears only when it is complete.
    Uses `tokenizer` if given, else makes one of the kind that `config` names. `shard_tokens`: at
    most so many tokens in a file; None: all of a split in one. Memory stays within a few hundred
    megabytes, however long the text. Progress and a summary go to `console`.

    Raises UserError if the text is bad, `out` exists, or the vocabulary size does not suit the
    text; RunError if the folder cannot be written (a full disk).
    """
    if files.is_remote(out):
        raise UserError(
            f"{out}: data sets are written to disk; name a folder on this machine, and copy it"
            " there (gcloud storage cp -r)"
        )
    if out.exists():
        raise UserError(f"{out} exists already; choose another folder or delete it")
    texts = corpora(config)
    for text in texts:
        if how := text.describe():
            console.print(how)
    try:
        with (
            files.new_folder(out, goes_on=True) as folder,
            Progress(console=console, disable=not console.is_terminal) as progress,
        ):
            meta = _prepare_into(folder, config, texts, progress, tokenizer, shard_tokens)
    except OSError as error:
        if out.exists():
            return  # another process of this run made the same set meanwhile
        raise RunError(f"cannot write {out}: {error.strerror}") from None
    meta["source"] = " and ".join(map(str, config.sources))
    console.print(
        "prepared {characters:,} characters of {source} as {train_tokens:,} training and"
        " {val_tokens:,} validation tokens ({tokenizer}, {vocab_size:,} ids)".format(**meta)
    )


def _prepare_into(
    folder: Path,
    config: DataConfig,
    texts: Sequence[Corpus],
    progress: Progress,
    tokenizer: Tokenizer | None,
    shard_tokens: int | None,
) -> dict[str, Any]:
    """Write the files of a set; what its meta.json holds."""
    held_out = _held_out(config)
    settled = [_recipe(config, texts, held_out, tokenizer), shard_tokens]
    recipe = hashlib.sha256(json.dumps(settled).encode())
    record = writing.load(folder, recipe.hexdigest())
    tokenizer = read_tokenizer(folder) if record else tokenizer or given_tokenizer(config)
    marks_ends = tokenizer.eot is not None if tokenizer else config.tokenizer != "char"
    separator = None if marks_ends else "\n"

    def pieces(of: Corpus, description: str, total: int | None) -> Iterator[str | None]:
        task = progress.add_task(description, total=total)
        for piece in of.pieces(separator):
            yield piece
            progress.advance(task, len(piece or ""))
        progress.update(task, total=total or 1, completed=total or 1)

    shares: list[int | None] = [None] * len(texts)
    totals: list[int | None] = [text.size for text in texts]
    if held_out:
        texts, shares, totals = [*texts, held_out], [*shares, 0], [*totals, held_out.size]
    if record:
        progress.console.print(f"going on after {record.characters:,} characters, where it stopped")
    elif tokenizer is None or (config.val_fraction and not held_out):
        reading = [
            pieces(text, "reading the text", total)
            for text, total in zip(texts, totals, strict=True)
        ]
        size = None if None in totals else sum(filter(None, totals))
        found, tokenizer = _survey(config, reading, size, tokenizer)
        totals = [*found]
        if not held_out:
            shares = [int(characters * (1 - config.val_fraction)) for characters in found]
    assert tokenizer
    record = record or Record(recipe.hexdigest(), totals, shares)
    (folder / "tokenizer.json").write_text(tokenizers.to_json(tokenizer))
    dtype = np.dtype("<u2" if tokenizer.n_vocab <= 2**16 else "<u4")
    with (
        Writer(folder, "train", dtype, shard_tokens, record.train) as train,
        Writer(folder, "val", dtype, shard_tokens, record.val) as val,
    ):
        while record.text < len(texts):
            part = pieces(
                texts[record.text], f"tokenising ({tokenizer.kind})", record.totals[record.text]
            )
            share = record.shares[record.text]
            left = math.inf if share is None else share
            left -= sum(len(piece or "") for piece in itertools.islice(part, record.pieces))
            for piece, ids, held in _encode(part, left, tokenizer):
                train.write(ids)
                val.write(held)
                record.pieces += 1
                record.characters += len(piece or "")
                record.marks += (piece or "").count(END_OF_TEXT)
                if record.is_due:
                    record.save(folder, train, val)
            record.counts.append(train.written - sum(record.counts))
            record.text, record.pieces = record.text + 1, 0
    (folder / writing.RECORD).unlink(missing_ok=True)
    if record.marks:
        progress.console.print(
            f"note: the text has {END_OF_TEXT} in {record.marks:,} places, as characters;"
            f" --data.end-of-text '{END_OF_TEXT}' makes them ends of documents"
        )
    n_val = val.written
    validates = held_out is not None or config.val_fraction > 0
    if min(train.written, n_val if validates else 2) < 2:
        raise UserError(
            f"{' and '.join(map(str, config.sources))} gives {train.written} training and"
            f" {n_val} validation tokens; expected at least 2 of each: use more text or another"
            " val_fraction"
        )
    meta: dict[str, Any] = {
        "source": None if config.mix else config.source,
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.n_vocab,
        "dtype": dtype.name,
        "characters": record.characters,
        "train_tokens": train.written,
        "val_tokens": n_val,
    }
    if shard_tokens:
        meta["shard_tokens"] = shard_tokens
    if config.mix:
        meta["parts"] = [*zip(config.sources, record.counts, strict=False)]
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return meta


def _survey(
    config: DataConfig,
    texts: Sequence[Iterator[str | None]],
    size: int | None,
    tokenizer: Tokenizer | None,
) -> tuple[list[int], Tokenizer]:
    """Read all texts once: (the characters of each, `tokenizer` or a new one for them)."""
    kind = None if tokenizer else config.tokenizer
    characters, alphabet, sample, taken = [0] * len(texts), set[str](), list[str](), 0
    # The sample takes an equal share of every part of the text: the beginning of each long piece,
    # and one in so many short pieces, whole.
    share, owed = min(1.0, SENTENCEPIECE_SAMPLE / max(1, size or 0)), 0.0
    for number, piece in ((number, piece) for number, text in enumerate(texts) for piece in text):
        piece = piece or ""
        characters[number] += len(piece)
        if kind == "char":
            alphabet.update(piece)
        elif kind in ("sentencepiece", "bpe"):
            owed += len(piece) * share
            if piece and owed >= min(len(piece), 1000):
                sample.append(piece[: math.ceil(owed)])
                owed -= len(sample[-1])
                taken += len(sample[-1])
                if taken > 2 * SENTENCEPIECE_SAMPLE:  # of a text whose size was not known
                    sample, share = sample[::2], share / 2
                    taken = sum(map(len, sample))
    if kind == "char":
        tokenizer = CharTokenizer("".join(sorted(alphabet)))
    elif kind == "sentencepiece":
        tokenizer = SentencePieceTokenizer.train(sample, config.sentencepiece_vocab_size)
    elif kind == "bpe":
        tokenizer = BpeTokenizer.train(sample, config.bpe_vocab_size, config.special_tokens)
    assert tokenizer
    return characters, tokenizer


def given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """One that needs no text to be made. UserError: it cannot be read."""
    if config.tokenizer == "gpt2":
        return Gpt2Tokenizer(added=config.special_tokens)
    if config.tokenizer != "json":
        return None
    if config.tokenizer_file is None:
        raise UserError("data.tokenizer json takes a file: --data.tokenizer-file tokenizer.json")
    path = files.path(config.tokenizer_file)
    content = files.read_text(path)
    try:
        return JsonTokenizer(content)
    except ValueError as error:
        raise UserError(f"{path} (data.tokenizer_file) cannot be used: {error}") from None


def corpora(config: DataConfig) -> list[Corpus]:
    """The texts to train on. Raises UserError: one is not there."""
    return [Corpus(source, config.text_field, config.end_of_text) for source in config.sources]


def _held_out(config: DataConfig) -> Corpus | None:
    """The text for validation, where that is one of its own."""
    if config.val_source is None:
        return None
    return Corpus(config.val_source, config.text_field, config.end_of_text)


def make_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that `prepare` would make for this text. Raises as `prepare`."""
    if given := given_tokenizer(config):
        return given
    held_out = _held_out(config)
    texts = [*corpora(config), *([held_out] if held_out else [])]
    sizes = [text.size for text in texts]
    size = None if None in sizes else sum(filter(None, sizes))
    return _survey(config, [text.pieces(None) for text in texts], size, None)[1]


def _encode(
    pieces: Iterator[str | None], n_train: float, tokenizer: Tokenizer
) -> Iterator[tuple[str | None, np.ndarray, np.ndarray]]:
    """Each piece with its ids (for training, for validation): the first `n_train` characters are
    for training, as in nanoGPT. On all cores: tiktoken and sentencepiece release the GIL."""
    none = np.zeros(0, np.int32)

    def encode(piece: str | None, left: float) -> tuple[str | None, np.ndarray, np.ndarray]:
        """`left`: so many more characters are for training."""
        if piece is None:
            end = np.array([tokenizer.eot], np.int32)
            return (None, end, none) if left > 0 else (None, none, end)
        cut = int(max(0, min(left, len(piece))))
        return piece, tokenizer.encode(piece[:cut]), tokenizer.encode(piece[cut:])

    left, pending = n_train, deque[Future[tuple[str | None, np.ndarray, np.ndarray]]]()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for piece in pieces:
            pending.append(pool.submit(encode, piece, left))
            left -= len(piece or "")
            if len(pending) > IN_FLIGHT:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def default_name(config: DataConfig) -> str:
    """NAME-TOKENIZER, the readable part of `default_dir`."""
    name = "+".join(Path(source or "").stem or "text" for source in config.sources)
    name = f"{name}-{config.tokenizer}"
    if config.tokenizer == "sentencepiece":
        name += str(config.sentencepiece_vocab_size)
    elif config.tokenizer == "bpe":
        name += str(config.bpe_vocab_size)
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def default_dir(config: DataConfig, tokenizer: Tokenizer | None = None) -> Path:
    """data/NAME-TOKENIZER-DIGEST: another text, setting or given tokenizer has another folder.
    Raises UserError if there is no text."""
    recipe = json.dumps(_recipe(config, corpora(config), _held_out(config), tokenizer))
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:8]
    return Path("data") / f"{default_name(config)}-{digest}"


def _recipe(
    config: DataConfig,
    texts: Sequence[Corpus],
    held_out: Corpus | None,
    tokenizer: Tokenizer | None,
) -> list[Any]:
    """All that decides on a set's tokens, as JSON values."""
    (what, *how), *others = (text.identity() for text in texts)
    recipe: list[Any] = [config.tokenizer, config.val_fraction, what]
    if tokenizer:
        recipe.append(tokenizer.state())
    elif config.tokenizer == "sentencepiece":
        recipe.append(config.sentencepiece_vocab_size)
    elif config.tokenizer == "bpe":
        recipe.append(config.bpe_vocab_size)
    elif given := config.tokenizer_file and given_tokenizer(config):
        recipe.append(given.state())
    recipe += [*how, *others]
    if config.special_tokens:
        recipe.append({"special": config.special_tokens})
    if held_out:
        recipe += ["validation", *held_out.identity()]
    return recipe


def is_made_with(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether `folder` is a prepared set that this very tokenizer made."""
    found = folder.is_dir() and read_tokenizer(folder)
    return bool(found and found.state() == tokenizer.state())
