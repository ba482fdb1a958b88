"""The largest logits that are enough: by search and by sorting exactly the same, and by hand."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from gptjax import logit_threshold
from gptjax.attention import MASKED

LOGITS = st.floats(-(2.0**99), 2.0**99, width=32) | st.sampled_from([0.0, -0.0, 1.0, 2.0])


@functools.cache
def keep(trick: str):
    """Compiled with this value of GPTJAX_TRICKS: logits, weights, enough -> what is kept."""

    def function(logits, weights, enough):
        with pytest.MonkeyPatch.context() as patch:  # it is asked for while tracing
            patch.setenv("GPTJAX_TRICKS", trick)
            return logit_threshold.keep_largest(logits, weights, enough)

    return jax.jit(function)


def by_hand(logits, weights, enough):
    """bool [V]: add up from the largest on, equal ones together, until it is enough."""
    kept, total = np.zeros(len(logits), bool), 0.0
    for value in sorted(set(logits.tolist()), reverse=True):
        if kept.any() and total >= enough:
            break
        kept |= logits == value
        total += float(weights[logits == value].sum())
    return kept


@example(np.array([[-0.0, 0.0, -1.0, 0.5]] * 2, "f4"), 2, False)
@example(
    np.array([[1.0, np.nextafter(np.float32(1), np.float32(2)), 0.5, 0.0]] * 2, "f4"), 1, False
)
@example(np.array([[1e30, -1e30, 1e-38, -1e-38]] * 2, "f4"), 3, False)
@given(
    npst.arrays(np.float32, (2, 4), elements=LOGITS),
    st.integers(0, 30),
    st.booleans(),
)
def test_it_keeps_the_fewest_that_are_enough(logits, enough, weighted):
    # Small whole numbers add up exactly in any order.
    weights = np.array([[4, 2, 1, 3]] * 2, "f4") if weighted else np.ones((2, 4), "f4")
    expected = [by_hand(*row, enough) for row in zip(logits, weights, strict=True)]
    for trick in ("", "-logit_threshold"):
        kept = np.asarray(keep(trick)(logits, weights, float(enough)))
        wanted = np.where(expected, logits, np.float32(MASKED))
        assert np.array_equal(kept, wanted), trick


@pytest.mark.parametrize("vocabulary", [61, 2000])  # they are searched in steps of another size
def test_search_and_sorting_agree_on_large_vocabularies(vocabulary):
    logits = np.random.default_rng(0).standard_normal((3, vocabulary)).astype("f4")
    logits[:, ::7] = logits[:, 1:2]  # some equal ones
    ones = np.ones_like(logits)
    for enough in (1, 2, 40, vocabulary - 1, vocabulary, vocabulary + 5):
        kept = [np.asarray(keep(t)(logits, ones, float(enough))) for t in ("", "-logit_threshold")]
        assert np.array_equal(*kept)
        expected = [by_hand(row, ones[0], enough) for row in logits]
        assert np.array_equal(kept[0] > MASKED, expected)
