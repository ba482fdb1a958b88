"""Text into token files, in one streaming pass over any amount of text (see `token_files`)."""

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gptjax import files
from gptjax.config import DataConfig
from gptjax.data import tokenizers
from gptjax.data.corpus import find_files, read_pieces
from gptjax.data.token_files import SPLITS, read_tokenizer
from gptjax.data.tokenizers import (
    CharTokenizer,
    Gpt2Tokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from gptjax.errors import RunError, UserError

SENTENCEPIECE_SAMPLE = 10_000_000
"""Characters, taken evenly from the whole text, that sentencepiece learns from at most."""

IN_FLIGHT = min(8, 2 * (os.cpu_count() or 1))
"""Pieces (of about a megabyte) that are encoded at the same time."""


def prepare(
    config: DataConfig, out: Path, console: Console, tokenizer: Tokenizer | None = None
) -> None:
    """Tokenise `config.source` into the new folder `out`, which appears only when it is complete.
    Uses `tokenizer` if given, else makes one of the kind that `config` names. Memory stays within
    a few hundred megabytes, however long the text. Progress and a summary go to `console`.

    Raises:
        UserError: the text is bad, `out` exists, or the vocabulary size does not suit the text.
        RunError: the folder cannot be written (a full disk).
    """
    if files.is_remote(out):
        raise UserError(f"{out}: data sets are written to disk; name a folder on this machine")
    if out.exists():
        raise UserError(f"{out} exists already; choose another folder or delete it")
    paths = find_files(config.source)
    try:
        with files.new_folder(out) as folder:
            _prepare_into(folder, config, paths, console, tokenizer)
    except OSError as error:
        if out.exists():
            return  # another process of this run made the same set meanwhile
        raise RunError(f"cannot write {out}: {error.strerror}") from None


def _prepare_into(
    folder: Path,
    config: DataConfig,
    paths: list[Path],
    console: Console,
    tokenizer: Tokenizer | None,
) -> None:
    size = sum(path.stat().st_size for path in paths)
    kind = tokenizer.kind if tokenizer else config.tokenizer
    separator = "\n" if kind == "char" else None
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        reading = progress.add_task("reading the text", total=size)
        characters, tokenizer = _survey(
            config, read_pieces(paths, separator), size, tokenizer,
            lambda n: progress.advance(reading, n),
        )  # fmt: skip
        progress.update(reading, completed=size)
        dtype = np.dtype("<u2" if tokenizer.n_vocab <= 2**16 else "<u4")
        encoding = progress.add_task(f"tokenising ({tokenizer.kind})", total=characters)
        tokens = dict.fromkeys(SPLITS, 0)
        with (folder / "train.bin").open("wb") as train, (folder / "val.bin").open("wb") as val:
            n_train = int(characters * (1 - config.val_fraction))
            parts = _split(read_pieces(paths, separator), n_train)
            for split, done, ids in _encode_in_order(parts, tokenizer):
                (train if split == "train" else val).write(ids.astype(dtype).tobytes())
                tokens[split] += len(ids)
                progress.advance(encoding, done)
            for file in (train, val):
                file.flush()
                os.fsync(file.fileno())
    if min(tokens.values()) < 2:
        raise UserError(
            f"{config.source} gives {tokens['train']} training and {tokens['val']} validation"
            " tokens; expected at least 2 of each: use more text or another val_fraction"
        )
    meta = {
        "source": config.source,
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.n_vocab,
        "dtype": dtype.name,
        "characters": characters,
        "train_tokens": tokens["train"],
        "val_tokens": tokens["val"],
    }
    (folder / "tokenizer.json").write_text(tokenizers.to_json(tokenizer))
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    console.print(
        f"prepared {characters:,} characters of {config.source} as {tokens['train']:,} training and"
        f" {tokens['val']:,} validation tokens ({tokenizer.kind}, {tokenizer.n_vocab:,} ids)",
        highlight=False,
        soft_wrap=True,
    )


def _survey(
    config: DataConfig,
    pieces: Iterator[str | None],
    size: int,
    tokenizer: Tokenizer | None,
    advance: Callable[[int], None],
) -> tuple[int, Tokenizer]:
    """Read all of the text once: (its characters, `tokenizer` or a new one for this text)."""
    kind = None if tokenizer else config.tokenizer
    characters, alphabet, sample = 0, set[str](), list[str]()
    # The sample takes an equal share of every part of the text: the beginning of each long piece,
    # and one in so many short pieces, whole.
    share, owed = min(1.0, SENTENCEPIECE_SAMPLE / max(1, size)), 0.0
    for piece in pieces:
        piece = piece or ""
        characters += len(piece)
        advance(len(piece))
        if kind == "char":
            alphabet.update(piece)
        elif kind == "sentencepiece":
            owed += len(piece) * share
            if piece and owed >= min(len(piece), 1000):
                sample.append(piece[: math.ceil(owed)])
                owed -= len(sample[-1])
    if kind == "char":
        tokenizer = CharTokenizer("".join(sorted(alphabet)))
    elif kind == "sentencepiece":
        tokenizer = SentencePieceTokenizer.train(sample, config.sentencepiece_vocab_size)
    return characters, tokenizer or Gpt2Tokenizer()


def _split(pieces: Iterator[str | None], n_train: int) -> Iterator[tuple[str, str | None]]:
    """(split, piece): the first `n_train` characters are for training, as in nanoGPT."""
    for piece in pieces:
        if piece is None or len(piece) <= n_train or n_train <= 0:
            yield ("train" if n_train > 0 else "val"), piece
        else:
            yield "train", piece[:n_train]
            yield "val", piece[n_train:]
        n_train -= len(piece or "")


def _encode_in_order(
    parts: Iterator[tuple[str, str | None]], tokenizer: Tokenizer
) -> Iterator[tuple[str, int, np.ndarray]]:
    """(split, characters, ids), in order, encoded on all cores: tiktoken and sentencepiece release
    the GIL."""

    def encode(split: str, piece: str | None) -> tuple[str, int, np.ndarray]:
        if piece is None:
            return split, 0, np.array([tokenizer.eot], dtype=np.int32)
        return split, len(piece), tokenizer.encode(piece)

    pending: deque[Future[tuple[str, int, np.ndarray]]] = deque()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for split, piece in parts:
            pending.append(pool.submit(encode, split, piece))
            if len(pending) > IN_FLIGHT:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def default_name(config: DataConfig) -> str:
    """NAME-TOKENIZER, the readable part of `default_dir`."""
    name = f"{Path(config.source or '').stem or 'text'}-{config.tokenizer}"
    if config.tokenizer == "sentencepiece":
        name += str(config.sentencepiece_vocab_size)
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def default_dir(config: DataConfig, tokenizer: Tokenizer | None = None) -> Path:
    """data/NAME-TOKENIZER-DIGEST: another text, setting or given tokenizer has another folder.

    Raises:
        UserError: there is no text.
    """
    stats = [(p, p.stat()) for p in find_files(config.source)]
    recipe: list[Any] = [config.tokenizer, config.val_fraction]
    recipe.append([(str(p.resolve()), stat.st_size, stat.st_mtime_ns) for p, stat in stats])
    if tokenizer:
        recipe.append(tokenizer.state())
    elif config.tokenizer == "sentencepiece":
        recipe.append(config.sentencepiece_vocab_size)
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]
    return Path("data") / f"{default_name(config)}-{digest}"


def is_made_with(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether `folder` is a prepared set that this very tokenizer made."""
    found = folder.is_dir() and read_tokenizer(folder)
    return bool(found and found.state() == tokenizer.state())
