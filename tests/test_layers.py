"""The pieces of the network, each against its formula in float64."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import layers
from gptjax.config import ModelConfig
from gptjax.layers import Dropout, Part
from gptjax.runtime_config import ComputeConfig

X = np.concatenate([np.linspace(-12, 12, 401), [0.0, -0.0, 1e-20, -40, 40]]).astype("f4")


def by_erf(x):
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def by_exp(x):
    return x / (1 + math.exp(-x))


def by_tanh(x):
    return x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def test_positions_count_from_the_token_before_each_document():
    tokens = np.array([[9, 5, 9, 9, 7, 7], [5, 5, 5, 9, 5, 5], [5, 5, 5, 5, 5, 5]])
    found = layers.document_positions(tokens, 9)
    assert found.tolist() == [[0, 1, 0, 0, 1, 2], [0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("name", "formula"), [("gelu_erf", by_erf), ("gelu_tanh", by_tanh), ("silu", by_exp)]
)
def test_activations_and_their_slopes_are_the_papers(name, formula):
    value, slope = jax.vmap(jax.value_and_grad(lambda x: layers.activate(x, name)))(X)
    np.testing.assert_allclose(value, [formula(x) for x in X.tolist()], rtol=1e-5, atol=5e-6)
    step = 1e-4
    expected = [(formula(x + step) - formula(x - step)) / (2 * step) for x in X.tolist()]
    np.testing.assert_allclose(slope, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("form", "error"), [("gelu_erf", 2**-8), ("gelu_tanh", 2**-6)])
def test_gelu_of_bfloat16_is_bfloat16_and_close(form, error):
    x = jnp.asarray(X, "bfloat16")
    ours = layers.activate(x, form)
    exact = np.asarray(layers.activate(x.astype("float32"), form))
    assert ours.dtype == "bfloat16"
    np.testing.assert_allclose(ours.astype("f4"), exact, rtol=error, atol=error)


def test_sinusoids_are_those_of_attention_is_all_you_need():
    table = layers.sinusoids(50, 8)
    assert table.shape == (50, 8) and table.dtype == np.float32
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    assert table[7, 4] == pytest.approx(math.sin(7 / 10000 ** (4 / 8)))
    assert table[7, 5] == pytest.approx(math.cos(7 / 10000 ** (4 / 8)))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")],
)
def test_compute_dtype(dtype, expected):
    assert layers.compute_dtype(ModelConfig(dtype=dtype)) == expected


# ------------------------------------------------------------------------------- dropout


@functools.partial(jax.jit, static_argnames=("rate", "shape"))
def dropped(rate, shape, rows, seed=0):
    rngs = {"dropout": jax.random.key(seed)}
    return Dropout(rate, train=True).apply({}, jnp.ones(shape), rows, rngs=rngs)


def test_dropout_zeroes_the_rate_and_keeps_the_mean():
    rows = np.arange(40)
    out = np.asarray(dropped(0.2, (40, 50, 60), rows))
    assert set(np.unique(out)) == {0, np.float32(1.25)}
    # 120,000 draws: four standard deviations are 0.005.
    assert (out == 0).mean() == pytest.approx(0.2, abs=0.005)
    assert np.array_equal(out, dropped(0.2, (40, 50, 60), rows))
    assert not np.array_equal(out, dropped(0.2, (40, 50, 60), rows, seed=1))


def test_dropout_follows_the_row_in_the_global_batch():
    whole, rows = np.asarray(dropped(0.5, (6, 5, 7), np.arange(6))), np.array([4, 1])
    assert np.array_equal(dropped(0.5, (2, 5, 7), rows), whole[rows])
    # The same where sequences and tokens are one axis.
    assert np.array_equal(dropped(0.5, (2 * 5, 7), rows).reshape(2, 5, 7), whole[rows])


def test_no_dropout_in_evaluation_or_at_rate_0():
    for rate, train in ((0.5, False), (0.0, True)):
        module = Dropout(rate, train)
        assert np.array_equal(module.apply({}, jnp.ones((3, 4)), jnp.arange(3)), np.ones((3, 4)))


# ------------------------------------------------------------- linear layers and LayerNorm


class Pieces(Part):
    @nn.compact
    def __call__(self, x):
        plain = self.dense("plain", 300, use_bias=True)(x)
        residual = self.dense("residual", 300, use_bias=False, residual=True)(x)
        return plain, residual, self.layer_norm("norm")(x)


def pieces(x, **settings):
    config = ModelConfig(n_layer=8, n_head=1, n_embd=200, vocab_size=5, **settings)
    module = Pieces(config, ComputeConfig(), train=False)
    params = module.init(jax.random.key(0), x)["params"]
    return params, module.apply({"params": params}, x)


def test_linear_layers_start_with_gpt2s_spread():
    params, _ = pieces(jnp.ones((1, 200)))
    assert np.std(params["plain"]["kernel"]) == pytest.approx(0.02, rel=0.02)
    assert np.std(params["residual"]["kernel"]) == pytest.approx(0.02 / 4, rel=0.02)
    assert not params["plain"]["bias"].any() and "bias" not in params["residual"]
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))


def test_layer_norm_is_exact_far_from_zero_and_near_it():
    draw = np.random.default_rng(0).standard_normal((3, 200))
    x = np.stack([draw[0], 1000 + draw[1], 1e-3 * draw[2]]).astype("f4")
    _, (_, _, ours) = pieces(x)
    wide = x.astype("f8")
    centred = wide - wide.mean(axis=1, keepdims=True)
    expected = centred / np.sqrt(centred.var(axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)


def test_layer_norm_has_a_bias_only_where_it_is_asked_for():
    assert set(pieces(jnp.ones((1, 200)))[0]["norm"]) == {"scale", "bias"}
    assert set(pieces(jnp.ones((1, 200)), bias=False)[0]["norm"]) == {"scale"}


def test_activations_are_in_the_compute_precision():
    params, outputs = pieces(jnp.ones((1, 200)), dtype="bfloat16")
    assert all(y.dtype == "bfloat16" for y in outputs)
    assert all(x.dtype == "float32" for x in jax.tree.leaves(params))
