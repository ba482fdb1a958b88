"""The kernel, interpreted on a CPU, against attention and its dropout by the formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from gptjax import attention, dropout_attention, flash_attention, hashed_random, train_step
from gptjax.runtime_config import ComputeConfig

DRAW = np.random.default_rng(0)
KEY = jax.random.key(1, impl="threefry2x32")


@pytest.mark.parametrize(
    ("t", "d", "window", "rate"),
    [(200, 64, None, 0.2), (600, 80, 200, 0.5), (9, 96, 1, 0.1), (257, 128, 128, 0.9)],
)
def test_values_and_gradients_are_the_formulas_with_the_same_mask(t, d, window, rate):
    q, k, v, weights = DRAW.standard_normal((4, 2, 3, t, d)).astype("f4")
    rows = jnp.array([5, 3])

    def drop(x):
        kept = hashed_random.dropout_mask(KEY, rows, x.shape, rate)
        return jnp.where(kept, x / (1 - rate), 0)

    kernel = functools.partial(
        dropout_attention.attend, keys=hashed_random.dropout_keys(KEY, rows), rate=rate,
        window=window or t, block=256 if t > 500 else 128, interpret=True,
    )  # fmt: skip
    plain = functools.partial(attention.attend, start=0, window=window, dropout=drop)

    def values_and_gradients(attend):
        def total(q, k, v):
            y = attend(q, k, v)
            return (y * weights).sum(), y

        (_, y), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
        return y, *gradients

    for x, y in zip(values_and_gradients(kernel), values_and_gradients(plain), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5 / (1 - rate))


def test_in_bfloat16_it_is_as_exact_as_the_plain_path():
    q, k, v = DRAW.standard_normal((3, 2, 2, 300, 64)).astype("f4")
    rows, rate = jnp.arange(2), 0.2

    def drop(x):
        kept = hashed_random.dropout_mask(KEY, rows, x.shape, rate)
        return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))

    exact = attention.attend(q, k, v, 0, dropout=drop)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    keys = hashed_random.dropout_keys(KEY, rows)
    ours = dropout_attention.attend(*narrow, keys, rate=rate, window=300, block=128, interpret=True)
    plain = attention.attend(*narrow, 0, dropout=drop)
    errors = [float(jnp.linalg.norm(x.astype("f4") - exact)) for x in (ours, plain)]
    assert ours.dtype == jnp.bfloat16 and errors[0] < 1.1 * errors[1]


def test_a_model_trains_with_the_masks_of_the_plain_path(monkeypatch):
    """Dense and banded layers; all of its other dropout too."""
    kernel = functools.partial(flash_attention.with_dropout, interpret=True)
    monkeypatch.setattr(flash_attention, "with_dropout", kernel)
    config = small_models.ALL_VARIANTS["banded"].replace(dropout=0.3, block_size=140)
    params = small_models.random_params(config, scale=0.5)
    windows, rows = DRAW.integers(0, 23, (2, 141)), jnp.array([7, 2])
    splash, blocks, expected = (
        jax.jit(jax.value_and_grad(functools.partial(
            train_step.loss, config=config, compute=ComputeConfig(name, scan_unroll=1),
            dropout_key=KEY, rows=rows,
        )))(params, windows)
        for name in ("splash", "blocks", "xla")
    )  # fmt: skip
    for ours in splash, blocks:
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("t", "window", "block", "blocks"),
    [(1024, 1024, 512, 3), (1024, 256, 256, 7), (1024, 257, 256, 7), (1024, 258, 256, 9),
     (512, 1, 128, 4), (128, 50, 128, 1)],
)  # fmt: skip
def test_blocks_that_no_query_sees_are_left_out(t, window, block, blocks):
    shape = dropout_attention._Shape(t, window, block, 0.1, False)
    assert dropout_attention._blocks(shape, t) == blocks
    ours = [[int(dropout_attention._first_keys(shape, i)), i] for i in range(t // block)]
    seen = np.tril(np.ones((t, t))) * (np.subtract.outer(range(t), range(t)) < window)
    seen = seen.reshape(t // block, block, t // block, block).any((1, 3))
    assert ours == [[row.argmax(), row.nonzero()[0][-1]] for row in seen]
    last = [int(dropout_attention._last_queries(shape, j, t // block)) for j in range(t // block)]
    assert last == [column.nonzero()[0][-1] for column in seen.T]
