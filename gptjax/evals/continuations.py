"""How likely a model finds one text after another: what LAMBADA, HellaSwag and the tasks of
lm-evaluation-harness ask."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import head
from gptjax.config import ModelConfig
from gptjax.data.tokenizers import Tokenizer
from gptjax.devices import hosts
from gptjax.devices.base import Strategy
from gptjax.errors import RunError, UserError
from gptjax.model import Params, features
from gptjax.runtime_config import ComputeConfig
from gptjax.sampling import bucket

Scores = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(this host's int32 windows [R, T + 1]; int32 [R, M], the places of the tokens before those that
count, -1: none) -> float32 [rows of all hosts, 2]: the nats of the tokens that count, and how many
of them are not the likeliest."""


class Continuation(NamedTuple):
    """A text after another: int tokens. That which has no token before it is not predicted."""

    context: Sequence[int] | np.ndarray
    tokens: Sequence[int] | np.ndarray


def encode(tokenizer: Tokenizer, context: str, text: str) -> Continuation:
    """Both are encoded as one text. Spaces at the end of the context belong to what follows, as
    lm-evaluation-harness has it: tokens begin with a space, and none ends with one. UserError: a
    character that the tokenizer does not know."""
    before = context.rstrip()
    whole = tokenizer.encode(context + text)
    count = len(tokenizer.encode(before))
    return Continuation(whole[:count], whole[count:])


def scores(
    strategy: Strategy, params: Params, config: ModelConfig, compute: ComputeConfig
) -> Scores:
    """Of a model over all devices; `params` are in the strategy's layout for training."""

    def step(params: Params, windows: jax.Array, places: jax.Array) -> jax.Array:
        x, output, _ = features(config, params, windows[:, :-1], compute=compute)
        # Few tokens count, and the head is a large part of a small model.
        counts, at = places >= 0, jnp.maximum(places, 0)
        x = jnp.take_along_axis(x, at[..., None], axis=1)
        targets = jnp.take_along_axis(windows[:, 1:], at, axis=1)
        nats, hits = head.losses_and_hits(x, output, targets, config.vocab_size)
        return jnp.stack([(nats * counts).sum(-1), (~hits & counts).sum(-1)], axis=-1)

    mapped = functools.partial(strategy.map_eval_step(step), params)

    def found(windows: np.ndarray, places: np.ndarray) -> np.ndarray:
        return mapped(windows, places)[0].reshape(-1, 2)

    return found


def score(
    scores: Scores, texts: Sequence[Continuation], config: ModelConfig, *, batch_size: int,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(float64 [n]: nats of each continuation after its context, bool [n]: whether each of its
    tokens is the likeliest one). A context that does not fit the block together with what follows
    loses its beginning. All hosts call this with the same arguments.

    Args:
        batch_size: texts at a time, over all devices.
        progress: told how many of how many are done.

    UserError: a continuation alone does not fit the block, or the hosts have different texts.
    RunError: a likelihood is not finite.
    """
    size = config.block_size
    ids = [[np.asarray(part).tolist() for part in text] for text in texts]
    if not hosts.all_equal(f"{ids} {batch_size}"):
        raise UserError("the hosts have different texts or settings; start the same on all of them")
    if too_long := [len(text.tokens) for text in texts if len(text.tokens) > size]:
        raise UserError(
            f"{len(too_long)} of {len(texts)} continuations are longer than the model's block_size"
            f" {size} (the longest has {max(too_long)} tokens)"
        )
    # Texts of similar length together, for little padding; the longest first, so that what does
    # not fit the memory fails at once.
    order = sorted(range(len(texts)), key=lambda i: -sum(map(len, texts[i])))
    ours = hosts.host_rows(batch_size)
    nats, greedy = np.zeros(len(texts)), np.zeros(len(texts), bool)
    for done in range(0, len(order), batch_size):
        chosen = order[done : done + batch_size]
        parts = [np.concatenate(texts[i])[-size - 1 :] for i in chosen]
        length = bucket(max(1, max(map(len, parts)) - 1), size)
        batch = np.zeros((batch_size, length + 1), "i4")
        most = max(len(texts[i].tokens) for i in chosen)
        places = np.full((batch_size, bucket(max(1, most), length)), -1, "i4")
        for row, (i, part) in enumerate(zip(chosen, parts, strict=True)):
            batch[row, : len(part)] = part
            # Those that predict the continuation; its first token needs one before it.
            at = np.arange(max(0, len(part) - len(texts[i].tokens) - 1), len(part) - 1)
            places[row, : len(at)] = at
        found = scores(batch[ours], places[ours])[: len(chosen)]
        if not np.isfinite(found).all():
            raise RunError("the model's likelihoods are not finite: its weights are damaged")
        nats[chosen], greedy[chosen] = found[:, 0], found[:, 1] == 0
        progress(min(done + batch_size, len(order)), len(order))
    return nats, greedy
