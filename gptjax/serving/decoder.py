"""The server's compiled programs. Each row of a cache holds a text of its own length, drawn with
its own settings: whatever the mix, nothing is compiled anew.

The model has one length for all rows of a cache. So it is mapped (`jax.vmap`) over caches of one
row; the parameters are not, so a matrix product stays one product over all rows.

The rows are in groups of one size, and a group with nothing to do costs nothing. (A product over
another number of rows would round differently, and a text would depend on how many others there
are.)

Letters in shape comments: R rows, G rows of a group, T tokens of a piece, V vocabulary, L layers,
H heads, S slots of a row (block_size), K tokens drawn in a call, N alternatives.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import head, model, numerics
from gptjax.cache import Cache, init_cache
from gptjax.config import ModelConfig
from gptjax.layers import compute_dtype
from gptjax.run import activations
from gptjax.sampling import CHUNK, Sampling, bucket, hash_keys, lanes, penalize, sample
from gptjax.train_step import random_key

ALTERNATIVES = 10
"""How many of the likeliest tokens at a position are reported."""

PIECE = 256
"""Tokens of a prompt that are read at a time; the rows that draw wait meanwhile."""

GROUP = 8
"""Rows of a group on a CPU, a compromise between one stream and many: for 8 rows a step takes about
a third of what it takes for 32 (0.8M: 1.2 of 3.5 ms; 37M: 53 of 139 ms). On an accelerator, which
computes many rows nearly as fast as one, all rows are one group."""


class Rows(NamedTuple):
    """What each row does in a call of `decode`. Arrays [R]."""

    token: Any
    """int32: the last token of its text, which is not in the cache yet."""
    length: Any
    """int32: how many tokens are in its cache."""
    position: Any
    """int32: where the next token stands in its text."""
    steps: Any
    """int32: how many tokens to draw, at most CHUNK; 0: it rests."""
    seed: Any
    """int32."""
    sample: Any
    """int32: its number, of those of one seed."""
    sampling: Sampling
    """float32, but int32 for top_k."""

    @classmethod
    def resting(cls, count: int) -> "Rows":
        """In numpy, to be filled in."""
        token, length, position, steps, seed, number, top_k = np.zeros((7, count), np.int32)
        settings: Any = [np.full(count, x, np.float32) for x in Sampling()]
        sampling = Sampling(*settings)._replace(top_k=top_k)  # type: ignore[arg-type]
        return cls(token, length, position, steps, seed, number, sampling)


class Ranks(NamedTuple):
    """How likely tokens were, by the model itself: before temperature and what else shapes a
    draw."""

    logprobs: Any
    """float32 [...]: natural logarithms of their probabilities."""
    top_ids: Any
    """int32 [..., N]: the likeliest tokens in their places, the likeliest first."""
    top_logprobs: Any
    """float32 [..., N]."""


class Decoder:
    """The programs, the parameters, and the caches of the groups. `decode` and `read` change the
    caches in place."""

    def __init__(self, params: Any, config: ModelConfig, rows: int):
        """`params`: unstacked (`decode_layout`). `rows`: at least so many; the groups are full."""
        self._group = min(rows, GROUP) if jax.default_backend() == "cpu" else rows
        groups = -(-rows // self._group)
        self.config, self.rows = config, groups * self._group
        one = init_cache(
            config, 1, config.block_size, compute_dtype(config), stacked=False, lanes=lanes()
        )

        def empty(x: jax.Array) -> jax.Array:
            return jnp.zeros((self._group, *x.shape), x.dtype)

        caches = [jax.tree.map(empty, (one.keys, one.values)) for _ in range(groups)]
        # Committed to a device, as what a program returns is: otherwise the first calls would be
        # compiled twice.
        unseen = np.zeros((self._group, config.vocab_size or 0), bool)
        self._device = jax.local_devices()[0]
        self._params, self._caches, self._unseen = jax.device_put(
            (params, caches, unseen), self._device
        )
        # Not with `sampling_compiler_options`: products over many rows are large (0.8M, 32 rows of
        # 256: 2.3 instead of 3.1 ms of CPU time a step).
        self._decode = jax.jit(functools.partial(_decode, config=config), donate_argnums=1)
        self._read = jax.jit(functools.partial(_read, config=config), donate_argnums=1)
        self._look = jax.jit(functools.partial(_look, config=config))

    @numerics.standard()
    def decode(
        self, rows: Rows, ranked: bool, seen: np.ndarray | None = None
    ) -> tuple[np.ndarray, Ranks]:
        """Draw `rows.steps` tokens in each row: (int32 [K, R], of which `steps` count, how likely
        each was [K, R], if `ranked`). `seen`: bool [R, V], the tokens of the texts that have a
        repetition penalty, where there is one."""
        drawn = {}
        for group in range(len(self._caches)):
            part = slice(group * self._group, (group + 1) * self._group)
            own = jax.tree.map(lambda x, part=part: x[part], rows)
            if count := own.steps.max():
                known = self._unseen if seen is None else jax.device_put(seen[part], self._device)
                self._caches[group], drawn[group] = self._decode(
                    self._params, self._caches[group], own, count, ranked, known
                )
        drawn = jax.device_get(drawn)
        nothing = jax.tree.map(np.zeros_like, next(iter(drawn.values())))
        groups = [drawn.get(group, nothing) for group in range(len(self._caches))]
        tokens, ranks = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *groups)
        return tokens, ranks

    @numerics.standard()
    def read(self, row: int, tokens: np.ndarray, done: int, ranked: bool) -> tuple[int, int, Ranks]:
        """Read a piece of a window into the row's cache, which has `done` tokens of it. `tokens`:
        int32 [n + 1], the window (n <= S) and the token after it. How many tokens are there now;
        where the piece began; and, if `ranked`, how likely the token after each of it was [T]."""
        block, count = self.config.block_size, len(tokens) - 1
        size = bucket(min(count - done, PIECE), min(block, PIECE))
        # Where the padding would not fit, some tokens are read again.
        at = min(done, block - size)
        padded = np.zeros(size + 1, np.int32)
        padded[: count + 1 - at] = tokens[at : at + size + 1]
        piece = padded[:-1], padded[1:]
        group, row = divmod(row, self._group)
        self._caches[group], ranks = self._read(
            self._params, self._caches[group], np.int32(row), *piece, np.int32(at), ranked
        )
        return min(count, at + size), at, Ranks(*jax.device_get(ranks))

    @numerics.standard()
    def look(self, row: int, token: int, length: int) -> np.ndarray:
        """float32 [L, H, length + 1]: how much each head looks from `token` at the `length` tokens
        in the row's cache, and at the token itself. Changes nothing."""
        group, row = divmod(row, self._group)
        weights = self._look(
            self._params, self._caches[group], *map(np.int32, (row, token, length))
        )
        return np.asarray(weights)[..., : length + 1]

    def warm(self) -> None:
        """Compile everything now, so that nobody waits for it later."""
        rows = Rows.resting(self.rows)
        rows.steps[0] = 1
        self.decode(rows, False)
        most = min(self.config.block_size, PIECE)
        for size in sorted({bucket(length, most) for length in range(1, most + 1)}):
            self.read(0, np.zeros(size + 1, np.int32), 0, False)
        if self.config.n_layer:
            self.look(0, 0, 0)


