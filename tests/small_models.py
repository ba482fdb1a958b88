"""Small networks of every kind, with random weights."""

import dataclasses
import functools

import jax
import numpy as np

from gptjax import model
from gptjax.config import ModelConfig

SMALL = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=23)
VARIANTS = {
    "gpt2": SMALL,
    "untied": dataclasses.replace(SMALL, tied_head=False),
    "no bias": dataclasses.replace(SMALL, bias=False),
    "no qkv bias": dataclasses.replace(SMALL, qkv_bias=False),
    "only qkv bias": dataclasses.replace(SMALL, bias=False, qkv_bias=True),
    "erf": dataclasses.replace(SMALL, activation="gelu_erf"),
    "every setting": dataclasses.replace(
        SMALL,
        activation="relu",
        n_inner=24,
        layer_norm_epsilon=0.02,
        scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "padded": dataclasses.replace(SMALL, vocab_multiple=16, tied_head=False, bias=False),
}
"""All that Hugging Face's GPT-2 can express."""

ALL_VARIANTS = VARIANTS | {
    "sinusoidal": dataclasses.replace(SMALL, position="sinusoidal"),
    "banded": dataclasses.replace(SMALL, attention_pattern=("dense", "banded"), attention_window=5),
    "no layers": dataclasses.replace(SMALL, n_layer=0),
}


def random_params(config: ModelConfig, seed: int = 0, scale: float = 0.2):
    """No two numbers alike and none zero, so that no mix-up hides."""
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    return jax.tree.map(lambda x: scale * draw.standard_normal(x.shape, np.float32), shapes)


_apply = jax.jit(model.apply, static_argnums=0)


def logits(config: ModelConfig, params, tokens: np.ndarray) -> np.ndarray:
    """Ours, float32 [B, T, V]."""
    return np.asarray(_apply(config, params, tokens)[0])


def assert_bitwise(a, b) -> None:
    """Two trees of float32 arrays are the same."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype == np.float32 and np.array_equal(x, y)


def assert_close(ours: np.ndarray, expected: np.ndarray) -> None:
    """Within 1e-5 of the largest expected value."""
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()
