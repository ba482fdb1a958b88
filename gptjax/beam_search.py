"""Beam search: of the continuations of a prompt, likely ones. After each token the likeliest few
texts so far (the beams) are kept. What ends early competes by its mean log-probability.

Letters in shape comments: K beams, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax.cache import Cache, init_cache
from gptjax.config import ModelConfig
from gptjax.devices.cpu import sampling_compiler_options
from gptjax.layers import compute_dtype
from gptjax.model import apply
from gptjax.sampling import bucket, slots


class Found(NamedTuple):
    """A continuation."""

    score: float
    """Log-probability of its tokens, the one that ends it among them, divided by their number to
    the power of `length_penalty`."""
    tokens: np.ndarray
    """int32 [n], without the one that ends it."""


def search(
    params: Any, prompt: np.ndarray, max_new_tokens: int, config: ModelConfig, *,
    beams: int = 4, length_penalty: float = 1.0, eot: int | None = None,
) -> list[Found]:  # fmt: skip
    """The best `beams` continuations of int `prompt` [P], best first: what Hugging Face's
    `generate(num_beams=beams, do_sample=False)` returns.

    They end at the token `eot` (None: at none), after `max_new_tokens`, or where the block is full.
    `params`: laid out for decoding.
    """
    prompt = prompt[-config.block_size :]
    steps = min(max_new_tokens, config.block_size - len(prompt) + 1)
    room = slots(len(prompt), steps, config.block_size)
    padded = np.zeros((1, bucket(len(prompt), config.block_size)), np.int32)
    padded[0, : len(prompt)] = prompt
    read, feed = _jitted()
    logprobs, cache = read(params, padded, len(prompt), config=config, slots=room)
    texts, sums = np.zeros((1, 0), np.int32), np.zeros(1, np.float32)
    ended: list[Found] = []
    for length in range(1, steps + 1):
        total = (np.asarray(sums)[:, None] + np.asarray(logprobs)).ravel()
        # Twice as many: each of the best may be an end.
        count = min(2 * beams, total.size)
        best = np.argpartition(-total, count - 1)[:count]
        best = best[np.argsort(-total[best], kind="stable")]
        parents, tokens = np.divmod(best, config.vocab_size or 1)
        for rank in np.flatnonzero(tokens[:beams] == eot):
            score = float(total[best[rank]]) / length**length_penalty
            ended.append(Found(score, texts[parents[rank]]))
        ended = sorted(ended, key=lambda found: -found.score)[:beams]
        chosen = np.flatnonzero(tokens != eot)[:beams]
        parents, tokens, sums = parents[chosen], tokens[chosen].astype("i4"), total[best[chosen]]
        texts = np.concatenate([texts[parents], tokens[:, None]], axis=1)
        worst = ended[-1].score if len(ended) == beams else -np.inf
        if length == steps or worst >= sums[0] / length**length_penalty:
            break
        logprobs, cache = feed(params, tokens, parents.astype("i4"), cache, config=config)
    scores = sums / texts.shape[1] ** length_penalty
    ended += [Found(float(score), text) for score, text in zip(scores, texts, strict=True)]
    return sorted(ended, key=lambda found: -found.score)[:beams]


def _read(
    params: Any, prompt: jax.Array, length: jax.Array, *, config: ModelConfig, slots: int
) -> tuple[jax.Array, Cache]:
    """(float32 [1, V] log-probabilities after the first `length` of int32 [1, bucket] tokens; the
    cache of them)."""
    cache: Any = init_cache(config, 1, slots, compute_dtype(config), stacked=False)
    logits, cache = apply(config, params, prompt, cache, logits_at=length - 1)
    return jax.nn.log_softmax(logits[:, 0]), cache._replace(length=length)


def _feed(
    params: Any, tokens: jax.Array, parents: jax.Array, cache: Any, *, config: ModelConfig
) -> tuple[jax.Array, Cache]:
    """Continue the texts with numbers `parents` [K] by int32 `tokens` [K] -> [K, V], the cache."""

    def reorder(x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, config.n_head, *x.shape[1:])[parents]
        return rows.reshape(-1, *x.shape[1:])

    cache = cache._replace(**{
        name: jax.tree.map(reorder, getattr(cache, name)) for name in ("keys", "values")
    })  # fmt: skip
    logits, cache = apply(config, params, tokens[:, None], cache)
    return jax.nn.log_softmax(logits[:, 0]), cache


@functools.cache
def _jitted() -> tuple[Any, Any]:
    jit = functools.partial(jax.jit, compiler_options=sampling_compiler_options())
    return (
        jit(_read, static_argnames=("config", "slots")),
        jit(_feed, static_argnames="config"),
    )
