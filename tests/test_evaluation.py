"""The loss of a text window by window, of a model whose every number is known."""

import numpy as np
import pytest

from gptjax.config import ModelConfig
from gptjax.data.batches import Window, windows_over
from gptjax.errors import RunError
from gptjax.evaluation import window_loss

CONFIG = ModelConfig(1, 1, 4, block_size=4, vocab_size=100)
TOKENS = np.arange(1, 31) * 3 % 97  # 29 predictions


def losses(windows, weights, stop):
    """A target's nats are its id / 100."""
    assert windows.shape == (len(weights), 5) and weights.shape[1] == 4
    return (windows[:, 1:] / 100 * weights).sum(axis=1).astype(np.float32), stop


@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_every_prediction_counts_once_however_many_at_a_time(rows):
    windows = windows_over(len(TOKENS), 4)
    seen = []
    nats, count = window_loss(
        losses, TOKENS, windows, CONFIG, rows, progress=lambda *at: seen.append(at)
    )
    assert count == 29 and nats == pytest.approx(TOKENS[1:].sum() / 100, rel=1e-6)
    assert [done for done, _ in seen] == [min(n, 8) for n in range(rows, 8 + rows, rows)]
    assert {total for _, total in seen} == {len(windows)} == {8}


def test_context_is_given_and_not_counted():
    nats, count = window_loss(losses, TOKENS, [Window(10, 15, 13)], CONFIG, 2)
    assert count == 2 and nats == pytest.approx(TOKENS[13:15].sum() / 100)


def test_long_sums_keep_their_digits():
    def nats(windows, weights, stop):
        return np.array([2.0**24] + [1.0] * 15, np.float32), stop

    found, _ = window_loss(nats, TOKENS, [Window(0, 5, 1)] * 16, CONFIG, 16)
    assert found == 2**24 + 15  # which no float32 is


def test_a_stop_of_any_host_ends_it():
    asked = iter([0, 0, 15])
    seen = []
    found = window_loss(
        losses, TOKENS, windows_over(30, 4), CONFIG, 1,
        progress=lambda *at: seen.append(at), stop=lambda: next(asked),
    )  # fmt: skip
    assert found is None and seen == [(1, 8), (2, 8)]


def test_an_id_that_the_model_does_not_have_is_named():
    tokens = np.where(np.arange(30) == 20, 100, TOKENS)
    with pytest.raises(RunError, match="token id 100, but the vocabulary has 100 ids"):
        window_loss(losses, tokens, windows_over(30, 4), CONFIG, 2)
