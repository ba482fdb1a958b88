"""Causal attention, dense and banded, and which kernel computes it.

Letters in shape comments: B batch, H heads, T queries, S keys, D head size.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gptjax import flash_attention, hashed_random, head_rows, tricks
from gptjax.config import ModelConfig
from gptjax.runtime_config import ComputeConfig

MASKED = -1e30
"""The score of a key that a query must not see; its weight is exactly 0. (Finite, so that no
difference of two such scores is NaN.)"""

QUERIES_AT_A_TIME = 32, 128
"""Of `attend_in_blocks`: at least, and as many as pay off. Below the second all come at once."""


def choose(
    config: ModelConfig, compute: ComputeConfig, device: Any = None, *, train: bool,
    packed: bool = False,
) -> tuple[Literal["xla", "blocks", "cudnn", "splash"], str]:  # fmt: skip
    """(kernel, why): a flash attention kernel where it can compute this model on `device` (None:
    JAX's first); blocks of queries on a CPU; else "xla". `config.dtype` is resolved already.
    `packed`: documents are kept apart."""
    if compute.attention == "xla":
        return "xla", "asked for"
    device = device or jax.devices()[0]
    dropout = train and config.dropout > 0
    if compute.attention == "blocks" or (compute.attention, device.platform) == ("auto", "cpu"):
        size = queries_at_a_time(config.block_size)
        if dropout and not tricks.enabled("hashed_random"):
            return "xla", "blocks need hashed_random for dropout"
        if size >= config.block_size and compute.attention == "auto":
            return "xla", f"all {config.block_size} queries at a time"
        return "blocks", f"{size} queries at a time, without the keys after them"
    nvidia = device.platform == "gpu" and "rocm" not in device.client.platform_version.lower()
    ampere = nvidia and float(device.compute_capability) >= 8.0
    tpu = device.platform == "tpu"
    kernel = compute.attention if compute.attention != "auto" else "splash" if tpu else "cudnn"
    name = {"splash": "splash attention", "cudnn": "cuDNN"}[kernel]
    cudnn = kernel == "cudnn"
    obstacles = [
        (cudnn and not nvidia, "needs an NVIDIA GPU"),
        (cudnn and nvidia and not ampere, "needs compute capability 8.0"),
        (not cudnn and not tpu, "needs a TPU"),
        (config.dtype != "bfloat16", "needs bfloat16"),
        (
            cudnn and (config.head_size > 128 or config.head_size % 8 != 0),
            "needs a head size that is a multiple of 8 up to 128",
        ),
        (cudnn and config.block_size % 2 != 0, "needs an even block_size"),
        (cudnn and dropout, "cannot apply our attention dropout"),
        (cudnn and packed, "cannot keep documents apart"),
        (packed and dropout, "cannot keep documents apart and apply dropout"),
        (dropout and not tricks.enabled("hashed_random"), "needs hashed_random for dropout"),
        (
            not cudnn
            and dropout
            and not flash_attention.fits_with_dropout(config.block_size, config.head_size),
            "with dropout needs a smaller block_size",
        ),
        (
            cudnn and compute.attention == "auto" and "banded" in config.attention_pattern,
            "has a window for banded layers, but it is not yet tried: ask with --attention cudnn",
        ),
    ]
    reasons = [f"{name} {reason}" for applies, reason in obstacles if applies]
    if reasons:
        return "xla", ", ".join(reasons)
    if cudnn:
        return "cudnn", "flash attention"
    size = flash_attention.block(config.block_size)
    own = ", with dropout by gptjax's own kernel" if dropout else ""
    return "splash", f"flash attention{own}, in blocks of {size} x {size}"


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array | int,
    window: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] = lambda weights: weights,
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v over the keys up to each query's own position ("Attention is all
    you need", arXiv:1706.03762, section 3.2.1); softmax in float32.

    Args:
        q: [B, H, T, D]; the first query has position `start` [].
        k, v: [B, H, S, D], from position 0; those after a query's position are masked, so it does
            not matter what they hold. Or [B, H / G, S, G D], with G heads in a row (`head_rows`).
        window: int32 [], or [B, T]: how many tokens back a query sees, its own included; None: all.
        dropout: of the attention weights [B, H, T, S].

    Returns:
        [B, H, T, D].
    """
    b = q.shape[0]
    each = window is not None and jnp.ndim(window) == 2  # query has a window of its own
    if q.shape[2] == 1 and not each:
        # Batch and heads as one axis, for XLA's CPU compiler: with two it moves the product into
        # the loop that reads the cache, and copies every cache for it (8 samples: 3.6 ms a token
        # instead of 0.7). With more queries two are faster, by a tenth of a training step.
        q, k, v = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
    group = k.shape[-1] // q.shape[-1]
    queries = head_rows.widen(q, group)
    scores = jnp.einsum("bhtd,bhsd->bhts", queries, k, preferred_element_type=jnp.float32)
    scores *= 1 / math.sqrt(q.shape[-1])
    distance = (start + jnp.arange(queries.shape[2]) // group)[:, None] - jnp.arange(k.shape[2])
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < (window[:, None, :, None] if each else window))
    weights = jax.nn.softmax(jnp.where(visible, scores, MASKED), axis=-1).astype(v.dtype)
    weights = dropout(weights.reshape(b, -1, *weights.shape[2:])).reshape(weights.shape)
    y = head_rows.narrow(jnp.einsum("bhts,bhsd->bhtd", weights, v), group)
    return y.reshape(b, -1, *y.shape[2:])


def queries_at_a_time(t: int) -> int:
    """Of `attend_in_blocks` with `t` tokens.

    Training 0.8M parameters on two CPU cores becomes 1.10, 1.24, 1.25 and 1.62 times as fast at
    128, 256, 512 and 1024 tokens (1.02 times at 64). Compiling becomes slower, by a third to a half
    of its time: so there are at most 8 blocks, and few tokens come at once.
    """
    least, most = QUERIES_AT_A_TIME
    if t < most:
        return t
    return max(min(max(least, -(-t // 4)), most), -(-t // 8))


def attend_in_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: jax.Array | None = None,
    keys: jax.Array | None = None,
    rate: float = 0.0,
) -> jax.Array:
    """As `attend` with `start` 0 and S = T: some queries at a time, with the keys up to the last of
    them. So of the scores that are masked, which are half of all, most are never computed.

    `keys`, `rate`: as of `flash_attention.attend`.
    """
    t, size = q.shape[2], queries_at_a_time(q.shape[2])

    def drop(weights: jax.Array, first: int) -> jax.Array:
        """The mask of `Dropout`, of the queries from `first` on."""
        if keys is None:
            return weights
        h, n, m = (
            jax.lax.broadcasted_iota(jnp.uint32, weights.shape[1:], axis) for axis in range(3)
        )
        number = (h * t + n + jnp.uint32(first)) * t + m
        first_key, second_key = (keys[:, i, None, None, None] for i in range(2))
        kept = hashed_random.kept(number, first_key, second_key, rate)
        return jnp.where(kept, weights / (1 - rate), jnp.zeros((), weights.dtype))

    def block(first: int) -> jax.Array:
        queries = q[:, :, first : first + size]
        end = first + queries.shape[2]
        reach = window if window is None or jnp.ndim(window) < 2 else window[:, first:end]
        dropout = functools.partial(drop, first=first)
        return attend(queries, k[:, :, :end], v[:, :, :end], first, reach, dropout)

    return jnp.concatenate([block(first) for first in range(0, t, size)], axis=2)
