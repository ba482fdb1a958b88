"""Attention in one kernel, which never holds all scores at once (Dao et al., arXiv:2205.14135):
cuDNN's on NVIDIA GPUs, JAX's splash attention on TPUs, or there, with dropout, our own.
`attention.choose` says where they apply.

Letters in shape comments: B batch, H heads, T tokens, D head size.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LANES = 128
"""Splash attention takes tokens by so many."""

BLOCKS = 512, 256, 128
"""Queries, and keys, that it handles at a time. The larger, the fewer times keys are read; the more
of the scores above the diagonal are computed in vain."""

BLOCKED = (
    "block_q", "block_kv", "block_kv_compute",
    "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq",
)  # fmt: skip
"""What it calls them, in its three kernels."""


def attend(
    kernel: str, q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array,
    windows: tuple[int, ...], keys: jax.Array | None = None, rate: float = 0.0,
    documents: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """`attention.attend` with start 0, by the kernel "cudnn" or "splash".

    Args:
        q, k, v: [B, H, T, D].
        window: int32 []: how many tokens back this layer looks, its own included.
        windows: those of all layers; at most two different ones.
        keys: for dropout of the weights with probability `rate`, as `dropout_attention.attend`;
            None: none. Not with "cudnn".
        documents: int32 [B, T]: the number of each token's document, which sees no other; None: all
            are one. Only with "splash", without dropout.

    Returns:
        [B, H, T, D].
    """
    compute: Callable[..., jax.Array] = {"cudnn": with_cudnn, "splash": with_splash}[kernel]
    if keys is not None:
        assert kernel == "splash", kernel
        compute = functools.partial(with_dropout, keys=keys, rate=rate)
    if documents is not None:
        assert kernel == "splash" and keys is None, kernel
        compute = functools.partial(with_splash, documents=documents)
    narrow, *wide = sorted({min(reach, q.shape[2]) for reach in windows})
    if not wide:
        return compute(q, k, v, narrow)
    branches = (functools.partial(compute, window=reach) for reach in (narrow, *wide))
    return jax.lax.cond(window <= narrow, *branches, q, k, v)


def with_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, window: int) -> jax.Array:
    """bfloat16 [B, H, T, D]."""
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    reach = (window - 1, 0) if window < q.shape[1] else None
    y = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=reach, implementation="cudnn"
    )
    return y.transpose(0, 2, 1, 3)


def with_splash(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int,
    *, documents: jax.Array | None = None, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """[B, H, T, D]; float32 scores and sums. `interpret`: on a CPU, to test it."""
    # Not at the top: it takes 0.15 s, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    t, d = q.shape[2:]
    # Keys that are filled in come after all queries that count: none of these sees them.
    fill = ((0, 0), (0, 0), (0, -t % LANES), (0, 0))
    q, k, v = (jnp.pad(x, fill) for x in (q * (1 / math.sqrt(d)), k, v))
    size = block(t)
    shape = (q.shape[2],) * 2
    mask = masks.LocalMask(shape, (window - 1, 0), 0) if window < t else masks.CausalMask(shape)
    sizes: Any = dict.fromkeys(BLOCKED, size)
    # A TPU fills the innermost axis up to 128 numbers: the tokens, rather than a head's 64.
    layouts: Any = dict.fromkeys(("q_layout", "k_layout", "v_layout"), splash.QKVLayout.SEQ_MINOR)
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * q.shape[1]),
        block_sizes=splash.BlockSizes(**sizes, **layouts),
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    segments = None
    if documents is not None:
        documents = jnp.pad(documents, ((0, 0), (0, -t % LANES)), mode="edge")
        segments = splash.SegmentIds(documents, documents)
    return jax.vmap(kernel)(q, k, v, segments)[:, :, :t].astype(v.dtype)


LARGEST = 10 << 20
"""Bytes of a TPU's fast memory, of 16 MiB, for what `with_dropout` has there of a whole head."""


def fits_with_dropout(t: int, d: int) -> bool:
    """Whether fast memory has room for a head's keys and values, or in the backward pass queries
    and gradients with two rows of float32: twice, because the next head's come already."""
    return 2 * (2 * 2 * d + 2 * 4 * 8) * t <= LARGEST


def with_dropout(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int, keys: jax.Array, rate: float,
    *, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """`with_splash`, and dropout of the weights, which splash attention does not have."""
    from gptjax import dropout_attention  # only here, as above

    return dropout_attention.attend(
        q, k, v, keys, rate=rate, window=window, block=block(q.shape[2]), interpret=interpret
    )


def block(t: int) -> int:
    """Queries, and keys, that a TPU's kernel handles at a time, of `t` tokens."""
    filled = -(-t // LANES) * LANES
    return next(size for size in BLOCKS if filled % size == 0)
