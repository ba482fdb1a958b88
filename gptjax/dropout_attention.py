"""Flash attention with dropout of the attention weights, for TPUs: no array of all scores (Dao et
al., arXiv:2205.14135), and the very masks that `hashed_random.dropout_mask` makes, computed where
they are needed, in the forward and again in the backward pass.

Letters in shape comments: B batch, H heads, T tokens, D head size; in the kernels Q queries and K
keys of a block. Tokens lie along the innermost axis, which a TPU fills up to 128 numbers; so what
belongs to a query (the largest score, the sum of weights) is a row [1, Q].
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gptjax import hashed_random

MASKED = -1e30
"""As `attention.MASKED`."""


class _Shape(NamedTuple):
    """What the kernels are compiled for."""

    tokens: int
    """Before they were filled up to whole blocks."""
    window: int
    block: int
    rate: float
    interpret: bool


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, *,
    rate: float, window: int, block: int, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """`attention.attend` with start 0; float32 scores and sums.

    Args:
        q, k, v: [B, H, T, D].
        keys: uint32 [B, 2], from `hashed_random.dropout_keys`.
        rate: each weight is dropped with this probability, in (0, 1).
        window: how many tokens back a query sees, its own included.
        block: queries, and keys, at a time: a multiple of 128.
        interpret: on a CPU, to test it.

    Returns:
        [B, H, T, D].
    """
    t, d = q.shape[2:]
    shape = _Shape(t, min(window, t), block, rate, interpret)
    # Keys that are filled in come after all queries that count: none of these sees them.
    fill = ((0, 0), (0, 0), (0, 0), (0, -t % block))
    q, k, v = (jnp.pad(x.swapaxes(2, 3), fill) for x in (q * (1 / math.sqrt(d)), k, v))
    return _attend(shape, q, k, v, keys)[..., :t].swapaxes(2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(shape: _Shape, q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array) -> jax.Array:
    """All [B, H, D, T], T whole blocks."""
    return _forward(shape, q, k, v, keys)[0]


def _forward(shape: _Shape, q: Any, k: Any, v: Any, keys: Any) -> tuple[Any, Any]:
    sums = jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[3]), jnp.float32)
    y, total = _run(_forward_kernel, shape, keys, (q,), (k, v), (q, sums))
    # By these names `remat` keeps them, so that the backward pass need not compute them again.
    y, total = checkpoint_name(y, "attention"), checkpoint_name(total, "attention")
    return y, (q, k, v, keys, y, total)


def _backward(shape: _Shape, saved: Any, dy: jax.Array) -> tuple[Any, ...]:
    q, k, v, keys, y, total = saved
    # d score = weight (d weight - the query's sum of weight d weight), and that sum is dy . y.
    mean = (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(2, keepdims=True)
    (dq,) = _run(_dq_kernel, shape, keys, (q, dy, total, mean), (k, v), (q,))
    dk, dv = _run(_dkv_kernel, shape, keys, (k, v), (q, dy, total, mean), (k, v))
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def _run(
    kernel: Any, shape: _Shape, keys: Any, blocks: Any, whole: Any, out: Any
) -> tuple[jax.Array, ...]:
    """`kernel` for every block of every head of every sequence. It is given the keys, of `blocks`
    and `out` [B, H, ..., T] this block, of `whole` all tokens."""

    def spec(x: Any, size: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, x.shape[2], size), lambda b, h, i: (b, h, 0, i if size < x.shape[3] else 0)
        )

    b, h, _, t = blocks[0].shape
    return pl.pallas_call(
        functools.partial(kernel, shape),
        grid=(b, h, t // shape.block),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *(spec(x, shape.block) for x in blocks),
            *(spec(x, t) for x in whole),
        ],
        out_specs=[spec(x, shape.block) for x in out],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in out],
        interpret=shape.interpret,
        name=f"dropout_{kernel.__name__.split('_')[1]}_{_blocks(shape, t)}x{shape.block}",
    )(keys, *blocks, *whole)


def _blocks(shape: _Shape, t: int) -> int:
    """How many blocks of [queries, keys] have a score that is seen, of `t` tokens."""
    size = shape.block
    first = (max(0, i * size - shape.window + 1) // size for i in range(t // size))
    return sum(i + 1 - at for i, at in enumerate(first))


def _product(x: jax.Array, y: jax.Array, *axes: int) -> jax.Array:
    """Sums over these axes of x and y, in float32."""
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x, y, numbers, preferred_element_type=jnp.float32)


def _scores(shape: _Shape, q: Any, k: Any, i: Any, j: Any) -> jax.Array:
    """float32 [K, Q] of query block `i` and key block `j`."""
    scores = _product(k, q, 0, 0)
    distance = _number(shape, i, scores.shape, 1) - _number(shape, j, scores.shape, 0)
    return jnp.where((distance >= 0) & (distance < shape.window), scores, MASKED)


def _number(shape: _Shape, block: Any, size: tuple[int, ...], axis: int) -> jax.Array:
    """int32 [K, Q]: the number of each query (axis 1) or key (axis 0)."""
    return block * shape.block + jax.lax.broadcasted_iota(jnp.int32, size, axis)


def _hash(shape: _Shape, keys: Any) -> tuple[Any, Any, Any]:
    """(first key, second key, number of the first weight of this head by `shape.tokens`)."""
    sequence, head = pl.program_id(0), pl.program_id(1)
    return keys[sequence, 0], keys[sequence, 1], head * shape.tokens


def _kept(shape: _Shape, hashing: tuple[Any, Any, Any], i: Any, j: Any) -> jax.Array:
    """float32 [K, Q]: 1 / (1 - rate) where a weight is kept, else 0."""
    first, second, start = hashing
    size = (shape.block, shape.block)
    row = start + _number(shape, i, size, 1)
    number = (row * shape.tokens + _number(shape, j, size, 0)).astype(jnp.uint32)
    return jnp.where(
        hashed_random.kept(number, first, second, shape.rate), 1 / (1 - shape.rate), 0.0
    )


def _part(shape: _Shape, x: Any, block: Any) -> jax.Array:
    """A block of an array with all tokens."""
    return x[:, pl.ds(pl.multiple_of(block * shape.block, shape.block), shape.block)]


def _first_keys(shape: _Shape, i: Any) -> Any:
    """The first block with keys that query block `i` sees."""
    first = jnp.maximum(0, i * shape.block - shape.window + 1)
    return jax.lax.div(first, shape.block)  # on a TPU // is more than a division


def _last_queries(shape: _Shape, j: Any, blocks: int) -> Any:
    """The last block with queries that see key block `j`."""
    last = (j + 1) * shape.block + shape.window - 2
    return jnp.minimum(blocks - 1, jax.lax.div(last, shape.block))


def _forward_kernel(shape: _Shape, keys: Any, q: Any, k: Any, v: Any, y: Any, total: Any) -> None:
    """y = softmax(q k) v [D, Q]; `total` [1, Q]: the logarithm of the sum of exp(score)."""
    i, queries, hashing = pl.program_id(2), q[...], _hash(shape, keys)

    def add(j: Any, so_far: Any) -> Any:
        largest, weight, sums = so_far
        scores = _scores(shape, queries, _part(shape, k, j), i, j)
        new = jnp.maximum(largest, scores.max(0, keepdims=True))
        scale, weights = jnp.exp(largest - new), jnp.exp(scores - new)
        weight = weight * scale + weights.sum(0, keepdims=True)
        values = _part(shape, v, j)
        part = _product(values, (weights * _kept(shape, hashing, i, j)).astype(values.dtype), 1, 0)
        return new, weight, sums * scale + part

    row = jnp.zeros((1, shape.block), jnp.float32)
    start = row + MASKED, row, jnp.zeros(q.shape, jnp.float32)
    largest, weight, sums = jax.lax.fori_loop(_first_keys(shape, i), i + 1, add, start)
    y[...] = (sums / weight).astype(y.dtype)
    total[...] = largest + jnp.log(weight)


def _gradient(
    shape: _Shape, hashing: tuple[Any, Any, Any], i: Any, j: Any,
    q: Any, dy: Any, total: Any, mean: Any, k: Any, v: Any,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(the weights that are kept, scaled up; the gradient of the scores), both [K, Q]."""
    weights, kept = jnp.exp(_scores(shape, q, k, i, j) - total), _kept(shape, hashing, i, j)
    return weights * kept, weights * (_product(v, dy, 0, 0) * kept - mean)


