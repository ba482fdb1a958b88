"""The pieces that the network is built from: linear layers, LayerNorm, activations, dropout,
positions.

Letters in shape comments: B sequences, T tokens of each, N = B T, C n_embd.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import Activation, ModelConfig
from gptjax.hashed_random import dropout_keys, dropout_mask
from gptjax.runtime_config import ComputeConfig

INIT_STD = 0.02


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The precision of activations. "auto" is resolved when a run begins; here it is float32."""
    return jnp.dtype(jnp.bfloat16 if config.dtype == "bfloat16" else jnp.float32)


def sinusoids(block_size: int, n_embd: int) -> np.ndarray:
    """float32 [block_size, n_embd]: the fixed position embedding of "Attention is all you need"
    (arXiv:1706.03762, section 3.5); sine in even columns, cosine in odd ones."""
    position = np.arange(block_size)[:, None]
    angle = position / 10000.0 ** (np.arange(0, n_embd, 2) / n_embd)
    return np.stack([np.sin(angle), np.cos(angle)], -1).reshape(block_size, n_embd).astype("f4")


def document_positions(tokens: jax.Array, eot: int | None) -> jax.Array | None:
    """int32 [B, T]: each token's position in its document. The end-of-text token that separates two
    documents counts as the beginning of the second, whose first token it predicts. `eot` None:
    None, as `model.apply` takes it."""
    if eot is None:
        return None
    number = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return number - jax.lax.cummax(jnp.where(tokens == eot, number, 0), axis=1)


def activate(x: jax.Array, name: Activation) -> jax.Array:
    """GELU is x times the normal distribution function (Hendrycks & Gimpel, arXiv:1606.08415), or
    GPT-2's approximation of it by tanh; computed in float32, as PyTorch does. SiLU is x times the
    logistic function."""
    if name == "relu":
        return jax.nn.relu(x)
    if name == "silu":
        return jax.nn.silu(x)
    if name == "gelu_tanh":
        return jax.nn.gelu(x, approximate=True)
    assert name == "gelu_erf", name
    # By erf: jax.nn.gelu takes erfc, which on a CPU costs more than the layer's matmul.
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


class Dropout(nn.Module):
    """Zero each number with probability `rate`, scale the others up (Srivastava et al. 2014)."""

    rate: float
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, rows: jax.Array) -> jax.Array:
        """x of any shape whose leading axis is, or begins with, the B sequences of `rows` (int32
        [B], their numbers in the global batch)."""
        if not self.train or not self.rate:
            return x
        kept = dropout_mask(self.make_rng("dropout"), rows, x.shape, self.rate)
        return jnp.where(kept, x / (1 - self.rate), jnp.zeros((), x.dtype))

    def keys(self, rows: jax.Array) -> jax.Array | None:
        """Instead of a call, for a kernel that makes the mask itself: uint32 [B, 2], or None where
        nothing is dropped."""
        if not self.train or not self.rate:
            return None
        return dropout_keys(self.make_rng("dropout"), rows)


class LoraDense(nn.Dense):
    """x W + b + (x A) B alpha / rank, a linear layer with a low-rank adapter beside its kernel W
    (LoRA, arXiv:2106.09685). B begins as zeros, A as in the package peft."""

    rank: int = 0
    alpha: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = super().__call__(x)
        # Uniform up to 1 / sqrt(in).
        first = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        a = self.param("lora_a", first, (x.shape[-1], self.rank))
        b = self.param("lora_b", nn.initializers.zeros, (self.rank, self.features))
        return y + (x @ a.astype(x.dtype) * (self.alpha / self.rank)) @ b.astype(x.dtype)


class Part(nn.Module):
    """Base of the network's parts: their settings, and GPT-2's layers by these settings."""

    config: ModelConfig
    compute: ComputeConfig
    train: bool

    def dense(self, name: str, features: int, *, use_bias: bool, residual: bool = False):
        """A linear layer; `residual`: its output is added to the residual stream."""
        std = INIT_STD
        if residual:
            # GPT-2, section 2.3: so that the stream's variance does not grow with depth.
            std /= math.sqrt(2 * self.config.n_layer)
        settings: dict[str, Any] = {
            "use_bias": use_bias,
            "dtype": compute_dtype(self.config),
            "kernel_init": nn.initializers.normal(std),
            "name": name,
        }
        if self.config.adapts(str(self.name), name):
            rank, alpha = self.config.lora_rank, self.config.lora_alpha
            return LoraDense(features, **settings, rank=rank, alpha=alpha)
        return nn.Dense(features, **settings)

    def layer_norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(
            epsilon=self.config.layer_norm_epsilon,
            use_bias=self.config.bias,
            # Two passes: E[x^2] - E[x]^2 loses digits where the mean is large.
            use_fast_variance=False,
            dtype=compute_dtype(self.config),
            name=name,
        )

    def dropout(self, x: jax.Array, rows: jax.Array) -> jax.Array:
        return Dropout(self.config.dropout, self.train)(x, rows)
