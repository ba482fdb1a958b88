"""Random bits for dropout and sampling, by a hash.

JAX's own generators cost a fifth of a training step with dropout on a CPU, and more than the whole
network when a small model samples. Here number i is a hash of i and a key: a few integer operations
in the middle of other work, the same on every kind of device.
"""

import math

import jax
import jax.numpy as jnp

from gptjax import tricks


def mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser (Appleby 2011) of uint32 numbers: one to one, and every bit of the
    argument acts on every bit of the result."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def random_bits(keys: jax.Array, size: int) -> jax.Array:
    """uint32 [..., size] for uint32 keys [..., 2], each of which has its own stream."""
    if not tricks.enabled("hashed_random"):

        def bits(key: jax.Array) -> jax.Array:
            own = jax.random.wrap_key_data(key, impl="threefry2x32")
            return jax.random.bits(own, (size,), jnp.uint32)

        return jnp.vectorize(bits, signature="(k)->(n)")(keys)
    return _bits(jax.lax.iota(jnp.uint32, size), keys[..., :1], keys[..., 1:])


def _bits(number: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    return mix(mix(number ^ first) + second)


def kept(number: jax.Array, first: jax.Array, second: jax.Array, rate: float) -> jax.Array:
    """Whether number `number` (uint32) of an array is kept by `dropout_mask`; `first` and `second`
    of its sequence's `dropout_keys`."""
    return _keeps(_bits(number, first, second), rate)


def _keeps(bits: jax.Array, rate: float) -> jax.Array:
    return bits >= jnp.uint32(rate * 2**32)


def dropout_mask(key: jax.Array, rows: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """bool `shape`: whether to keep each number of an array whose leading axis is, or begins with,
    the batch; each is dropped with probability `rate`.

    An array with more than 2^32 numbers a sequence (16 heads of 16,384 tokens) repeats its mask.

    The mask of a sequence follows from the key and from `rows` (int32 [B], the sequences' numbers
    in the global batch): it does not matter which device computes it, or in which micro-batch.
    """
    size = math.prod(shape) // rows.size
    return _keeps(random_bits(dropout_keys(key, rows), size), rate).reshape(shape)


def dropout_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
    """uint32 [B, 2], of the sequences `rows` (int32 [B])."""
    bits = jax.random.bits(key, (2,), jnp.uint32)
    first = jnp.broadcast_to(bits[0], rows.shape)
    return jnp.stack([first, mix(rows.astype(jnp.uint32) ^ bits[1])], -1)


def gumbel(keys: jax.Array, size: int) -> jax.Array:
    """float32 [..., size] numbers of the standard Gumbel distribution, all of them finite, for
    uint32 keys [..., 2]."""
    # In the middle of 2^32 steps, and less than 1 after rounding too. Large noise, by which rare
    # tokens are drawn, comes from numbers near 0, where float32 has the digits for all of the bits.
    steps = random_bits(keys, size).astype(jnp.float32) + 0.5
    uniform = jnp.minimum(steps * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))
