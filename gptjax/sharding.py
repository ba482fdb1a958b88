"""What fully sharded training has to say inside the model; elsewhere these calls do nothing.

Under `devices.fsdp` every device holds a share of each matrix and some of the sequences. Left to
itself XLA moves activations to the shares of the weights, and activations are larger: 12.6 GB of
temporary memory at 124M on 8 devices. Two constraints make it gather one layer's weights at a time.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec

SHARDS = "shards"
"""The mesh axis that weights and sequences are shared out over."""


def is_sharded() -> bool:
    """Whether the caller is traced for `devices.fsdp`, which sets a mesh with this axis."""
    return SHARDS in jax.sharding.get_abstract_mesh().axis_names


def gather_weights(weights: jax.Array) -> jax.Array:
    """Weights at their use: gathered from their shares, for this use only."""
    return jax.lax.with_sharding_constraint(weights, PartitionSpec()) if is_sharded() else weights


def dot_with_gathered_weights(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any):
    """`jax.lax.dot_general`, for `flax.linen.Dense`."""
    return jax.lax.dot_general(x, gather_weights(kernel), *args, **kwargs)


def keep_by_sequence(x: jax.Array) -> jax.Array:
    """Activations [B, ...] or [B T, ...] stay with the devices that have their sequences."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec(SHARDS)) if is_sharded() else x


def saves_no_gathered_weights(operation: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: the backward pass gathers weights again."""
    return operation.name not in ("sharding_constraint", "convert_element_type")
