"""Likelihoods of texts after their contexts, whatever the batches, and greedy ones."""

import functools
import types
from unittest import mock

import jax
import numpy as np
import pytest

from gptjax import head, model
from gptjax.config import ModelConfig
from gptjax.data.tokenizers import CharTokenizer
from gptjax.devices import hosts
from gptjax.devices.strategy import get_strategy
from gptjax.errors import RunError, UserError
from gptjax.evals import continuations
from gptjax.evals.continuations import Continuation, encode, score, scores
from gptjax.runtime_config import ComputeConfig

CONFIG = ModelConfig(2, 2, 16, block_size=40, vocab_size=40)
TOKENS = np.arange(40, dtype=np.int32)
LONG = np.tile(TOKENS, 2)
TEXTS = [
    Continuation(TOKENS[:3], TOKENS[7:9]),
    Continuation(LONG, TOKENS[:5]),  # loses the beginning of its context
    Continuation(TOKENS[:0], TOKENS[:17]),  # its first token is not predicted
    Continuation(TOKENS[:1], LONG[3:43]),
    Continuation(TOKENS[:2], TOKENS[:0]),
]


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_a_text_has_its_likelihood_after_the_context(found_scores, nats, rows):
    expected = []
    for context, tokens in TEXTS:
        text = np.concatenate([context, tokens])[-41:]
        first = max(1, len(text) - len(tokens))
        expected.append(sum(nats(text[:k], text[k]) for k in range(first, len(text))))
    seen = []
    found, greedy = score(
        found_scores, TEXTS, CONFIG, batch_size=rows, progress=lambda *numbers: seen.append(numbers)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert greedy.tolist() == [value < 1e-9 for value in expected]
    assert seen[-1] == (5, 5) and len(seen) == -(-5 // rows)


def test_texts_are_padded_to_few_lengths_the_longest_first(found_scores):
    """Each is a compilation."""
    seen = []

    def counted(windows, places):
        seen.append((windows.shape[1] - 1, places.shape[1]))
        return found_scores(windows, places)

    texts = [Continuation(TOKENS[:1], TOKENS[:n]) for n in (16, 2, 29, 17)]
    score(counted, texts, CONFIG, batch_size=1)
    assert seen == [(32, 32), (32, 32), (16, 16), (16, 16)]


def test_logits_are_computed_where_they_count():
    seen = []

    def watched(x, output, targets, vocab_size):
        seen.append(x.shape)
        return head.losses_and_hits(x, output, targets, vocab_size)

    with mock.patch.object(continuations, "head", types.SimpleNamespace(losses_and_hits=watched)):
        strategy = get_strategy("pmap", jax.devices()[:1])
        params = strategy.initialise(lambda: model.init(CONFIG, jax.random.key(0)))
        placed = strategy.to_devices(params)
        by_device = scores(strategy, placed, CONFIG, ComputeConfig(attention="xla"))
        score(by_device, [Continuation(TOKENS, [3])], CONFIG, batch_size=1)
    assert seen == [(1, 16, 16)]  # of 40 tokens


def test_likelihoods_that_are_not_finite_are_an_error():
    with pytest.raises(RunError, match="not finite"):
        score(lambda *_: np.full((1, 2), np.nan), TEXTS[:1], CONFIG, batch_size=1)


@pytest.mark.parametrize("kind", ["pmap", "fsdp"])
def test_over_devices_the_numbers_are_those_of_the_logits(kind):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(CONFIG, jax.random.key(0)))
    params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype("f4"), shapes)
    apply = jax.jit(functools.partial(model.apply, CONFIG))
    logits = np.asarray(apply(params, LONG[None, :40])[0][0], np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    likeliest = logs.argmax(-1)
    texts = [
        Continuation(LONG[:n], [target])
        for n in range(17, 33)  # of one padded length
        for target in (likeliest[n - 1], (likeliest[n - 1] + 1) % 40)
    ]
    strategy = get_strategy(kind, jax.devices()[:2])
    placed = strategy.to_devices(strategy.initialise(lambda: params))
    by_device = scores(strategy, placed, CONFIG, ComputeConfig(attention="xla"))
    found, greedy = score(by_device, texts, CONFIG, batch_size=16)
    expected = [-logs[len(context) - 1, target[0]] for context, target in texts]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert greedy.tolist() == [True, False] * 16


def test_spaces_at_the_end_of_a_context_belong_to_what_follows():
    tokenizer = CharTokenizer(" ab")
    context, tokens = encode(tokenizer, "ab  ", " b")
    assert (tokenizer.decode(context), tokenizer.decode(tokens)) == ("ab", "   b")


def test_what_does_not_fit_and_unequal_hosts_are_refused(found_scores, monkeypatch):
    texts = [*TEXTS, Continuation(TOKENS[:1], LONG[:41]), Continuation(TOKENS[:1], LONG[:50])]
    with pytest.raises(UserError, match=r"2 of 7 .* block_size 40 \(the longest has 50 tokens"):
        score(found_scores, texts, CONFIG, batch_size=8)
    monkeypatch.setattr(hosts, "all_equal", lambda text: False)
    with pytest.raises(UserError, match="the hosts have different texts"):
        score(found_scores, TEXTS, CONFIG, batch_size=8)
