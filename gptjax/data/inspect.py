"""What a prepared set holds, in words: `gptjax data inspect`."""

import dataclasses
import heapq
from collections.abc import Iterator

import numpy as np

from gptjax.data.batches import batch_at
from gptjax.data.token_files import Dataset, Split

AT_ONCE = 1 << 20
"""Tokens in memory at the same time."""
DECODED = 20 * AT_ONCE
"""Tokens of a split that are turned into text, to find its longest lines."""
RARE = 10
"""A token is rare that occurs less often than this in the training split."""
LONGEST, SHOWN, ROWS = 3, 100, 3
"""Lines, characters of each, and rows of the first batch that are shown."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """Of a split."""

    documents: int | None
    """None: the tokenizer has no end-of-text token."""
    tokens: int
    of_ids: np.ndarray
    """int64 [n_vocab]: how often each id occurs."""


def count(split: Split, n_vocab: int, eot: int | None) -> Counts:
    """Reads all of it once."""
    found = np.zeros(n_vocab, np.int64)
    for block in _blocks(split, len(split)):
        found += np.bincount(block, minlength=n_vocab)
    # An end-of-text token stands between two documents, or (llm.c's) before each.
    first = eot is not None and len(split) > 0 and int(split[:1][0]) == eot
    documents = None if eot is None else int(found[eot]) + (len(split) > 0 and not first)
    return Counts(documents, len(split), found)


def describe(dataset: Dataset, seed: int, batch_size: int, block_size: int) -> Iterator[str]:
    """In lines. `seed` and the sizes: of the first batch, as training takes it."""
    tokenizer, n_vocab, eot = dataset.tokenizer, dataset.tokenizer.n_vocab, dataset.tokenizer.eot
    yield f"source      {dataset.source or 'not recorded'}"
    yield f"tokenizer   {tokenizer.kind}, {n_vocab:,} ids"
    counts = {}
    for name, split in (("training", dataset.train), ("validation", dataset.val)):
        counts[name] = found = count(split, n_vocab, eot)
        documents = f", documents: {found.documents:,}" if found.documents is not None else ""
        yield f"{name:11} {found.tokens:,} tokens{documents}{_text_size(dataset, split)}"
    train, val = counts["training"].of_ids, counts["validation"].of_ids
    never, rare = train == 0, (train > 0) & (train < RARE)
    yield (
        f"rare        {rare.sum():,} ids occur less than {RARE} times in the training split"
        f" ({_share(train[rare].sum(), train.sum())} of its tokens), {never.sum():,} never"
    )
    if val.sum():
        share = _share(val[never].sum(), val.sum())
        yield f"unknown     {share} of the validation tokens never occur in the training split"
    for line in heapq.nlargest(LONGEST, _lines(dataset, dataset.train), key=len):
        yield f"long line   {len(line):,} characters: {_begin(line)}"
    if len(dataset.train) > block_size:
        batch = batch_at(dataset.train, seed, 0, batch_size=batch_size, block_size=block_size)
        for row in batch[:ROWS]:
            yield f"first batch {_begin(tokenizer.decode(row.tolist()))}"


def _blocks(split: Split, most: int) -> Iterator[np.ndarray]:
    for start in range(0, most, AT_ONCE):
        yield split[start : min(most, start + AT_ONCE)]


def _text_size(dataset: Dataset, split: Split) -> str:
    block = split[:AT_ONCE]
    if not len(block):
        return ""
    text = dataset.tokenizer.decode(block[block != dataset.tokenizer.eot].tolist())
    return f", {len(text.encode(errors='replace')) / len(block):.2f} bytes of text a token"


def _lines(dataset: Dataset, split: Split) -> Iterator[str]:
    """Of the first `DECODED` tokens. A document's end is one of a line too."""
    rest, tokenizer = "", dataset.tokenizer
    for block in _blocks(split, min(len(split), DECODED)):
        documents = np.split(block, np.flatnonzero(block == tokenizer.eot))
        texts = (tokenizer.decode(ids[ids != tokenizer.eot].tolist()) for ids in documents)
        *whole, rest = (rest + "\n".join(texts)).split("\n")
        yield from whole
    yield rest


def _begin(text: str) -> str:
    return repr(text[:SHOWN]) + ("..." if len(text) > SHOWN else "")


def _share(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.2%}"