def _decode(
    params: Any, cache: Any, rows: Rows, count: jax.Array, ranked: jax.Array, seen: jax.Array, *,
    config: ModelConfig,
) -> tuple[Any, tuple[jax.Array, Ranks]]:  # fmt: skip
    """`Decoder.decode`; `count` []: the largest of `rows.steps`. All rows draw so many; what a row
    writes beyond its own steps lies beyond its tokens, as padding does: masked, and overwritten."""

    def feed(token: Any, keys: Any, values: Any, length: Any) -> tuple[Any, Any, Any]:
        logits, cache = model.apply(config, params, token[None, None], Cache(keys, values, length))
        assert cache is not None
        return logits[0], cache.keys, cache.values

    def keys_of(seed: jax.Array, position: jax.Array, sample: jax.Array) -> jax.Array:
        return hash_keys(random_key(seed), position, CHUNK, 1, sample)  # type: ignore[arg-type]

    def unfiltered(logits: jax.Array, keys: jax.Array, temperature: Any) -> jax.Array:
        return sample(logits, keys, Sampling(temperature))

    keys = jax.vmap(keys_of)(rows.seed, rows.position, rows.sample)  # [R, K, 1, 2]
    drawing = rows.steps > 0
    how = rows.sampling
    penalized = drawing & (how.repetition_penalty != 1)
    filtered = drawing & ((how.top_k > 0) | (how.top_p < 1) | (how.min_p > 0))
    shaped = (penalized | filtered).any()

    def body(i: jax.Array, carry: Any) -> Any:
        token, length, (k, v), out = carry
        logits, k, v = jax.vmap(feed)(token, k, v, length)  # [R, 1, V]

        def penalty() -> jax.Array:
            # For the tokens to come stands the text's last one, which is in `seen`.
            so_far = jnp.where(jnp.arange(CHUNK)[:, None] < i, out[0], rows.token)
            own = seen.at[jnp.arange(len(token)), so_far].set(True)
            return jax.vmap(penalize)(logits, own[:, None], how.repetition_penalty)

        def draw_shaped() -> jax.Array:
            penalized_logits = jax.lax.cond(penalized.any(), penalty, lambda: logits)
            return jax.vmap(sample)(penalized_logits, keys[:, i], how)

        drawn = jax.lax.cond(
            shaped,
            draw_shaped,
            # Without what otherwise all rows would pay for.
            lambda: jax.vmap(unfiltered)(logits, keys[:, i], how.temperature),
        )[:, 0]
        ranks = jax.lax.cond(
            ranked, lambda: _rank(logits[:, 0], drawn), lambda: _no_ranks(config, len(drawn))
        )
        out = jax.tree.map(lambda all, x: all.at[i].set(x), out, (drawn, ranks))
        return drawn, length + 1, (k, v), out

    shape = CHUNK, len(rows.token)
    out = jnp.zeros(shape, jnp.int32), _no_ranks(config, *shape)
    carry = rows.token, rows.length, cache, out
    _, _, cache, out = jax.lax.fori_loop(0, count, body, carry)
    return cache, out


