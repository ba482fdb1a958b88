"""Sampling: exact against an uncached model, independent of chunks, compiled once per bucket."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from conftest import TEXT
from hypothesis import example, given
from hypothesis import strategies as st
from test_tokenizers import GPT2, TINY_RANKS

from gptjax import generate as gen
from gptjax import model
from gptjax.config import ModelConfig
from gptjax.generate import Sampling, generate
from gptjax.tokenizers import CharTokenizer, Gpt2Tokenizer, SentencePieceTokenizer

CONFIG = ModelConfig(n_layer=2, n_head=4, n_embd=32, block_size=32, vocab_size=61)
BANDED = dataclasses.replace(CONFIG, attention_pattern=("dense", "banded"), attention_window=5)
FIXED = dataclasses.replace(CONFIG, position="sinusoidal", tied_head=False)


def lively(config):
    params = jax.jit(model.init_params, static_argnums=(0, 1))(config, 0)
    return jax.tree.map(lambda x: x * 8, params)


def run(params, prompt, count, config=CONFIG, sampling=Sampling(0.0), **other):
    return np.concatenate(list(generate(params, prompt, count, config, sampling, **other)), axis=1)


WHOLE = jax.jit(model.apply, static_argnums=0)


def uncached_greedy(params, prompt, count, config):
    """The reference: the whole model over the last block_size tokens, for every token."""
    text = list(prompt)
    for _ in range(count):
        seen = text[-config.block_size :]
        padded = np.zeros((1, config.block_size), np.int32)
        padded[0, : len(seen)] = seen
        text.append(int(WHOLE(config, params, padded)[0][0, len(seen) - 1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("config", [CONFIG, BANDED, FIXED], ids=["dense", "banded", "sinusoidal"])
@pytest.mark.parametrize("length", [1, 16, 17, 31, 32, 33, 50])
def test_greedy_tokens_are_those_of_an_uncached_model_at_and_past_the_block(config, length):
    params, prompt = lively(config), np.arange(length) * 7 % 61
    expected = uncached_greedy(params, prompt, 70, config)
    assert len(set(expected)) > 3  # the model does not just repeat itself
    assert run(params, prompt, 70, config)[0].tolist() == expected
    assert run(params, prompt, 70, config, chunk=1)[0].tolist() == expected
    assert run(model.unstack(params, config), prompt, 70, config)[0].tolist() == expected


@pytest.mark.parametrize("kind", ["char", "gpt2", "sentencepiece"])
def test_cached_text_is_uncached_text_for_every_tokenizer(kind):
    """In GPT-2's case with its real vocabulary where it is at hand, else with a small one."""
    tokenizer = {
        "char": lambda: CharTokenizer("".join(sorted(set(TEXT)))),
        "gpt2": lambda: GPT2 or Gpt2Tokenizer(TINY_RANKS),
        "sentencepiece": lambda: SentencePieceTokenizer.train([TEXT], 400),
    }[kind]()
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.n_vocab)
    params, prompt = lively(config), tokenizer.encode("Now is the winter")
    expected = tokenizer.decode(uncached_greedy(params, prompt, 60, config))
    assert tokenizer.decode(run(params, prompt, 60, config)[0]) == expected


def test_samples_do_not_depend_on_chunks_or_on_how_many_are_drawn():
    params, wild = lively(CONFIG), Sampling(1.0, 20, 0.9)
    samples = [run(params, [1, 2], 70, sampling=wild, num_samples=3, chunk=c) for c in (1, 7, 64)]
    assert np.array_equal(samples[0], samples[1]) and np.array_equal(samples[0], samples[2])
    assert samples[0].shape == (3, 70)
    assert len({row.tobytes() for row in samples[0]}) == 3
    assert np.array_equal(samples[0][:1], run(params, [1, 2], 70, sampling=wild))
    assert not np.array_equal(samples[0], run(params, [1, 2], 70, sampling=wild, num_samples=3,
                                              seed=1))  # fmt: skip


def test_half_equals_exact_inside_the_block_and_goes_on_past_it():
    params, prompt = lively(CONFIG), np.arange(5)
    exact, half = (run(params, prompt, 100, overflow=how)[0] for how in ("exact", "half"))
    inside = CONFIG.block_size - 5 + 1
    assert np.array_equal(exact[:inside], half[:inside])
    # Past the block it is an uncached model that sees from half a block up to a whole one, each
    # time the block is full anew.
    text = np.concatenate([prompt, half])
    assert len(text) == 105
    for position in range(33, 105):
        seen = 16 + (position - 33) % 17
        context = text[position - seen : position]
        assert text[position] == uncached_greedy(params, context, 1, CONFIG)[0], position


@pytest.mark.parametrize(("length", "made"), [(3, 30), (31, 2), (32, 1), (33, 0)])
def test_stop_ends_with_the_block(length, made):
    params = lively(CONFIG)
    pieces = list(generate(params, np.zeros(length), 100, CONFIG, overflow="stop"))
    assert sum(piece.shape[1] for piece in pieces) == made


def test_lengths_in_a_bucket_share_their_programs_far_inside_the_block():
    config = dataclasses.replace(CONFIG, block_size=256)
    params = lively(config)
    prefill, decode, _ = gen.programs()
    prefill.clear_cache()
    decode.clear_cache()
    for length in range(1, 17):
        run(params, np.arange(length), 50 + length % 14, config)
    assert (prefill._cache_size(), decode._cache_size()) == (1, 1)