def _dq_kernel(
    shape: _Shape, keys: Any, q: Any, dy: Any, total: Any, mean: Any, k: Any, v: Any, dq: Any
) -> None:
    i, hashing = pl.program_id(2), _hash(shape, keys)
    query = q[...], dy[...], total[...], mean[...]

    def add(j: Any, sums: Any) -> Any:
        key = _part(shape, k, j)
        _, gradient = _gradient(shape, hashing, i, j, *query, key, _part(shape, v, j))
        return sums + _product(key, gradient.astype(key.dtype), 1, 0)

    start = jnp.zeros(q.shape, jnp.float32)
    dq[...] = jax.lax.fori_loop(_first_keys(shape, i), i + 1, add, start).astype(dq.dtype)


def _dkv_kernel(
    shape: _Shape, keys: Any, k: Any, v: Any, q: Any, dy: Any, total: Any, mean: Any,
    dk: Any, dv: Any,
) -> None:  # fmt: skip
    j, hashing = pl.program_id(2), _hash(shape, keys)
    key, value = k[...], v[...]

    def add(i: Any, sums: Any) -> Any:
        query, dquery, sums_of, mean_of = (_part(shape, x, i) for x in (q, dy, total, mean))
        weights, gradient = _gradient(
            shape, hashing, i, j, query, dquery, sums_of, mean_of, key, value
        )
        return (
            sums[0] + _product(query, gradient.astype(key.dtype), 1, 1),
            sums[1] + _product(dquery, weights.astype(value.dtype), 1, 1),
        )

    zeros = jnp.zeros(k.shape, jnp.float32)
    last = _last_queries(shape, j, q.shape[1] // shape.block)
    sums = jax.lax.fori_loop(j, last + 1, add, (zeros, zeros))
    dk[...], dv[...] = (x.astype(dk.dtype) for x in sums)
