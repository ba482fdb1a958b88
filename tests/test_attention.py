"""Causal attention against a few lines of numpy, and the choice of its kernel."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from gptjax import attention, hashed_random
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


@pytest.mark.parametrize(
    ("t", "window"), [(37, None), (128, None), (129, None), (150, 40), (300, 3)]
)
def test_blocks_of_queries_change_nothing(t, window):
    q, k, v = DRAW.standard_normal((3, 2, 3, t, 4))
    ours = attention.attend_in_blocks(*(x.astype("f4") for x in (q, k, v)), window)
    np.testing.assert_allclose(ours, expected(q, k, v, 0, window or t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attend", [attention.attend, attention.attend_in_blocks])
def test_queries_may_have_a_window_each(attend):
    q, k, v = DRAW.standard_normal((3, 2, 3, 150, 4))
    window = DRAW.integers(1, 150, (2, 150)).astype("i4")
    start = [0] if attend is attention.attend else []
    ours = attend(*(x.astype("f4") for x in (q, k, v)), *start, window)
    for b, t in [(0, 0), (0, 99), (1, 70), (1, 149)]:
        alone = expected(q[b : b + 1, :, t : t + 1], k[b : b + 1], v[b : b + 1], t, window[b, t])
        np.testing.assert_allclose(ours[b, :, t], alone[0, :, 0], rtol=1e-4, atol=1e-5)


def test_blocks_drop_the_weights_that_dropout_drops():
    q, k, v = DRAW.standard_normal((3, 2, 3, 150, 4)).astype("f4")
    key, rows = jax.random.key(0), np.array([3, 8])

    def drop(weights):
        kept = hashed_random.dropout_mask(key, rows, weights.shape, 0.4)
        return jax.numpy.where(kept, weights / 0.6, 0)

    keys = hashed_random.dropout_keys(key, rows)
    ours = attention.attend_in_blocks(q, k, v, None, keys, 0.4)
    plain = attention.attend(q, k, v, 0, None, drop)
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("t", "of_all"), [(127, 1), (128, 5 / 8), (1024, 9 / 16), (2048, 9 / 16)])
def test_blocks_leave_out_scores_that_are_masked(t, of_all):
    x = jax.ShapeDtypeStruct((1, 1, t, 256), "float32")
    costs = [
        jax.jit(function).lower(x, x, x).compile().cost_analysis()["flops"]
        for function in (lambda *x: attention.attend(*x, 0), attention.attend_in_blocks)
    ]
    assert costs[1] == pytest.approx(of_all * costs[0], rel=0.02)


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
        ({}, device(version="ROCm 6.1"), False, "NVIDIA GPU"),
        ({}, device(capability="7.5"), False, "compute capability 8.0"),
        ({"dtype": "float32"}, device(), False, "bfloat16"),
        ({"n_embd": 264}, device(), False, "head size"),
        ({"n_embd": 24}, device(), False, "head size"),
        ({"block_size": 333}, device(), False, "even block_size"),
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
    kernel, reason = attention.choose(config, ComputeConfig(), train=train, packed=True)
    assert kernel == "xla" and "cuDNN cannot keep documents apart" in reason


def test_cudnns_window_is_used_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [device()])
    config = dataclasses.replace(FITS, attention_pattern=("dense", "banded"))
    kernels = [
        attention.choose(config, ComputeConfig(x), train=False)[0] for x in ("auto", "cudnn")
    ]
    assert kernels == ["xla", "cudnn"]


def test_blocks_are_for_cpus_and_whoever_asks(monkeypatch):
    def chosen(asked="auto", where="cpu", config=FITS):
        return attention.choose(config, ComputeConfig(asked), device(where), train=True)

    assert chosen() == ("blocks", "128 queries at a time, without the keys after them")
    few = dataclasses.replace(FITS, block_size=64)
    assert chosen(config=few) == ("xla", "all 64 queries at a time")
    assert chosen("blocks", config=few)[0] == "blocks"  # the same, and no reason to refuse it
    assert chosen(where="tpu")[0] != "blocks" == chosen("blocks", where="tpu")[0]
    assert chosen("cudnn") == (
        "xla",
        "cuDNN needs an NVIDIA GPU, cuDNN cannot apply our attention dropout",
    )
    monkeypatch.setenv("GPTJAX_TRICKS", "-hashed_random")
    assert chosen() == ("xla", "blocks need hashed_random for dropout")


@pytest.mark.parametrize(
    ("changes", "train", "why"),
    [
        ({}, False, None),
        ({"dropout": 0.0, "block_size": 333, "n_embd": 66}, True, None),
        ({"attention_pattern": ("dense", "banded")}, False, None),
        ({}, True, None),
        ({"block_size": 16384}, True, None),
        ({"block_size": 16385}, True, "splash attention with dropout needs a smaller block_size"),
        ({"block_size": 1 << 20}, False, None),
        ({"dtype": "float32"}, False, "splash attention needs bfloat16"),
    ],
)
def test_splash_attention_is_chosen_on_tpus(changes, train, why):
    config = dataclasses.replace(FITS, **changes)
    tpu = device("tpu")
    kernel, reason = attention.choose(config, ComputeConfig(), tpu, train=train)
    assert kernel == ("xla" if why else "splash") and (why or "in blocks of") in reason
    assert ("gptjax's own kernel" in reason) == (train and config.dropout > 0 and not why)
    if not why:
        packed, reason = attention.choose(config, ComputeConfig(), tpu, train=train, packed=True)
        apart = "splash attention cannot keep documents apart and apply dropout"
        drops = train and config.dropout > 0
        assert (packed, reason == apart) == (("xla", True) if drops else ("splash", False))
    assert attention.choose(config, ComputeConfig("cudnn"), tpu, train=train)[0] == "xla"
    assert attention.choose(config, ComputeConfig("splash"), device(), train=train)[0] == "xla"
