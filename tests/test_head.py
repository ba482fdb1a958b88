"""The loss without all logits, against the formula with all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import head
from gptjax.devices import roofline

DRAW = np.random.default_rng(0)
B, T, C, V = 3, 11, 5, 13


def plain(x, matrix, targets, vocab_size):
    logits = jnp.einsum("btc,vc->btv", x, matrix)[..., :vocab_size]
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


@pytest.fixture(params=[1 << 27, 2 * B * V, 4 * B * V, 1], ids=["1", "6", "3", "11"])
def chunks(request, monkeypatch):
    """How many; the last one is not always full."""
    monkeypatch.setattr(head, "LOGITS", request.param)


@pytest.mark.parametrize("rows", [V, 16])
def test_losses_and_gradients_are_those_of_all_logits(chunks, rows):
    x, targets = DRAW.standard_normal((B, T, C)).astype("f4"), DRAW.integers(0, V, (B, T))
    matrix = DRAW.standard_normal((rows, C)).astype("f4")
    losses = head.losses(x, matrix, targets, V)
    np.testing.assert_allclose(losses, plain(x, matrix, targets, V), rtol=1e-5)

    also, hits = head.losses_and_hits(x, matrix, targets, V)
    np.testing.assert_array_equal(also, losses)
    np.testing.assert_array_equal(hits, (x @ matrix[:V].T).argmax(-1) == targets)
    _, hits = head.losses_and_hits(x, matrix, (x @ matrix[:V].T).argmax(-1), V)
    assert hits.all()

    def ours(x, matrix):
        return 3 * head.mean_loss(x, matrix, targets, V)

    def expected(x, matrix):
        return 3 * plain(x, matrix, targets, V).mean()

    value, gradients = jax.value_and_grad(ours, (0, 1))(x, matrix)
    expected_value, expected_gradients = jax.value_and_grad(expected, (0, 1))(x, matrix)
    assert float(value) == pytest.approx(float(expected_value), rel=1e-6)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert float(head.mean_loss(x, matrix, targets, V)) == pytest.approx(float(value) / 3)


@pytest.mark.parametrize(
    ("sequences", "t"), [(3, 1024), (4, 1024), (6, 1024), (24, 1024), (4, 2048)]
)
def test_little_is_computed_to_fill_up_chunks(sequences, t):
    shapes = (sequences, t, 64), (50257, 64), (sequences, t)
    x, matrix, targets = (
        jax.ShapeDtypeStruct(s, kind) for s, kind in zip(shapes, ("f4", "f4", "i4"), strict=True)
    )
    program = jax.jit(lambda *args: head.losses(*args, 50257)).lower(x, matrix, targets).compile()
    needed = 2 * sequences * t * 50257 * 64
    flops = roofline.Program(program.as_text()).cost().flops
    plain_chunk = 8 * sequences * t * 50257  # masks, maxima, exponentials: not products
    assert needed < flops < 1.05 * needed + plain_chunk


def test_in_bfloat16_logits_and_sums_are_float32(chunks):
    x, matrix = (jnp.asarray(4 * DRAW.standard_normal(s), "bfloat16") for s in ((B, T, C), (V, C)))
    targets = DRAW.integers(0, V, (B, T))
    exact = np.asarray(plain(*(np.asarray(a, "f4") for a in (x, matrix)), targets, V))
    np.testing.assert_allclose(head.losses(x, matrix, targets, V), exact, rtol=1e-5, atol=1e-5)
    gradients = jax.grad(head.mean_loss, (0, 1))(x, matrix, targets, V)
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 2


def test_not_all_logits_are_there_at_once(monkeypatch):
    monkeypatch.setattr(head, "LOGITS", 64 * 1000)
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 64, 16), (1000, 16))]
    targets = jax.ShapeDtypeStruct((8, 64), jnp.int32)

    def scratch(loss):
        step = jax.jit(jax.grad(lambda *args: loss(*args, 1000).mean(), (0, 1)))
        return step.lower(*shapes, targets).compile().memory_analysis().temp_size_in_bytes

    assert scratch(head.mean_loss) < scratch(plain) / 4
    assert scratch(plain) > 4 * 8 * 64 * 1000
