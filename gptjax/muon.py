"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): a matrix moves along its momentum,
whose singular values are first made about equal.

Letters in shape comments: L layers, [m, n] a matrix.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax import sharding

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the polynomial a x + b x^3 + c x^5, applied to the singular values again and again."""

EPSILON = 1e-7


def orthogonalise(x: jax.Array, iterations: int = 5, dtype: Any = jnp.float32) -> jax.Array:
    """[..., m, n] -> [..., m, n] in `dtype`, in which it is computed: the nearest matrix with
    orthonormal rows or columns, roughly (after 5 of Newton and Schulz's iterations, singular values
    above a hundredth of the largest are between 0.7 and 1.2)."""
    if x.shape[-2] > x.shape[-1]:
        return orthogonalise(x.mT, iterations, dtype).mT
    x = x.astype(dtype)
    x /= jnp.maximum(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True), EPSILON)
    a, b, c = COEFFICIENTS
    # Factors are polynomials in x x^T, so some can be multiplied up before x is: fewer products
    # where x is wide. But errors of a small singular value's square grow 12-fold with each. With
    # all of float32's digits (which a CPU's products have) 3 at a time come out as exact as 1, but
    # 5 up to 75 times worse.
    digits = dtype == jnp.float32 and jax.default_backend() == "cpu"
    together = 3 if digits and x.shape[-1] >= 2 * x.shape[-2] else 1
    identity = jnp.eye(x.shape[-2], dtype=dtype)
    for first in range(0, iterations, together):
        count = min(together, iterations - first)
        gram, product = x @ x.mT, identity
        for i in range(count):
            factor = a * identity + b * gram + c * (gram @ gram)
            product = factor if i == 0 else factor @ product
            if i < count - 1:
                gram = gram @ (factor @ factor)
        x = product @ x
    return x


class State(NamedTuple):
    """Of `scale_by_muon`."""

    momentum: Any
    """A tree like that of the matrices."""


def scale_by_muon(
    beta: float, iterations: int = 5, dtype: Any = jnp.float32, shared: Any = None
) -> optax.GradientTransformation:
    """Of gradients [L, m, n] of stacked kernels x -> x W; the directions are scaled by
    sqrt(max(1, n / m)), as in Jordan's implementation and torch.optim.Muon. The three matrices of
    c_attn, for queries, keys and values, are orthogonalised apart.

    `shared`: a tree of the axes along which a device has a part of a matrix (`sharding.axes`). Then
    every device makes some of the L matrices whole, and works on these. None: all are whole.
    """

    def update(grads: Any, state: State, params: Any = None) -> tuple[Any, State]:
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.momentum, grads)
        nesterov = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, momentum, grads)

        def direction(path: Any, x: jax.Array, axis: int) -> jax.Array:
            count = 3 if path[-2].key == "c_attn" else 1

            def of_whole(x: jax.Array) -> jax.Array:
                layers, m, n = x.shape
                apart = x.reshape(layers, m, count, n // count).swapaxes(1, 2)
                found = orthogonalise(apart, iterations, dtype)
                return found.swapaxes(1, 2).reshape(x.shape) * max(1, n / count / m) ** 0.5

            # In `dtype`: where that is bfloat16, half as much is sent.
            return sharding.by_layers(of_whole, x.astype(dtype), axis).astype(x.dtype)

        axes = jax.tree.map(lambda _: sharding.WHOLE, grads) if shared is None else shared
        directions = jax.tree_util.tree_map_with_path(direction, nesterov, axes)
        return directions, State(momentum)

    def init(params: Any) -> State:
        return State(jax.tree.map(jnp.zeros_like, params))

    return optax.GradientTransformation(init, update)