def test_lengths_in_a_bucket_and_all_settings_share_one_program():
    params = lively(CONFIG)
    programs = gen.programs()
    for program in programs:
        program.clear_cache()
    run(params, np.arange(3), 64)
    counts = [program._cache_size() for program in programs]
    assert counts == [1, 1, 1]
    for length, temperature, k, p, seed, new in [
        (4, 0.5, 0, 1.0, 1, 64), (9, 1.0, 5, 0.5, 2, 90), (16, 2.0, 1, 0.1, 3, 64),
    ]:  # fmt: skip
        sampling = Sampling(temperature, k, p)
        run(params, np.arange(length), new, sampling=sampling, seed=seed, chunk=10)
    assert [program._cache_size() for program in programs] == counts


@pytest.mark.parametrize(("length", "size"), [(1, 16), (16, 16), (17, 32), (33, 64), (90, 100)])
def test_buckets_are_powers_of_two_within_the_block(length, size):
    assert gen.bucket(length, 100) == size


# ----------------------------------------------------------------------------- filters


FILTER = jax.jit(gen.filter_logits)


@example(0.125, 4, 1.0, 1)
@example(1.0, 0, 0.9, 1)
@given(st.floats(0.1, 5), st.integers(0, 70), st.floats(0.01, 1), st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("vocabulary", [61, 2000])  # they are searched in steps of another size
def test_filters_keep_what_hugging_faces_warpers_keep(vocabulary, temperature, k, p, seed):
    logits = np.random.default_rng(seed).standard_normal((3, vocabulary)).astype("f4") * 3
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    if k:
        warpers.append(transformers.TopKLogitsWarper(k))
    if p < 1:
        warpers.append(transformers.TopPLogitsWarper(p))
    expected = torch.from_numpy(logits)
    for warper in warpers:
        expected = warper(None, expected)
    expected = expected.numpy()
    ours = np.asarray(FILTER(logits, Sampling(temperature, k, p)))
    kept = ours > model.MASKED
    # A token at the very edge of top-p may fall either way by rounding: allow none but that one.
    differ = kept != np.isfinite(expected)
    if differ.any():
        probability = np.exp(np.sort(logits / temperature)[:, ::-1])
        assert differ.sum(axis=1).max() == 1 and _on_the_edge(probability, k, p)
    both = kept & np.isfinite(expected)
    np.testing.assert_allclose(ours[both], expected[both], rtol=1e-5)


def _on_the_edge(probability, k, p):
    if k:
        probability = probability[:, :k]
    cumulative = np.cumsum(probability, axis=1) / probability.sum(axis=1, keepdims=True)
    return np.abs(cumulative - p).min() < 1e-5


def test_ties_stay_together():
    logits = np.array([[1.0, 3.0, 3.0, 2.0]], "f4")
    kept = np.asarray(gen.filter_logits(logits, Sampling(1.0, 1))) > model.MASKED
    assert kept.tolist() == [[False, True, True, False]]


def test_the_noise_is_finite_and_gumbels_for_every_bit_pattern():
    extremes = jnp.array([0, 511, 512, 2**32 - 512, 2**32 - 1], jnp.uint32)
    noise = np.asarray(gen.gumbel(extremes), "f8")
    first, last = 2.0**-24, 1 - 2.0**-24
    uniform = np.array([first, first, 3 * first, last, last])
    np.testing.assert_allclose(noise, -np.log(-np.log(uniform)), rtol=1e-5)


def test_the_programs_filter_a_flat_vocabulary_of_gpt2s_size_as_float64_does():
    """With the options that they are compiled with: the sums are long."""
    logits = np.random.default_rng(0).standard_normal((2, 50257)).astype("f4") * 0.1
    filters = jax.jit(gen.filter_logits, compiler_options=gen.compiler_options())
    for p in (0.5, 0.999):
        kept = (np.asarray(filters(logits, Sampling(1.0, 0, p))) > model.MASKED).sum(axis=1)
        ranked = np.sort(np.exp(logits.astype("f8")), axis=1)[:, ::-1]
        before = ranked.cumsum(axis=1) - ranked
        expected = (before < p * ranked.sum(axis=1, keepdims=True)).sum(axis=1)
        np.testing.assert_allclose(kept, expected, atol=5)  # of 50,257: rounding at the edge


def test_zeros_of_either_sign_are_equally_likely():
    logits = np.array([[-0.0, 0.0, -1.0]], "f4")
    kept = np.asarray(gen.filter_logits(logits, Sampling(1.0, 1))) > model.MASKED
    assert kept.tolist() == [[True, True, False]]


def test_draws_along_a_text_are_independent_and_fit_the_distribution():
    probability = np.random.default_rng(0).dirichlet(np.ones(9))
    keys = gen.sampling_keys(jax.random.key(1), 0, 40_000, 1)[:, 0]
    logits = np.broadcast_to(np.log(probability).astype("f4"), (len(keys), 9))
    drawn = np.asarray(jax.jit(gen.sample)(logits, keys, Sampling()))
    counts = np.bincount(drawn, minlength=9)
    assert scipy.stats.chisquare(counts, len(keys) * probability).pvalue > 1e-3
    # And a token says nothing of the next.
    pairs = np.bincount(drawn[:-1] * 9 + drawn[1:], minlength=81).reshape(9, 9)
    assert scipy.stats.chi2_contingency(pairs).pvalue > 1e-3


def test_draws_follow_the_filtered_distribution():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], "f4"))
    key = jax.random.key(0)
    many = np.broadcast_to(logits, (20_000, 4))
    (keys,) = jax.jit(gen.sampling_keys, static_argnums=(2, 3))(key, 0, 1, len(many))
    drawn = np.asarray(jax.jit(gen.sample)(many, keys, Sampling(1.0, 3)))
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(shares, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], atol=0.015)
    assert (np.asarray(gen.sample(many, keys, Sampling(0.0))) == 0).all()
