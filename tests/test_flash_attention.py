"""The kernels against attention by the formula: splash attention interpreted on a CPU, and what
cuDNN is asked for."""

import functools

import jax
import numpy as np
import numpy_gpt
import pytest
import small_models

from gptjax import attention, flash_attention, model
from gptjax.cache import init_cache
from gptjax.runtime_config import ComputeConfig

DRAW = np.random.default_rng(0)


def values_and_gradients(attend, q, k, v):
    """Of a sum with a weight for each output."""
    weights = np.random.default_rng(1).standard_normal(q.shape).astype("f4")

    def total(q, k, v):
        y = attend(q, k, v)
        return (y * weights).sum(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return y, *gradients


@pytest.mark.parametrize(
    ("t", "d", "window"),
    [(1, 64, None), (128, 64, 50), (200, 80, None), (257, 96, 131), (384, 128, 128), (9, 128, 1)],
)
def test_splash_attention_is_the_formula_gradients_too(t, d, window):
    q, k, v = DRAW.standard_normal((3, 2, 2, t, d)).astype("f4")
    splash = functools.partial(
        flash_attention.with_splash, window=t if window is None else window, interpret=True
    )
    plain = functools.partial(attention.attend, start=0, window=window)
    ours, expected = (values_and_gradients(each, q, k, v) for each in (splash, plain))
    for x, y in zip(ours, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5)


def test_splash_attention_keeps_documents_apart():
    q, k, v = DRAW.standard_normal((3, 2, 2, 200, 64)).astype("f4")
    begins = np.array([[0] * 50 + [50] * 150, [0] * 7 + [7] * 122 + [129] * 71], "i4")
    splash = functools.partial(
        flash_attention.with_splash, window=90, documents=begins, interpret=True
    )
    window = np.minimum(np.arange(200) - begins + 1, 90).astype("i4")
    plain = functools.partial(attention.attend, start=0, window=window)
    ours, expected = (values_and_gradients(each, q, k, v) for each in (splash, plain))
    for x, y in zip(ours, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("t", "size"), [(1, 128), (128, 128), (256, 256), (300, 128), (1024, 512)])
def test_blocks_are_as_large_as_divide_the_tokens(t, size):
    assert flash_attention.block(t) == size


def test_a_model_with_splash_attention_is_the_same(monkeypatch):
    """Dense and banded layers, in a loop in which each takes its own."""
    splash = functools.partial(flash_attention.with_splash, interpret=True)
    monkeypatch.setattr(flash_attention, "with_splash", splash)
    config = small_models.ALL_VARIANTS["banded"]
    params = small_models.random_params(config, scale=0.5)
    tokens = DRAW.integers(0, 23, (2, 12))
    positions = np.array([[*range(9), 0, 1, 2], range(12)], "i4")
    for unroll in (1, 2):
        compute = ComputeConfig("splash", scan_unroll=unroll)
        apply = jax.jit(functools.partial(model.apply, config, compute=compute))
        ours = np.asarray(apply(params, tokens)[0])
        small_models.assert_close(ours, numpy_gpt.logits(config, params, tokens))
        packed = np.asarray(apply(params, tokens, positions=positions)[0])
        small_models.assert_close(packed[1], ours[1])
        for part in (slice(9), slice(9, 12)):
            alone = numpy_gpt.logits(config, params, tokens[:1, part])
            small_models.assert_close(packed[:1, part], alone)


@pytest.fixture
def fake_cudnn(monkeypatch):
    """XLA's attention in place of cuDNN's; the shapes it is called with."""
    real, shapes = jax.nn.dot_product_attention, []

    def attend(q, k, v, *, implementation, **options):
        assert implementation == "cudnn"
        shapes.append(q.shape)
        return real(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    return shapes


@pytest.mark.parametrize("window", [7, 3, 1])
def test_the_cudnn_path_is_the_same_attention(fake_cudnn, window):
    q, k, v = DRAW.standard_normal((3, 2, 3, 7, 4)).astype("f4")
    ours = flash_attention.with_cudnn(q, k, v, window)
    assert fake_cudnn == [(2, 7, 3, 4)]  # cuDNN takes [B, T, H, D]
    expected = attention.attend(q, k, v, 0, window)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


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
