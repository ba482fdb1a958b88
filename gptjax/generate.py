"""Sampling: token ids in, token ids out. It knows nothing of text.

A prompt is padded to a power of two ("bucket"), so a new length seldom compiles anew; the sampling
settings are arrays, so changing them never does.
"""

import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.model import MASKED, Cache, apply, init_cache

Overflow = Literal["exact", "half", "stop"]

# Tokens made between two looks from the host, unless they are streamed one by one.
CHUNK = 64
SMALLEST_BUCKET = 16


class Sampling(NamedTuple):
    """How a token is drawn. Numbers or arrays; all of them may change without recompiling."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token always (greedy)."""
    top_k: int = 0
    """Keep the k likeliest tokens (and those as likely as the last of them); 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens that have this probability together (Holtzman et al.,
    arXiv:1904.09751), after top_k; 1 keeps all."""


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """float32 [B, V] -> [B, V] divided by temperature, with what top-k and top-p leave out masked.

    As the Hugging Face warpers in the order temperature, top-k, top-p; but equally likely tokens
    stay or go together.
    """
    logits = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)

    def narrow(logits: jax.Array) -> jax.Array:
        vocab = logits.shape[-1]
        ranked = jnp.sort(logits, axis=-1, descending=True)
        k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)
        ranked = jnp.where(ranked >= ranked[:, k - 1][:, None], ranked, MASKED)
        probability = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        # top_p 1 keeps tokens too unlikely to be felt in the sum; 0 still keeps the likeliest.
        kept = ((before < sampling.top_p) | (sampling.top_p >= 1)).at[:, 0].set(True)
        kept &= ranked > MASKED
        least = jnp.where(kept, ranked, jnp.inf).min(axis=-1, keepdims=True)
        return jnp.where(logits >= least, logits, MASKED)

    wanted = (sampling.top_k > 0) | (sampling.top_p < 1)
    return jax.lax.cond(wanted, narrow, lambda x: x, logits)


def sample(logits: jax.Array, key: jax.Array, position: Any, sampling: Sampling) -> jax.Array:
    """Draw int32 [B] tokens from logits [B, V].

    Row b's randomness follows from (key, position, b) alone: it does not depend on how many rows
    there are, on the cache, or on how the work is cut into chunks.
    """
    filtered = filter_logits(logits, sampling)
    key = jax.random.fold_in(key, position)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits.shape[0]))
    drawn = jax.vmap(jax.random.categorical)(keys, filtered)
    return jnp.where(sampling.temperature > 0, drawn, logits.argmax(-1)).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("config", "slots"))
def prefill(
    params: Any,
    prompt: jax.Array,
    length: jax.Array,
    position: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    *,
    config: ModelConfig,
    slots: int,
) -> tuple[jax.Array, Cache]:
    """Read int32 [B, bucket] prompts, of which `length` tokens count, into a new cache of `slots`;
    draw the first token [B], which has place `position` in the text."""
    cache = init_cache(config, prompt.shape[0], slots)
    logits, cache = apply(config, params, prompt, cache, logits_at=length - 1)
    # The padding's keys and values lie beyond `length`: masked, and overwritten one by one.
    return sample(logits[:, 0], key, position, sampling), cache._replace(length=length)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def decode(
    params: Any,
    token: jax.Array,
    cache: Cache,
    count: jax.Array,
    position: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    *,
    config: ModelConfig,
) -> tuple[jax.Array, Cache]:
    """Feed `token` [B] and draw the next, `count` <= CHUNK times; the first drawn has place
    `position`. -> (int32 [B, CHUNK], of which `count` columns count, the cache)."""

    def body(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        token, cache, out = carry
        logits, cache = apply(config, params, token[:, None], cache)
        token = sample(logits[:, 0], key, position + i, sampling)
        return token, cache, out.at[:, i].set(token)

    out = jnp.zeros((token.shape[0], CHUNK), jnp.int32)
    _, cache, out = jax.lax.fori_loop(0, count, body, (token, cache, out))
    return out, cache


@functools.partial(jax.jit, static_argnames="config")
def decode_window(
    params: Any,
    window: jax.Array,
    count: jax.Array,
    position: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    *,
    config: ModelConfig,
) -> jax.Array:
    """Past the block no cache is exact, because every token's position changes with each new one:
    run the model over the last block_size tokens [B, block_size] for every token drawn.
    -> int32 [B, CHUNK], of which `count` columns count."""

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        window, out = carry
        last = jnp.asarray(window.shape[1] - 1)
        logits, _ = apply(config, params, window, logits_at=last)
        token = sample(logits[:, 0], key, position + i, sampling)
        window = jnp.concatenate([window[:, 1:], token[:, None]], axis=1)
        return window, out.at[:, i].set(token)

    out = jnp.zeros((window.shape[0], CHUNK), jnp.int32)
    return jax.lax.fori_loop(0, count, body, (window, out))[1]


def bucket(length: int, block_size: int) -> int:
    """The next power of two, from SMALLEST_BUCKET, within block_size."""
    return min(block_size, max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()))


def generate(
    params: Any,
    prompt: np.ndarray,
    max_new_tokens: int,
    config: ModelConfig,
    sampling: Sampling = Sampling(),
    *,
    num_samples: int = 1,
    seed: int = 0,
    overflow: Overflow = "exact",
    chunk: int = CHUNK,
) -> Iterator[np.ndarray]:
    """Continue `prompt` (int [P], P >= 1) `num_samples` times.

    Yields int32 [num_samples, n] new tokens, n <= `chunk` <= CHUNK, until there are
    `max_new_tokens`. A prompt longer than the block counts with its end.

    Past block_size, `overflow` "exact" goes on as an uncached model that sees the last block_size
    tokens would; "half" drops the older half of the block and reads the rest anew (fast, and the
    same while it fits); "stop" ends there.
    """
    key = jax.random.key(seed, impl="threefry2x32")
    settings = Sampling(
        jnp.float32(sampling.temperature), jnp.int32(sampling.top_k), jnp.float32(sampling.top_p)
    )
    block = config.block_size
    text = np.broadcast_to(np.asarray(prompt, np.int32), (num_samples, len(prompt)))
    end = len(prompt) + max_new_tokens
    if overflow == "stop":
        # The last token drawn need not fit: nothing follows it.
        end = min(end, max(block + 1, len(prompt)))
    slots = min(block, bucket(len(prompt), block) + bucket(max_new_tokens, block))
    cache, cached = None, 0

    while text.shape[1] < end:
        length = text.shape[1]
        if overflow == "exact" and length > block:
            count = min(chunk, end - length)
            out = decode_window(
                params, text[:, -block:], count, length, key, settings, config=config
            )
            new = np.asarray(out)[:, :count]
        elif cache is None or cached == block:
            # The first reading takes all that fits; "half" reads on with half a block.
            seen = min(length, block if cache is None else max(1, block // 2))
            padded = np.zeros((num_samples, bucket(seen, block)), np.int32)
            padded[:, :seen] = text[:, -seen:]
            token, cache = prefill(
                params, padded, seen, length, key, settings, config=config, slots=slots
            )
            cached, new = seen, np.asarray(token)[:, None]
        else:
            count = min(chunk, end - length, slots - cached)
            out, cache = decode(
                params, text[:, -1], cache, count, length, key, settings, config=config
            )
            cached, new = cached + count, np.asarray(out)[:, :count]
        text = np.concatenate([text, new], axis=1)
        yield new
