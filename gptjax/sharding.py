"""Weights that are shared out: under `devices.fsdp` a device holds a part of each matrix, and of
the optimizer's moments of it. The parts are gathered where they are used, one block at a time, in
the forward pass and again in the backward pass, and gradients come back as parts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name

SHARDS = "shards"
"""What the names of the mapped axes begin with over which `devices.fsdp` lays out a step: one, or
those of a TPU's torus."""

WHOLE = -1
"""Instead of an axis: the device has the whole array."""


def mapped_axes() -> tuple[str, ...]:
    """These axes, where the caller is traced for one device of them; else ()."""
    names = jax.sharding.get_abstract_mesh().axis_names
    return tuple(name for name in names if name.startswith(SHARDS))


def axes(parts: Any, whole: Any) -> Any:
    """Of each array of a tree the axis along which it is a part of that in `whole`, or WHOLE."""

    def axis(part: Any, full: Any) -> int:
        differ = [i for i, (a, b) in enumerate(zip(part.shape, full.shape)) if a != b]  # noqa: B905
        return differ[0] if differ else WHOLE

    return jax.tree.map(axis, parts, whole)


def gather(parts: Any, axes: Any, dtype: jnp.dtype) -> Any:
    """The whole arrays of a tree; those that come in parts in precision `dtype`. The backward pass
    adds up their gradients over all devices, in float32, and leaves each its part."""
    return jax.tree.map(
        lambda x, axis: x if axis == WHOLE else _gather(x, axis, jnp.dtype(dtype)), parts, axes
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(part: jax.Array, axis: int, dtype: jnp.dtype) -> jax.Array:
    whole = part.astype(dtype)
    # One axis of the torus after the other: at once XLA would add up arrays filled with zeros, or
    # whole gradients, which sends twice as much.
    for name in reversed(mapped_axes()):
        whole = jax.lax.all_gather(whole, name, axis=axis, tiled=True)
    return checkpoint_name(whole, "weights")


def _gather_forward(part: jax.Array, axis: int, dtype: jnp.dtype) -> tuple[jax.Array, None]:
    return _gather(part, axis, dtype), None


def _gather_backward(axis: int, _: Any, __: None, gradient: jax.Array) -> tuple[jax.Array]:
    part = gradient.astype(jnp.float32)
    for name in mapped_axes():
        part = jax.lax.psum_scatter(part, name, scatter_dimension=axis, tiled=True)
    return (part,)


_gather.defvjp(_gather_forward, _gather_backward)


def by_layers(function: Callable[[jax.Array], jax.Array], part: jax.Array, axis: int) -> jax.Array:
    """`function` of whole matrices [layers, m, n] -> the same shape, of which the device has a part
    along `axis`: each device gets some of the layers."""
    if axis == WHOLE:
        return function(part)
    names, layers = mapped_axes(), len(part)
    fill = -layers % jax.lax.axis_size(names)
    some = jnp.pad(part, ((0, fill), (0, 0), (0, 0)))
    some = jax.lax.all_to_all(some, names, split_axis=0, concat_axis=axis, tiled=True)
    found = function(some)
    return jax.lax.all_to_all(found, names, split_axis=axis, concat_axis=0, tiled=True)[:layers]


def average(gradients: Any, axes: Any, axis_name: str | tuple[str, ...]) -> Any:
    """The mean over all devices. Of parts the sum is there already, by `gather`."""
    count = jax.lax.axis_size(axis_name)
    return jax.tree.map(
        lambda x, axis: jax.lax.pmean(x, axis_name) if axis == WHOLE else x / count,
        gradients,
        axes,
    )


def norm(tree: Any, axes: Any) -> jax.Array:
    """float32 []: the Euclidean norm of all numbers of the whole arrays."""
    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(axes), strict=True))
    parts = [x for x, axis in pairs if axis != WHOLE]
    whole = optax.tree.norm([x for x, axis in pairs if axis == WHOLE], squared=True)
    if parts:
        whole += jax.lax.psum(optax.tree.norm(parts, squared=True), mapped_axes())
    return jnp.sqrt(whole)
