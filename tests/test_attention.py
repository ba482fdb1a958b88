"""Causal attention against a few lines of numpy, and the choice of its kernel."""

import dataclasses
import functools
import types

import jax
import numpy as np
import numpy_gpt
import pytest
import small_models

from gptjax import attention, model
from gptjax.cache import init_cache
from gptjax.config import ModelConfig
from gptjax.runtime_config import ComputeConfig

DRAW = np.random.default_rng(0)


def expected(q, k, v, start, window) -> np.ndarray:
    """One query at a time, in float64."""
    out = np.zeros(q.shape)
    for b, h, t in np.ndindex(q.shape[:3]):
        seen = slice(max(0, start + t - window + 1), start + t + 1)
        weights = np.exp(k[b, h, seen] @ q[b, h, t] / np.sqrt(q.shape[-1]))
        out[b, h, t] = weights / weights.sum() @ v[b, h, seen]
    return out


@pytest.mark.parametrize(("start", "window"), [(0, None), (4, None), (4, 3), (0, 1)])
def test_each_query_averages_what_it_may_see(start, window):
    q = DRAW.standard_normal((2, 3, 5, 4))
    k, v = DRAW.standard_normal((2, 2, 3, 11, 4))
    # What lies after the last query must not matter, whatever it is.
    k[:, :, start + 5 :], v[:, :, start + 5 :] = 1e4, -1e4
    ours = attention.attend(*(x.astype("f4") for x in (q, k, v)), start, window)
    np.testing.assert_allclose(ours, expected(q, k, v, start, window or 99), rtol=1e-4, atol=1e-5)


def test_dropout_gets_the_weights_of_each_head_and_query():
    q = k = np.zeros((1, 1, 3, 2), "f4")
    v = np.arange(6, dtype="f4").reshape(1, 1, 3, 2)
    given = []

    def drop_the_first_key(weights):
        given.append(np.asarray(weights))
        return weights.at[..., 0].set(0)

    out = attention.attend(q, k, v, 0, None, drop_the_first_key)
    np.testing.assert_allclose(given[0][0, 0], [[1, 0, 0], [0.5, 0.5, 0], [1 / 3] * 3], rtol=1e-6)
    np.testing.assert_allclose(out[0, 0], [[0, 0], [1, 1.5], [2, 8 / 3]], rtol=1e-6)


def test_scores_and_softmax_are_float32_in_bfloat16_too():
    draw = np.random.default_rng(1).standard_normal((3, 1, 1, 64, 8))
    q, k, v = (jax.numpy.asarray(4 * x, "bfloat16") for x in draw)
    exact = expected(*(np.asarray(x, "f8") for x in (q, k, v)), 0, 99)
    ours = attention.attend(q, k, v, 0)
    assert ours.dtype == "bfloat16"
    # Weights and sums are rounded to 8 bits. Scores of bfloat16 would be off by up to 0.2.
    np.testing.assert_allclose(np.asarray(ours, "f8"), exact, atol=0.08)


# ------------------------------------------------------------------- the choice of a kernel


def device(platform="gpu", capability="8.0", version="cuda 12"):
    client = types.SimpleNamespace(platform_version=version)
    return types.SimpleNamespace(platform=platform, compute_capability=capability, client=client)


FITS = ModelConfig(2, 2, 128, vocab_size=9, dtype="bfloat16", dropout=0.1)


@pytest.mark.parametrize(
    ("changes", "where", "train", "why"),
    [
        ({}, device(), False, None),
        ({"dropout": 0.0}, device(capability="9.0"), True, None),
        ({"n_embd": 256}, device(), False, None),  # a head size of 128
        ({}, device(), True, "cuDNN cannot apply our attention dropout"),
        ({}, device("cpu"), False, "NVIDIA GPU"),
        ({}, device(version="ROCm 6.1"), False, "NVIDIA GPU"),
        ({}, device(capability="7.5"), False, "compute capability 8.0"),
        ({"dtype": "float32"}, device(), False, "bfloat16"),
        ({"n_embd": 264}, device(), False, "head size"),
        ({"n_embd": 24}, device(), False, "head size"),
        ({"block_size": 333}, device(), False, "even block_size"),
        ({"attention_pattern": ("dense", "banded")}, device(), False, "one window"),
    ],
)
def test_cudnn_is_chosen_only_where_it_computes_the_model(monkeypatch, changes, where, train, why):
    monkeypatch.setattr(jax, "devices", lambda: [where])
    config = dataclasses.replace(FITS, **changes)
    for asked in ("auto", "cudnn"):
        kernel, reason = attention.choose(config, ComputeConfig(asked), train=train)
        assert kernel == ("xla" if why else "cudnn") and (why or "flash") in reason
    kernel, reason = attention.choose(config, ComputeConfig("xla"), train=train)
    assert (kernel, reason) == ("xla", "asked for")


@pytest.fixture
def fake_cudnn(monkeypatch):
    """XLA's attention in place of cuDNN's; the shapes it is called with."""
    real, shapes = jax.nn.dot_product_attention, []

    def attend(q, k, v, *, is_causal, implementation):
        assert is_causal and implementation == "cudnn"
        shapes.append(q.shape)
        return real(q, k, v, is_causal=True, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    return shapes


def test_the_cudnn_path_is_the_same_attention(fake_cudnn):
    q, k, v = DRAW.standard_normal((3, 2, 3, 7, 4)).astype("f4")
    ours = attention.attend_with_cudnn(q, k, v)
    assert fake_cudnn == [(2, 7, 3, 4)]  # cuDNN takes [B, T, H, D]
    np.testing.assert_allclose(ours, expected(q, k, v, 0, 99), rtol=1e-4, atol=1e-5)


def test_a_model_with_cudnn_is_the_same_and_decodes_without(fake_cudnn):
    config = small_models.SMALL
    params = small_models.random_params(config, scale=0.5)
    tokens = DRAW.integers(0, 23, (2, 12))
    cudnn = ComputeConfig("cudnn", scan_unroll=1)
    apply = jax.jit(functools.partial(model.apply, config, compute=cudnn))
    whole, _ = apply(params, tokens)
    assert fake_cudnn
    small_models.assert_close(np.asarray(whole), numpy_gpt.logits(config, params, tokens))
    fake_cudnn.clear()
    cache = init_cache(config, 2, 12, np.float32)
    cached, _ = apply(params, tokens, cache)
    small_models.assert_close(np.asarray(cached), np.asarray(whole))
    assert not fake_cudnn
