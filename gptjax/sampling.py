"""Sampling: token ids in, token ids out.

A prompt is read into a cache (`prefill`), then one token at a time is fed and the next one drawn
(`decode`). Prompts are padded to a power of two, so that a new length seldom compiles anew; the
sampling settings are arrays, so that changing them never does.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax import head_rows
from gptjax.attention import MASKED
from gptjax.cache import Cache, init_cache
from gptjax.config import ModelConfig
from gptjax.decode_layout import unstack
from gptjax.devices.cpu import sampling_compiler_options
from gptjax.generation_config import Overflow
from gptjax.hashed_random import gumbel
from gptjax.logit_threshold import keep_largest
from gptjax.model import apply, compute_dtype, init
from gptjax.settings import INT_LIMIT
from gptjax.train_step import random_key

CHUNK = 64
"""Tokens drawn on the device before the host reads them, unless they are streamed one by one."""

SMALLEST_BUCKET = 16


class Sampling(NamedTuple):
    """How a token is drawn. Numbers or arrays; all of them may change without recompiling."""

    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token (greedy)."""
    top_k: int = 0
    """Keep the k likeliest tokens (and those as likely as the last of them); 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens that have this probability together (Holtzman et al.,
    arXiv:1904.09751), after top_k; 1 keeps all."""
    min_p: float = 0.0
    """Keep the tokens at least this many times as likely as the likeliest (Nguyen et al.,
    arXiv:2407.01082), after top_p; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that are in the text already
    (Keskar et al., arXiv:1909.05858), before all else; 1 changes nothing. The functions below that
    take it need `seen` too: bool [B, V], the tokens of each text; None: there is no penalty."""

    @classmethod
    def of(cls, settings: Any) -> "Sampling":
        """Those of a `GenerationConfig`, or of another object that calls them the same."""
        return cls(*(getattr(settings, name) for name in cls._fields))


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """float32 [B, V] -> [B, V] divided by temperature, with what top-k, top-p and min-p leave out
    masked.

    As the Hugging Face warpers in the order temperature, top-k, top-p, min-p; but equally likely
    tokens stay or go together.
    """
    logits = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)

    def top_k(logits: jax.Array) -> jax.Array:
        return keep_largest(logits, jnp.ones_like(logits), sampling.top_k)

    def top_p(logits: jax.Array) -> jax.Array:
        return keep_largest(logits, jax.nn.softmax(logits, axis=-1), sampling.top_p)

    def min_p(logits: jax.Array) -> jax.Array:
        least = logits.max(axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        return jnp.where(logits >= least, logits, MASKED)

    logits = jax.lax.cond(sampling.top_k > 0, top_k, lambda x: x, logits)
    logits = jax.lax.cond(sampling.top_p < 1, top_p, lambda x: x, logits)
    return jax.lax.cond(sampling.min_p > 0, min_p, lambda x: x, logits)


def penalize(logits: jax.Array, seen: jax.Array, penalty: Any) -> jax.Array:
    """float32 [B, V] logits with `Sampling.repetition_penalty`."""
    penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalized, logits)


def hash_keys(key: jax.Array, position: Any, count: int, batch: int, first: Any = 0) -> jax.Array:
    """uint32 [count, batch, 2]: `hashed_random`'s keys for the tokens from `position` on, of the
    rows from `first` on.

    Row b's randomness at a position follows from (key, position, b) alone: it does not depend on
    how many rows there are, on the cache, or on how the work is cut into chunks.
    """

    def one(position: jax.Array, row: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, position), row)
        return jax.random.bits(own, (2,), jnp.uint32)

    rows = jax.vmap(one, (None, 0))
    return jax.vmap(rows, (0, None))(position + jnp.arange(count), first + jnp.arange(batch))


def sample(
    logits: jax.Array, keys: jax.Array, sampling: Sampling, seen: jax.Array | None = None
) -> jax.Array:
    """Draw int32 [B] tokens from logits [B, V], by the Gumbel-max trick (Gumbel 1954), with
    `hash_keys` [B, 2]."""
    if seen is not None:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    drawn = (filter_logits(logits, sampling) + gumbel(keys, logits.shape[1])).argmax(axis=-1)
    return jnp.where(sampling.temperature > 0, drawn, logits.argmax(-1)).astype(jnp.int32)


def _add(seen: jax.Array | None, token: jax.Array) -> jax.Array | None:
    if seen is None:
        return None
    return seen | (token[:, None] == jnp.arange(seen.shape[1]))


