"""From tokens to the arrays that a step takes. Which tokens a batch holds follows from the seed and
the step alone, so a resumed run needs no saved data position. numpy only."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from gptjax.errors import RunError


class Tokens(Protocol):
    """A sequence of token ids: a one-dimensional array, or a split of a prepared set
    (`token_files.Split`), which has a method `read` for many parts at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


def _read(tokens: Tokens, parts: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Tokens [start, end) of each part."""
    read = getattr(tokens, "read", None)
    return read(parts) if read else [tokens[start:end] for start, end in parts]


def batch_at(
    tokens: Tokens,
    seed: int,
    step: int,
    *,
    batch_size: int,
    block_size: int,
    rows: slice = slice(None),
    parts: Sequence[tuple[int, float]] = (),
) -> np.ndarray:
    """int32 [batch_size, block_size + 1], or `rows` of it: windows at random positions, a pure
    function of (seed, step). A window's first block_size tokens are the input, its last block_size
    the targets. Only `rows` of the batch are read and returned: one host's share. `parts`: (tokens,
    weight) of each part of the text, one after the other; a window lies within one part, which is
    drawn by weight. None: the text is one.

    Philox is a counter-based generator (Salmon et al. 2011), so step 1000 costs what step 0 does;
    numpy guarantees its raw stream, so batches are the same on every machine and numpy version.
    """
    raw, drawn = (
        np.random.Philox(key=seed, counter=step << 64)
        .random_raw(2 * batch_size)
        .reshape(2, batch_size)
    )
    sizes, weights = zip(*parts or [(len(tokens), 1.0)], strict=True)
    bounds = np.cumsum(weights)
    # 53 bits, as a float64 has. The last bound is 1, up to rounding.
    part = np.searchsorted(bounds[:-1], (drawn >> np.uint64(11)) * 2.0**-53, side="right")
    begins = np.array([0, *itertools.accumulate(sizes)])[part]
    starts = begins + (raw % (np.array(sizes, np.uint64)[part] - np.uint64(block_size))).astype(int)
    windows = [(start, start + block_size + 1) for start in starts[rows].tolist()]
    return np.stack(_read(tokens, windows)).astype(np.int32)


class Window(NamedTuple):
    """Tokens [start, end) of a text, of which [first, end) are predicted. Those before `first` are
    context only: an earlier window predicts them."""

    start: int
    end: int
    first: int


def windows_over(
    n_tokens: int, block_size: int, *, stride: int | None = None, at_most: int | None = None
) -> list[Window]:
    """Windows of at most block_size + 1 tokens that together predict every token but the text's
    first exactly once.

    Args:
        stride: distance between the starts of neighbouring windows, in [1, block_size]. None:
            block_size, so that windows do not overlap. A smaller stride costs more windows, and
            gives every token after the first window at least block_size - stride tokens of context.
        at_most: take only this many windows, evenly spaced over the text; always the same ones.
    """
    stride = stride or block_size
    # Windows follow until one reaches the end of the text.
    count = 1 + max(0, -(-(n_tokens - block_size - 1) // stride)) if n_tokens >= 2 else 0
    numbers: Sequence[int] = range(count)
    if at_most is not None and at_most < count:
        numbers = [int(i) for i in np.linspace(0, count - 1, at_most)]

    def end(number: int) -> int:
        return min(number * stride + block_size + 1, n_tokens)

    return [Window(i * stride, end(i), end(i - 1) if i else 1) for i in numbers]


def window_batch(
    tokens: Tokens, windows: Sequence[Window], block_size: int, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """int32 [rows, block_size + 1] tokens, one window a row, and float32 [rows, block_size] weights
    of the targets: 1 where the window predicts, 0 for context, for padding past the window's end,
    and in rows beyond the last window."""
    batch = np.zeros((rows, block_size + 1), dtype=np.int32)
    weights = np.zeros((rows, block_size), dtype=np.float32)
    texts = _read(tokens, [(start, end) for start, end, _ in windows])
    for row, (text, (start, end, first)) in enumerate(zip(texts, windows, strict=True)):
        batch[row, : len(text)] = text
        weights[row, first - start - 1 : end - start - 1] = 1
    return batch, weights


def check_ids(tokens: np.ndarray, vocab_size: int | None) -> None:
    """Raise RunError if an id is not below the vocabulary's size: before they index the embedding,
    where JAX would clamp them silently."""
    if tokens.max() >= (vocab_size or 0):
        raise RunError(
            f"the data contain token id {tokens.max()}, but the vocabulary has {vocab_size} ids;"
            " the token file is damaged, prepare it again"
        )