def _read(
    params: Any,
    cache: Any,
    row: jax.Array,
    tokens: jax.Array,
    following: jax.Array,
    start: jax.Array,
    ranked: jax.Array,
    *,
    config: ModelConfig,
) -> tuple[Any, Ranks]:
    """Read int32 [T] tokens into a row's slots from `start` on; how likely those `following` each
    of them were [T]."""
    x, output, own = model.features(config, params, tokens[None], _row(cache, row, start))
    assert own is not None

    def rank() -> Ranks:
        return _rank(head.logits(x[0], output, config.vocab_size), following)

    ranks = jax.lax.cond(ranked, rank, lambda: _no_ranks(config, len(tokens)))

    def write(rows: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(rows, new, row, 0)

    return jax.tree.map(write, cache, (own.keys, own.values)), ranks


def _look(
    params: Any, cache: Any, row: jax.Array, token: jax.Array, length: jax.Array, *,
    config: ModelConfig,
) -> jax.Array:  # fmt: skip
    """float32 [L, H, S]."""
    inner = activations(params, token[None, None], config, _row(cache, row, length))
    weights = [inner[f"h.{layer}.attn.weights"] for layer in range(config.n_layer)]
    return jnp.stack(weights).reshape(config.n_layer, config.n_head, -1)


def _row(cache: Any, row: jax.Array, length: jax.Array) -> Cache:
    """A row's own, of which `length` tokens count."""
    keys, values = jax.tree.map(
        lambda rows: jax.lax.dynamic_index_in_dim(rows, row, 0, keepdims=False), cache
    )
    return Cache(keys, values, length)


def _rank(logits: jax.Array, tokens: jax.Array) -> Ranks:
    """float32 [n, V] logits, int32 [n] tokens."""
    every = jax.nn.log_softmax(logits, axis=-1)
    best, ids = jax.lax.top_k(every, min(ALTERNATIVES, logits.shape[-1]))
    own = jnp.take_along_axis(every, tokens[:, None], axis=-1)[:, 0]
    return Ranks(own, ids.astype(jnp.int32), best)


def _no_ranks(config: ModelConfig, *shape: int) -> Ranks:
    """Zeros."""
    assert config.vocab_size
    alternatives = *shape, min(ALTERNATIVES, config.vocab_size)
    return Ranks(jnp.zeros(shape), jnp.zeros(alternatives, jnp.int32), jnp.zeros(alternatives))
