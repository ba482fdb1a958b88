"""How well a model predicts a text: loss in nats per token, and bits per character and per byte,
which compare models with different tokenizers."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from gptjax import files
from gptjax.config import ModelConfig
from gptjax.data import token_files
from gptjax.data.batches import Tokens, windows_over
from gptjax.data.corpus import Corpus
from gptjax.data.tokenizers import Tokenizer
from gptjax.devices import hosts
from gptjax.errors import UserError
from gptjax.evaluation import Losses, window_loss

READ = 1 << 20
"""Tokens that are read at a time, to count what they spell."""


class Text(NamedTuple):
    """A text to predict: every token but the first."""

    name: str
    tokens: Tokens
    """int [n]."""
    characters: int
    """Those that begin in a predicted token."""
    bytes: int
    """Of the predicted tokens, in UTF-8."""
    digest: str
    """Of the tokens."""


class TextResult(NamedTuple):
    """What `evaluate_text` measured."""

    description: str
    tokens: int
    """Number of predicted tokens."""
    loss: float
    """Mean, in nats per token."""
    bits_per_character: float
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # a larger one is no float; NaN stays

    def report(self) -> str:
        """What was evaluated, and a line for each number."""
        return (
            f"{self.description}\nloss                {self.loss:.4f} nats per token\n"
            f"perplexity          {self.perplexity:.4f}\n"
            f"bits per character  {self.bits_per_character:.4f}\n"
            f"bits per byte       {self.bits_per_byte:.4f}"
        )


def read_text(source: str, tokenizer: Tokenizer, end_of_text: str | None = None) -> Text:
    """The documents of a file, folder or glob, concatenated. Between them stands the end-of-text
    token if the tokenizer has one, else a line end. `end_of_text`: as `DataConfig`'s. UserError: it
    cannot be read, or has characters that the tokenizer does not know."""
    separator = "\n" if tokenizer.eot is None else None
    tokens = np.concatenate([
        np.array([tokenizer.eot], np.int32) if piece is None else tokenizer.encode(piece)
        for piece in Corpus(source, end_of_text=end_of_text).pieces(separator)
    ])  # fmt: skip
    return _text(source, tokens, tokenizer, hashlib.sha256(tokens.tobytes()).hexdigest())


def read_split(
    folder: Path, split: Literal["train", "val"], tokenizer: Tokenizer, fingerprint: str | None
) -> Text:
    """A split of the data that a run was trained on, which have this `fingerprint`. UserError: the
    folder is missing, or holds other tokens now."""
    if not files.sizes(folder):
        raise UserError(
            f"the run's data are no longer at {folder}; say where with --data-dir, or name a text"
            " with --text"
        )
    dataset = token_files.load(folder)
    if dataset.fingerprint != fingerprint:
        raise UserError(f"the tokens in {folder} are not those of the run; name a text with --text")
    tokens = dataset.train if split == "train" else dataset.val
    if not len(tokens):
        raise UserError("the run's data have no text for validation; name one with --text")
    return _text(f"the {split} split", tokens, tokenizer, dataset.fingerprint)


def _text(name: str, tokens: Tokens, tokenizer: Tokenizer, digest: str) -> Text:
    """The first token is not predicted; nor are its bytes, or a character that it begins."""
    return Text(name, tokens, *text_size(tokens, tokenizer, start=1), digest)


def text_size(tokens: Tokens, tokenizer: Tokenizer, start: int = 0) -> tuple[int, int]:
    """(characters that begin in them, UTF-8 bytes) of the tokens from `start` on."""
    spelled = tokenizer.token_bytes()
    # A character has one byte that is not of the form 10xxxxxx, its first.
    counts = np.array([(sum(b & 0xC0 != 0x80 for b in own), len(own)) for own in spelled])
    total = np.zeros(2, np.int64)
    for at in range(start, len(tokens), READ):
        total += counts[tokens[at : at + READ]].sum(0)
    characters, size = total.tolist()
    return characters, size


def evaluate_text(
    losses: Losses, text: Text, config: ModelConfig, *, batch_size: int, stride: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TextResult:  # fmt: skip
    """Predict every token of `text` but the first. All hosts call this with the same arguments.

    Args:
        losses: the evaluation step over all devices, with its parameters.
        batch_size: windows at a time, over all devices.
        stride: tokens from one window to the next, see `windows_over`. None: config.block_size.
        progress: told how many windows of how many are done.

    UserError: there is nothing to predict, or the hosts have different texts or settings.
    """
    stride = stride or config.block_size
    if not hosts.all_equal(f"{text.digest} {len(text.tokens)} {batch_size} {stride}"):
        raise UserError("the hosts have different texts or settings; start the same on all of them")
    windows = windows_over(len(text.tokens), config.block_size, stride=stride)
    if not windows or not text.characters:
        raise UserError("the text is one token, or one character; nothing of it is left to predict")
    total = window_loss(losses, text.tokens, windows, config, batch_size, progress)
    assert total is not None, "only a stop signal ends it early"
    nats, count = total
    bits, size = nats / math.log(2), config.block_size
    what = f"{text.name}: {count:,} tokens predicted in windows of {size}, {stride} apart"
    return TextResult(what, count, nats / count, bits / text.characters, bits / text.bytes)
