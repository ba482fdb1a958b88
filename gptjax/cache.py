"""The key/value cache of decoding, as an explicit pytree, and how it lies in memory.

Letters in shape comments: L layers, B batch, H heads, T new tokens, S slots, D head size.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax import head_rows
from gptjax.config import ModelConfig


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far."""

    keys: Any
    """[L, B H, S, D]; for unstacked parameters (`decode_layout`) a tuple of L arrays [B H, S, D].
    B and H are one axis, because XLA makes one of them anyway, and writes every new key and value
    twice for it (500 tokens at 0.8M: 88 ms with two axes, 49 ms with one)."""
    values: Any
    """As `keys`."""
    length: jax.Array
    """int32 []: how many of the S slots hold tokens."""


LayerCache = tuple[jax.Array, jax.Array] | None
"""One layer's keys and values, [B H, S, D] each; None: nothing is cached."""


def init_cache(
    config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype, *, stacked: bool = True,
    lanes: int = 1,
) -> Cache:  # fmt: skip
    """An empty cache for `batch` sequences of at most `slots` tokens; `lanes`: see `head_rows`."""
    group = head_rows.group(config.n_head, config.head_size, lanes)
    shape = (batch * config.n_head // group, slots, group * config.head_size)

    def empty() -> Any:
        if stacked:
            return jnp.zeros((config.n_layer, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layer))

    return Cache(empty(), empty(), jnp.zeros((), jnp.int32))


def append(
    cache: LayerCache, k: jax.Array, v: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array, LayerCache]:
    """Write new keys and values [B, H, T, D] from slot `start` [] on; (all keys and all values so
    far [B, H, S, D], or with G heads in a row [B, H / G, S, G D]; the cache). Without a cache, just
    the new ones."""
    if cache is None:
        return k, v, None
    group = cache[0].shape[-1] // k.shape[-1]
    b, rows, t, d = head_rows.join(k, group).shape

    def write(slots: jax.Array, new: jax.Array) -> jax.Array:
        new = head_rows.join(new, group).reshape(b * rows, t, d)
        return jax.lax.dynamic_update_slice(slots, new, (0, start, 0))

    keys, values = write(cache[0], k), write(cache[1], v)
    return keys.reshape(b, rows, -1, d), values.reshape(b, rows, -1, d), (keys, values)
