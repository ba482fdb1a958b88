"""Attention to keys and values of which a row holds several heads."""

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import attention, head_rows


@pytest.mark.parametrize(
    ("n_head", "head_size", "lanes", "group"),
    [(12, 64, 128, 2), (12, 64, 1, 1), (25, 64, 128, 1), (40, 128, 128, 1), (6, 16, 128, 6),
     (16, 16, 128, 8), (12, 80, 128, 1), (4, 200, 128, 1), (1, 64, 128, 1)],
)  # fmt: skip
def test_a_row_has_as_many_heads_as_fit_and_divide(n_head, head_size, lanes, group):
    assert head_rows.group(n_head, head_size, lanes) == group


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("group", [1, 2, 3, 6])
def test_attention_is_the_same_however_heads_lie(group, window):
    draw = np.random.default_rng(0)
    q, (k, v) = draw.standard_normal((2, 6, 4, 8)), draw.standard_normal((2, 2, 6, 7, 8))
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    rows = [head_rows.join(x, group) for x in (k, v)]
    assert rows[0].shape == (2, 6 // group, 7, group * 8)
    ours = attention.attend(q, *rows, 3, window)
    np.testing.assert_allclose(ours, attention.attend(q, k, v, 3, window), rtol=1e-5, atol=1e-6)
    assert head_rows.widen(q.astype("bfloat16"), group).dtype == "bfloat16"
