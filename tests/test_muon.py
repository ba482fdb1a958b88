"""Newton and Schulz's iteration, by its singular values; the update, by its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import muon

SHAPES = (12, 12), (8, 40), (40, 8), (2, 3, 8, 16), (16, 15)


def by_svd(x: np.ndarray, iterations: int) -> np.ndarray:
    """The polynomial of Jordan et al., applied to singular values that are known; in float64."""
    u, s, vt = np.linalg.svd(x.astype("f8"), full_matrices=False)
    s /= np.sqrt((s**2).sum(-1, keepdims=True))
    for _ in range(iterations):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s[..., None, :]) @ vt


@pytest.mark.parametrize("iterations", [1, 4, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_made_about_equal(shape, iterations):
    x = np.random.default_rng(0).standard_normal(shape, "f4")
    with jax.default_matmul_precision("highest"):
        found = muon.orthogonalise(jnp.asarray(x), iterations)
    np.testing.assert_allclose(found, by_svd(x, iterations), atol=1e-4)
    if iterations == 5 and shape != (12, 12):  # whose smallest is a thousandth of the largest
        values = np.linalg.svd(found, compute_uv=False)
        assert values.min() > 0.65 and values.max() < 1.25


def test_small_singular_values_keep_their_directions():
    """As gradients have, in which few directions count: some products are multiplied up apart from
    x where it is wide, which must not cost their digits."""
    draw = np.random.default_rng(0)
    u, v = (np.linalg.qr(draw.standard_normal((n, 128)))[0] for n in (128, 512))
    for power in 1, 2, 3:
        x = (u * np.arange(1, 129.0) ** -power @ v.T).astype("f4")
        with jax.default_matmul_precision("highest"):
            found = muon.orthogonalise(jnp.asarray(x))
        np.testing.assert_allclose(found, by_svd(x, 5), atol=2e-5)


@pytest.mark.parametrize("shape", [(24, 24), (16, 64)])
def test_bfloat16_is_near(shape):
    x = np.random.default_rng(1).standard_normal(shape, "f4")
    found = muon.orthogonalise(jnp.asarray(x), dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    expected = by_svd(x, 5)
    assert np.linalg.norm(found.astype("f4") - expected) < 0.1 * np.linalg.norm(expected)


def test_a_gradient_of_zeros_moves_nothing():
    assert not np.asarray(muon.orthogonalise(jnp.zeros((2, 4, 9)))).any()


def test_directions_follow_nesterovs_momentum_and_the_shape():
    """Jordan's update; queries, keys and values are matrices of their own."""
    draw = np.random.default_rng(0)
    shapes = {"c_attn": (2, 6, 18), "c_proj": (2, 6, 6), "c_fc": (2, 6, 24)}
    grads = [
        {name: {"kernel": draw.standard_normal(shape, "f4")} for name, shape in shapes.items()}
        for _ in range(3)
    ]
    transform = muon.scale_by_muon(beta=0.8, iterations=3)
    state = transform.init(grads[0])
    for gradient in grads:
        directions, state = transform.update(gradient, state)
    for name in shapes:
        momentum = np.zeros(shapes[name])
        for gradient in grads:
            momentum = 0.8 * momentum + 0.2 * gradient[name]["kernel"]
        ahead = 0.8 * momentum + 0.2 * grads[-1][name]["kernel"]
        parts = np.split(ahead, 3, axis=-1) if name == "c_attn" else [ahead]
        expected = np.concatenate([by_svd(part, 3) for part in parts], axis=-1)
        scale = 2.0 if name == "c_fc" else 1.0  # sqrt(24 / 6)
        np.testing.assert_allclose(directions[name]["kernel"], scale * expected, atol=1e-4)
        np.testing.assert_allclose(state.momentum[name]["kernel"], momentum, rtol=1e-4, atol=1e-6)
