"""The output head: logits, and the loss without the logits of all tokens at once. (50,257 float32
numbers a token are most of what a step of a small GPT-2 would hold.)

Letters in shape comments: B sequences, T tokens of each, C n_embd, V vocabulary, W rows of the
head's matrix, V or more (`ModelConfig.vocab_multiple`); K chunks of R tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.attention import MASKED

LOGITS = 1 << 27
"""At most so many logits are there at a time (or those of one token of each sequence)."""

LANES = 128
"""A chunk has a multiple of so many tokens of each sequence, where it can, as TPUs compute."""

Size = int | None
"""Of the vocabulary; None: as the head's matrix."""


def logits(x: jax.Array, head: jax.Array, vocab_size: Size) -> jax.Array:
    """x [..., C], head [W, C] -> float32 [..., V]."""
    # On two axes: XLA's CPU matmuls are much slower on three.
    rows = x.reshape(-1, x.shape[-1])
    found = jnp.einsum("nc,wc->nw", rows, head, preferred_element_type=jnp.float32)
    return found.reshape(*x.shape[:-1], -1)[..., :vocab_size]


def losses(x: jax.Array, head: jax.Array, targets: jax.Array, vocab_size: Size) -> jax.Array:
    """Nats of each of int targets [B, T], predicted from x [B, T, C] -> float32 [B, T]."""
    return _of_targets(lambda *args: _losses(*args)[0], x, head, targets, vocab_size)


def losses_and_hits(
    x: jax.Array, head: jax.Array, targets: jax.Array, vocab_size: Size
) -> tuple[jax.Array, jax.Array]:
    """(`losses`, bool [B, T]: whether each target is the likeliest token)."""

    def both(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _losses(logits, targets)[0], logits.argmax(-1) == targets

    return _of_targets(both, x, head, targets, vocab_size)


def _of_targets(
    function: Any, x: jax.Array, head: jax.Array, targets: jax.Array, vocab_size: Size
) -> Any:
    """Arrays [B, T] of what `function(logits [R, W], targets [R])` has as arrays [R]."""
    b, t = targets.shape
    parts = _chunks(x, targets, len(head))

    def chunk(_: None, part: Any) -> tuple[None, Any]:
        return None, function(_masked_logits(part[0], head, vocab_size), part[1])

    def whole(found: jax.Array) -> jax.Array:
        return found.reshape(-1, b, found.shape[1] // b).swapaxes(0, 1).reshape(b, -1)[:, :t]

    return jax.tree.map(whole, _over_chunks(chunk, None, parts)[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def mean_loss(x: jax.Array, head: jax.Array, targets: jax.Array, vocab_size: Size) -> jax.Array:
    """float32 []: the mean of `losses`.

    Its gradients are computed in the forward pass, chunk by chunk, where the logits are; the
    backward pass only scales them. So no product is computed twice. A head that is not trained gets
    no gradient.
    """
    return losses(x, head, targets, vocab_size).mean()


def _with_gradients(
    given_x: Any, given_head: Any, given_targets: Any, vocab_size: Size
) -> tuple[jax.Array, Any]:
    x, head, targets = given_x.value, given_head.value, given_targets.value
    trained = given_head.perturbed
    (b, t), c = targets.shape, x.shape[-1]
    xs, every_target = _chunks(x, targets, len(head))
    # What fills up the last chunk counts for nothing.
    counts = _chunks(jnp.ones((b, t, 1)), targets, len(head))[0]

    def chunk(total: Any, part: Any) -> tuple[Any, jax.Array]:
        x, targets, counts = part  # [R, C], [R], [R, 1]
        found = _masked_logits(x, head, vocab_size)
        nats, normaliser = _losses(found, targets)
        hits = targets[:, None] == jnp.arange(len(head))
        slope = ((jnp.exp(found - normaliser[:, None]) - hits) * counts).astype(x.dtype)
        by_head = None
        if trained:
            by_head = jnp.einsum("rw,rc->wc", slope, x, preferred_element_type=jnp.float32)
        return jax.tree.map(jnp.add, total, ((nats * counts[:, 0]).sum(), by_head)), slope @ head

    zeros = (jnp.zeros(()), jnp.zeros(head.shape) if trained else None)
    (nats, by_head), by_x = _over_chunks(chunk, zeros, (xs, every_target, counts))
    by_x = by_x.reshape(len(xs), b, -1, c).swapaxes(0, 1).reshape(b, -1, c)[:, :t]
    return nats / (b * t), (by_x, by_head, jnp.zeros((), head.dtype))


def _scale(vocab_size: Size, gradients: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    by_x, by_head, like_head = gradients
    scale = cotangent / (by_x.shape[0] * by_x.shape[1])
    to_x = (scale * by_x).astype(by_x.dtype)
    return to_x, None if by_head is None else (scale * by_head).astype(like_head.dtype), None


mean_loss.defvjp(_with_gradients, _scale, symbolic_zeros=True)


def _chunks(x: jax.Array, targets: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """([B, T, C], [B, T]) as ([K, R, C], [K, R]): some tokens of every sequence at a time, so that
    it does not matter how the sequences are shared out over devices. `rows`: logits of a token."""
    b, t, c = x.shape
    most = min(t, max(1, LOGITS // (b * rows)))
    unit = LANES if most >= LANES else 1
    least = -(-t // (most // unit * unit))

    def size_of(count: int) -> int:
        return -(-t // (count * unit)) * unit

    # As few as possible, but of those the number that leaves least to fill up.
    count = min(range(least, 2 * least + 1), key=lambda n: (n * size_of(n), n))
    size = size_of(count)
    fill = ((0, 0), (0, count * size - t))
    x, targets = jnp.pad(x, (*fill, (0, 0))), jnp.pad(targets, fill)
    x = x.reshape(b, count, size, c).swapaxes(0, 1).reshape(count, b * size, c)
    return x, targets.reshape(b, count, size).swapaxes(0, 1).reshape(count, b * size)


def _over_chunks(chunk: Any, first: Any, parts: Any) -> tuple[Any, Any]:
    """`jax.lax.scan`; a single one is no loop."""
    if len(parts[0]) > 1:
        return jax.lax.scan(chunk, first, parts)
    total, found = chunk(first, jax.tree.map(lambda x: x[0], parts))
    return total, jax.tree.map(lambda x: x[None], found)


def _masked_logits(x: jax.Array, head: jax.Array, vocab_size: Size) -> jax.Array:
    """[R, C] -> float32 [R, W], with those of padded ids masked."""
    found = logits(x, head, None)
    return jnp.where(jnp.arange(len(head)) < (vocab_size or len(head)), found, MASKED)


def _losses(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[R, W], [R] -> (nats [R], logarithm of the sum of exponentials [R])."""
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    return normaliser - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0], normaliser