def prefill(
    params: Any,
    prompt: jax.Array,
    length: jax.Array,
    position: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    seen: jax.Array | None = None,
    *,
    config: ModelConfig,
    slots: int,
    lanes: int = 1,
) -> tuple[jax.Array, Cache]:
    """Read int32 [B, bucket] prompts, of which `length` tokens count, into `init_cache(...)`;
    draw the first token [B], which stands at `position` in the text."""
    stacked = "h_0" not in params
    dtype = compute_dtype(config)
    empty = init_cache(config, prompt.shape[0], slots, dtype, stacked=stacked, lanes=lanes)
    logits, cache = apply(config, params, prompt, empty, logits_at=length - 1)
    assert cache is not None
    # The padding's keys and values lie beyond `length`: masked, and overwritten one by one.
    keys = hash_keys(key, position, 1, prompt.shape[0])
    return sample(logits[:, 0], keys[0], sampling, seen), cache._replace(length=length)


def decode(
    params: Any,
    token: jax.Array,
    cache: Cache,
    count: jax.Array,
    position: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    seen: jax.Array | None = None,
    *,
    config: ModelConfig,
) -> tuple[jax.Array, Cache]:
    """Feed `token` [B] and draw the next, `count` <= CHUNK times; the first drawn stands at
    `position`. -> (int32 [B, CHUNK], of which `count` columns count, the cache)."""

    def body(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        token, cache, out, seen = carry
        logits, cache = apply(config, params, token[:, None], cache)
        token = sample(logits[:, 0], keys[i], sampling, seen)
        return token, cache, out.at[:, i].set(token), _add(seen, token)

    keys = hash_keys(key, position, CHUNK, token.shape[0])
    out = jnp.zeros((token.shape[0], CHUNK), jnp.int32)
    _, cache, out, _ = jax.lax.fori_loop(0, count, body, (token, cache, out, seen))
    return out, cache


def decode_window(
    params: Any,
    window: jax.Array,
    count: jax.Array,
    position: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    seen: jax.Array | None = None,
    *,
    config: ModelConfig,
) -> jax.Array:
    """Past the block no cache is exact, because every token's position changes with each new one:
    run the model over the last block_size tokens [B, block_size] for every token drawn.
    -> int32 [B, CHUNK], of which `count` columns count."""

    def body(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        window, out, seen = carry
        last = jnp.asarray(window.shape[1] - 1)
        logits, _ = apply(config, params, window, logits_at=last)
        token = sample(logits[:, 0], keys[i], sampling, seen)
        window = jnp.concatenate([window[:, 1:], token[:, None]], axis=1)
        return window, out.at[:, i].set(token), _add(seen, token)

    keys = hash_keys(key, position, CHUNK, window.shape[0])
    out = jnp.zeros((window.shape[0], CHUNK), jnp.int32)
    return jax.lax.fori_loop(0, count, body, (window, out, seen))[1]


@functools.cache
def _jitted() -> tuple[Any, Any, Any]:
    """The three functions above; on first use, when it is known what JAX runs on."""
    jit = functools.partial(jax.jit, compiler_options=sampling_compiler_options())
    return (
        jit(prefill, static_argnames=("config", "slots", "lanes")),
        jit(decode, static_argnames="config", donate_argnames="cache"),
        jit(decode_window, static_argnames="config"),
    )


def bucket(length: int, block_size: int) -> int:
    """The next power of two, from SMALLEST_BUCKET, within block_size."""
    return min(block_size, max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()))


def slots(prompt: int, max_new_tokens: int, block_size: int) -> int:
    """Of the cache for so many tokens."""
    sizes = bucket(prompt, block_size), bucket(max_new_tokens, block_size)
    return min(block_size, sum(sizes))


def lanes(platform: str | None = None) -> int:
    """Of a cache on such a device (None: JAX's first): see `head_rows`."""
    return head_rows.LANES if (platform or jax.default_backend()) == "tpu" else 1


def compile_for(
    config: ModelConfig, device: jax.Device, prompt: int, max_new_tokens: int, num_samples: int
) -> tuple[Any, Any]:
    """The programs that read a prompt of so many tokens and that draw CHUNK tokens after it, for a
    device that need not be there."""

    def there(tree: Any) -> Any:
        sharding = jax.sharding.SingleDeviceSharding(device)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    size = bucket(prompt, config.block_size)
    room = slots(prompt, max_new_tokens, config.block_size)
    stacked = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    params = there(jax.eval_shape(functools.partial(unstack, config=config), stacked))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    tokens = jax.ShapeDtypeStruct((num_samples, size), jnp.int32)
    settings = there(jax.eval_shape(lambda: jax.tree.map(jnp.float32, Sampling())))
    settings = settings._replace(top_k=there(number))
    key = there(jax.eval_shape(lambda: random_key(0)))
    reads = functools.partial(prefill, config=config, slots=room, lanes=lanes(device.platform))
    arguments = there((tokens, number, number)), key, settings
    read = jax.jit(reads).lower(params, *arguments[0], *arguments[1:]).compile()
    empty = functools.partial(
        init_cache, config, num_samples, room, compute_dtype(config), stacked=False,
        lanes=lanes(device.platform),
    )  # fmt: skip
    cache, token = there((jax.eval_shape(empty), jax.ShapeDtypeStruct((num_samples,), jnp.int32)))

    def draws(params: Any, token: Any, cache: Any, position: Any, key: Any, sampling: Any) -> Any:
        count = jnp.int32(CHUNK)
        return decode(params, token, cache, count, position, key, sampling, config=config)

    drawn = jax.jit(draws, donate_argnums=2)
    return read, drawn.lower(params, token, cache, there(number), key, settings).compile()


def generate(
    params: Any,
    prompt: np.ndarray,
    max_new_tokens: int | None,
    config: ModelConfig,
    sampling: Sampling = Sampling(),
    *,
    num_samples: int = 1,
    seed: int = 0,
    overflow: Overflow = "exact",
    chunk: int = CHUNK,
    devices: Sequence[jax.Device] = (),
) -> Iterator[np.ndarray]:
    """Continue `prompt` (int [P], P >= 1) `num_samples` times.

    Yields int32 [num_samples, n] new tokens, n <= `chunk` <= CHUNK, until there are
    `max_new_tokens` (None: for ever). Of a prompt longer than the block the last block_size tokens
    count.

    Past block_size, `overflow` "exact" goes on as an uncached model that sees the last block_size
    tokens would; "half" drops the older half of the block and reads the rest anew (fast; identical
    to "exact" until the block is full); "stop" ends there. The samples are shared out over
    `devices`, each of which gets the parameters then; where there is none or one sample, they are
    drawn where the parameters are.
    """
    prefill, decode, decode_window = _jitted()
    key = random_key(seed)
    settings = jax.tree.map(jnp.float32, sampling)._replace(top_k=jnp.int32(sampling.top_k))
    block = config.block_size
    rows, spread = num_samples, None
    if min(len(devices), num_samples) > 1:
        mesh = Mesh(np.array(devices[:num_samples]), ("samples",))
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        spread = NamedSharding(mesh, PartitionSpec("samples"))
        rows = -(-num_samples // mesh.size) * mesh.size

    def place(x: np.ndarray | None) -> Any:
        return jax.device_put(x, spread) if spread else x

    length = len(prompt)
    text = np.broadcast_to(np.asarray(prompt[-block:], np.int32), (rows, min(length, block)))
    end = length + (math.inf if max_new_tokens is None else max_new_tokens)
    if overflow == "stop":
        # The last token drawn need not fit: nothing follows it.
        end = min(end, max(block + 1, length))
    room = slots(length, block if max_new_tokens is None else max_new_tokens, block)
    cache, cached, seen = None, 0, None
    if sampling.repetition_penalty != 1:
        seen = np.zeros((rows, config.vocab_size or 0), bool)
        seen[:, prompt] = True

    while length < end:
        count = int(min(chunk, end - length))
        position = length % INT_LIMIT
        if overflow == "exact" and length > block:
            out = decode_window(
                params, place(text), count, position, key, settings, place(seen),
                config=config,
            )  # fmt: skip
            new = np.asarray(out)[:, :count]
        elif cache is None or cached == block:
            # The first reading takes all that fits; "half" reads on with half a block.
            size = min(length, block if cache is None else max(1, block // 2))
            padded = np.zeros((rows, bucket(size, block)), np.int32)
            padded[:, :size] = text[:, -size:]
            token, cache = prefill(
                params, place(padded), size, position, key, settings, place(seen), config=config,
                slots=room, lanes=lanes(),
            )  # fmt: skip
            cached, new = size, np.asarray(token)[:, None]
        else:
            count = min(count, room - cached)
            out, cache = decode(
                params, place(text[:, -1]), cache, count, position, key, settings, place(seen),
                config=config,
            )  # fmt: skip
            cached, new = cached + count, np.asarray(out)[:, :count]
        text = np.concatenate([text, new], axis=1)[:, -block:]
        length += new.shape[1]
        if seen is not None:
            seen[np.arange(rows)[:, None], new] = True
        yield new[:num_samples]
