"""WikiText-2 and WikiText-103 (Merity et al. 2016, arXiv:1609.07843): perplexity of a word.

The text was taken apart into words, with spaces around every mark. A model of plain text reads it
put together again; what it predicts is counted by the words and bytes of the file as it is, so
that models with different tokenizers can be compared, also with those that read the words.
"""

import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.config import ModelConfig
from gptjax.data import readers
from gptjax.data.tokenizers import Tokenizer
from gptjax.errors import UserError
from gptjax.evals import perplexity
from gptjax.evals.perplexity import Text
from gptjax.evaluation import Losses

PAIRS = [("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'")]


class WikiText(NamedTuple):
    """The text to predict, and the number of words of the file."""

    text: Text
    words: int


class WikiTextResult(NamedTuple):
    """What `evaluate_wikitext` measured."""

    description: str
    tokens: int
    """Number of predicted tokens."""
    loss: float
    """Mean, in nats per token."""
    word_perplexity: float
    """Of the words of the file: between white space."""
    bits_per_byte: float
    """Of the bytes of the file."""

    def report(self) -> str:
        """What was evaluated, and a line for each number."""
        return (
            f"{self.description}\nloss                {self.loss:.4f} nats per token\n"
            f"word perplexity     {self.word_perplexity:.4f}  (of the words of the file)\n"
            f"bits per byte       {self.bits_per_byte:.4f}  (of the bytes of the file)"
        )


def detokenise(text: str) -> str:
    """WikiText as people write, but for what the usual rules get wrong. They are those of
    lm-evaluation-harness and of most published numbers, to be comparable with these: that which
    makes " N " a 1, say, is meant for the Penn Treebank, and WikiText has degrees north."""
    text = text.replace("s '", "s'")
    for mark in "-,.":  # one after the other: two of them may share a space
        text = text.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for opening, closing in PAIRS:
        inside = f"{re.escape(opening)}([^{re.escape(closing)}]*){re.escape(closing)}"
        text = re.sub(inside, lambda found: found[0][0] + found[1].strip() + found[0][-1], text)
    for level in (4, 3, 2):  # of headings
        text = text.replace(" ".join("=" * level), "=" * level)
    for spaced in (" \u00b0 ", " \n", "\n "):
        text = text.replace(spaced, spaced.strip(" "))
    return text.replace(" N ", " 1 ").replace(" 's", "'s")


def read_wikitext(path: Path, tokenizer: Tokenizer) -> WikiText:
    """A file of the data set as it is published, such as wiki.test.raw, compressed or not. Before
    it stands the end-of-text token, if the tokenizer has one, so that all of it is predicted.
    UserError: it cannot be read, or has characters that the tokenizer does not know."""
    if readers.kind(path) != "text":
        raise UserError(f"{path} is no plain text; expected one of WikiText's, wiki.test.raw")
    original = "".join(piece for document in readers.read(path) for piece in document)
    start = [] if tokenizer.eot is None else [tokenizer.eot]
    try:
        tokens = np.array([*start, *tokenizer.encode(detokenise(original))], np.int32)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    text = Text(path.name, tokens, len(original), len(original.encode()), digest)
    return WikiText(text, len(original.split()))


def evaluate_wikitext(
    losses: Losses, wikitext: WikiText, config: ModelConfig, *, batch_size: int,
    stride: int | None = None, progress: Callable[[int, int], None] = lambda done, total: None,
) -> WikiTextResult:  # fmt: skip
    """As `perplexity.evaluate_text`."""
    found = perplexity.evaluate_text(
        losses, wikitext.text, config, batch_size=batch_size, stride=stride, progress=progress
    )
    nats = found.loss * found.tokens
    return WikiTextResult(
        f"{found.description}, {wikitext.words:,} words",
        found.tokens,
        found.loss,
        math.exp(min(nats / max(1, wikitext.words), 700.0)),
        found.bits_per_byte,
    )
