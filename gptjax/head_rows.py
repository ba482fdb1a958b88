"""Several heads in one row of the cache. A TPU's memory fills rows up to 128 numbers, so keys of 64
take the space, and the time to read, of 128; two heads in a row take what they are.

Queries are widened with zeros for the other heads of their row: more products, which a TPU has to
spare while it draws token after token, and no bytes.

Letters in shape comments: B batch, H heads, G heads in a row, T queries, D head size.
"""

import jax
import jax.numpy as jnp

LANES = 128
"""Numbers in a row of a TPU's memory."""


def group(n_head: int, head_size: int, lanes: int) -> int:
    """How many heads share a row of at most `lanes` numbers."""
    fits = [g for g in range(2, n_head + 1) if n_head % g == 0 and g * head_size <= lanes]
    return max(fits, default=1)


def join(x: jax.Array, group: int) -> jax.Array:
    """[B, H, T, D] -> [B, H / G, T, G D]."""
    b, h, t, d = x.shape
    if group == 1:
        return x
    return x.reshape(b, h // group, group, t, d).swapaxes(2, 3).reshape(b, h // group, t, group * d)


def widen(q: jax.Array, group: int) -> jax.Array:
    """[B, H, T, D] -> [B, H / G, T G, G D]: for each query and head of a row, zeros elsewhere."""
    b, h, t, d = q.shape
    if group == 1:
        return q
    own = jnp.eye(group, dtype=q.dtype)[:, :, None]  # [G, G, 1]
    apart = q.reshape(b, h // group, group, t, d).swapaxes(2, 3)[..., None, :] * own
    return apart.reshape(b, h // group, t * group, group * d)


def narrow(y: jax.Array, group: int) -> jax.Array:
    """[B, H / G, T G, G D] -> [B, H, T, D]: of each query's output its own head's."""
    if group == 1:
        return y
    b, rows, n, wide = y.shape
    apart = y.reshape(b, rows, n // group, group, group, wide // group)
    own = jnp.einsum("brtggd->brgtd", apart)
    return own.reshape(b, rows * group, n // group, wide // group)
