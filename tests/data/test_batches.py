"""Batches as pure functions of seed and step; windows that predict every token once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.batches import batch_at, check_ids, window_batch, windows_over
from gptjax.errors import RunError

TOKENS = np.arange(1000, dtype=np.uint16)


def batch(seed, step, **more):
    return batch_at(TOKENS, seed, step, batch_size=8, block_size=16, **more)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    assert np.array_equal(batch(1, 2), batch(1, 2))
    assert np.array_equal(batch(1, 2, rows=slice(2, 5)), batch(1, 2)[2:5])
    assert len({batch(seed, step).tobytes() for seed in range(3) for step in range(3)}) == 9
    assert batch(0, 0).shape == (8, 17) and batch(0, 0).dtype == np.int32
    assert (np.diff(batch(0, 0), axis=1) == 1).all()  # each row is a stretch of the text


def test_the_data_order_is_that_of_the_first_edition():
    """Runs that it began are resumed with the batches that they would have seen."""
    assert batch(1337, 5)[:4, 0].tolist() == [175, 561, 592, 49]


def test_batches_cover_the_text_evenly_to_its_last_token():
    draws = [batch_at(TOKENS, 0, step, batch_size=64, block_size=16) for step in range(400)]
    counts = np.bincount(np.concatenate(draws)[:, 0], minlength=984)
    assert len(counts) == 984 and counts.min() > 0  # 984 = 1000 - 16 possible starts
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert abs(chi_square - 983) < 5 * np.sqrt(2 * 983)


def test_parts_are_drawn_by_weight_and_no_window_crosses_them():
    parts = [(300, 0.2), (20, 0.1), (680, 0.7)]
    draws = [
        batch_at(TOKENS, 3, step, batch_size=64, block_size=16, parts=parts) for step in range(100)
    ]
    rows = np.concatenate(draws)
    part = np.searchsorted([300, 320], rows[:, 0], side="right")
    assert np.array_equal(part, np.searchsorted([300, 320], rows[:, -1], side="right"))
    for number, (size, weight) in enumerate(parts):
        of_part = rows[part == number, 0]
        sigma = np.sqrt(len(rows) * weight * (1 - weight))
        assert abs(len(of_part) - weight * len(rows)) < 5 * sigma
        first = sum(tokens for tokens, _ in parts[:number])
        assert (of_part.min(), of_part.max()) == (first, first + size - 17) or size == 680
    assert np.array_equal(batch(1, 2, parts=parts, rows=slice(2, 5)), batch(1, 2, parts=parts)[2:5])
    assert np.array_equal(batch(1, 2, parts=[(1000, 1.0)]), batch(1, 2))


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 7), st.data())
def test_windows_predict_each_token_once_with_enough_context(n, block, rows, drawn):
    stride = drawn.draw(st.none() | st.integers(1, block))
    windows = windows_over(n, block, stride=stride)
    for start, end, first in windows:
        assert end - start <= block + 1 and start < first < end
        assert start == 0 or first - start > block - (stride or block)
    predicted = []
    for at in range(0, len(windows), rows):
        part, weights = window_batch(np.arange(n), windows[at : at + rows], block, rows)
        assert part.shape == (rows, block + 1) and weights.shape == (rows, block)
        assert (part.dtype, weights.dtype) == (np.int32, np.float32)
        assert set(np.unique(weights)) <= {0, 1}
        predicted += part[:, 1:][weights > 0].tolist()
        assert (part[:, :-1] + 1)[weights > 0].tolist() == part[:, 1:][weights > 0].tolist()
    assert predicted == list(range(1, n))


def test_fewer_windows_are_evenly_spaced_and_always_the_same():
    few = windows_over(100_001, 10, at_most=5)
    assert [window.start for window in few] == [0, 24990, 49990, 74990, 99990]
    assert few == [windows_over(100_001, 10)[i] for i in (0, 2499, 4999, 7499, 9999)]
    assert [window.start for window in windows_over(51, 10, at_most=99)] == [0, 10, 20, 30, 40]
    assert windows_over(300, 10, stride=3, at_most=2) == [(0, 11, 1), (291, 300, 299)]


def test_ids_beyond_the_vocabulary_are_refused():
    check_ids(np.array([[0, 6]]), 7)
    with pytest.raises(RunError, match="token id 7, but the vocabulary has 7 ids"):
        check_ids(np.array([[0, 7]]), 7)
    with pytest.raises(RunError):  # a vocabulary that nobody has filled in
        check_ids(np.array([[0]]), None)
