"""Sampling: exact against an uncached model, whatever the chunks; filters and draws by numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_models import random_params

from gptjax import sampling
from gptjax.attention import MASKED
from gptjax.config import ModelConfig
from gptjax.decode_layout import unstack
from gptjax.devices.cpu import sampling_compiler_options
from gptjax.sampling import Sampling, generate

CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=61, bias=False)
MIXED = dataclasses.replace(
    CONFIG, n_layer=2, attention_pattern=("dense", "banded"), attention_window=5,
    position="sinusoidal", tied_head=False,
)  # fmt: skip


@functools.cache
def params_of(config):
    """Such that the likeliest tokens vary: norms near one, all else far from zero."""

    def near_one(path, x):
        return jnp.asarray(x + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(near_one, random_params(config, scale=0.7))


def run(prompt, count, config=CONFIG, how=Sampling(0.0), params=None, **other):
    """int [num_samples, n]."""
    params = params_of(config) if params is None else params
    return np.concatenate(
        list(generate(params, np.array(prompt), count, config, how, **other)), axis=1
    )


def prompt_of(length):
    return np.arange(length) * 11 % 61


@pytest.mark.parametrize("length", [1, 9, 15, 16, 17, 25])
def test_greedy_tokens_are_an_uncached_models_past_the_block(length):
    expected = numpy_gpt.greedy(CONFIG, params_of(CONFIG), prompt_of(length), 24)
    assert len(set(expected)) > 3  # the model does not just repeat itself
    assert run(prompt_of(length), 24)[0].tolist() == expected
    assert run(prompt_of(length), 24, chunk=1)[0].tolist() == expected


def test_banded_unstacked_sinusoidal_models_decode_alike():
    expected = numpy_gpt.greedy(MIXED, params_of(MIXED), prompt_of(5), 12)
    assert len(set(expected)) > 3
    params = unstack(params_of(MIXED), MIXED)
    assert run(prompt_of(5), 12, MIXED, params=params)[0].tolist() == expected


@pytest.mark.parametrize("length", [1, 15, 25])
def test_a_penalty_is_for_all_tokens_of_the_text_past_the_block_too(length):
    text = prompt_of(length).tolist()
    for _ in range(24):
        logits = numpy_gpt.forward(CONFIG, params_of(CONFIG), text[-16:])[0][-1]
        for token in set(text):
            logits[token] = logits[token] * 1.5 if logits[token] < 0 else logits[token] / 1.5
        text.append(int(logits.argmax()))
    expected = text[length:]
    assert expected != numpy_gpt.greedy(CONFIG, params_of(CONFIG), prompt_of(length), 24)
    for chunk in (64, 1):
        how = Sampling(0.0, repetition_penalty=1.5)
        assert run(prompt_of(length), 24, how=how, chunk=chunk)[0].tolist() == expected


def test_samples_do_not_depend_on_chunks_or_their_number():
    random = functools.partial(run, [1, 2], 24, how=Sampling(1.0, 20, 0.9, 0.01, 1.1))
    samples = [random(num_samples=3, chunk=chunk) for chunk in (1, 7, 64)]
    assert samples[0].shape == (3, 24) and samples[0].dtype == np.int32
    assert np.array_equal(samples[0], samples[1]) and np.array_equal(samples[0], samples[2])
    assert len({row.tobytes() for row in samples[0]}) == 3
    assert np.array_equal(samples[0][:1], random())
    assert not np.array_equal(samples[0], random(num_samples=3, seed=1))


@pytest.mark.parametrize("overflow", ["exact", "half"])
def test_for_ever_begins_as_a_finite_text(overflow):
    endless = generate(params_of(CONFIG), prompt_of(5), None, CONFIG, Sampling(), overflow=overflow)
    begun = [piece for _, piece in zip(range(9), endless, strict=False)]
    found = np.concatenate(begun, axis=1)
    assert np.array_equal(
        found, run(prompt_of(5), found.shape[1], how=Sampling(), overflow=overflow)
    )
    assert found.shape[1] >= 40  # past the block of 16


def test_half_goes_on_with_half_a_block_each_time_it_is_full():
    prompt = prompt_of(5)
    half = run(prompt, 40, overflow="half")[0]
    text = np.concatenate([prompt, half])
    assert len(text) == 45
    for position in range(5, 45):
        # Up to the block all is seen; then from 8 tokens up to 16, again and again.
        seen = position if position <= 16 else 8 + (position - 17) % 9
        context = text[position - seen : position]
        assert [text[position]] == numpy_gpt.greedy(CONFIG, params_of(CONFIG), context, 1)


@pytest.mark.parametrize(("length", "made"), [(3, 14), (15, 2), (16, 1), (17, 0), (24, 0)])
def test_stop_ends_with_the_block(length, made):
    pieces = list(generate(params_of(CONFIG), prompt_of(length), 100, CONFIG, overflow="stop"))
    assert sum(piece.shape[1] for piece in pieces) == made


def test_pieces_are_as_long_as_the_chunk_says():
    pieces = list(generate(params_of(CONFIG), prompt_of(3), 13, CONFIG, chunk=5))
    assert [piece.shape for piece in pieces] == [(1, 1), (1, 5), (1, 5), (1, 2)]
    assert list(generate(params_of(CONFIG), prompt_of(3), 0, CONFIG)) == []


def test_lengths_in_a_bucket_and_all_settings_share_programs(caplog):
    config = dataclasses.replace(CONFIG, block_size=256)
    run(prompt_of(3), 45, config)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for length, temperature, k, p, seed, new in [
            (4, 0.5, 0, 1.0, 1, 33), (9, 1.0, 5, 0.5, 2, 64), (16, 2.0, 1, 0.1, 3, 38),
        ]:  # fmt: skip
            how = Sampling(temperature, k, p)
            run(prompt_of(length), new, config, how, seed=seed, chunk=10)
        assert not [r.message for r in caplog.records if "Compiling" in r.message]
        run(prompt_of(33), 5, config)  # of another bucket
        assert any("Compiling" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("length", "size"), [(0, 16), (1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (90, 100)]
)
def test_buckets_are_powers_of_two_within_the_block(length, size):
    assert sampling.bucket(length, 100) == size


# ------------------------------------------------------------------------------- filters

filter_logits = jax.jit(sampling.filter_logits)


def kept_by_hand(logits, temperature, k, p):
    """bool [V], in float64: sort, count, sum up."""
    scaled = logits.astype("f8") / temperature
    kept = np.ones(len(scaled), bool)
    if k:
        kept = scaled >= np.sort(scaled)[-min(k, len(scaled))]
    weights = np.where(kept, np.exp(scaled - scaled.max()), 0)
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    least = weights[order][before < p * weights.sum()][-1] if p < 1 else 0
    return kept & (weights >= least)


@settings(max_examples=50)
@example(0.125, 4, 1.0, 1)
@example(1.0, 0, 0.9, 1)
@example(1.0, 100, 1.0, 1)
@given(st.floats(0.1, 5), st.integers(0, 70), st.floats(0.01, 1), st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("vocabulary", [61, 2000])  # they are searched in steps of another size
def test_filters_keep_what_sorting_keeps(vocabulary, temperature, k, p, seed):
    p = round(p, 4)
    logits = np.random.default_rng(seed).standard_normal((3, vocabulary)).astype("f4") * 3
    ours = np.asarray(filter_logits(logits, Sampling(temperature, k, p)))
    for row, logit in zip(ours, logits, strict=True):
        # At the very edge of top-p rounding may decide: a little less or more.
        least, most = (kept_by_hand(logit, temperature, k, q) for q in (p - 1e-5, p + 1e-5))
        kept = row > MASKED
        assert (kept >= least).all() and (kept <= most).all()
        np.testing.assert_allclose(row[kept], logit[kept] / np.float32(temperature), rtol=1e-5)


def test_equally_likely_tokens_stay_or_go_together():
    def kept(logits, how):
        return (np.asarray(filter_logits(np.array([logits], "f4"), how)) > MASKED)[0].tolist()

    assert kept([1.0, 3.0, 3.0, 2.0], Sampling(1.0, 1)) == [False, True, True, False]
    assert kept([-0.0, 0.0, -1.0], Sampling(1.0, 1)) == [True, True, False]
    assert kept([0.0, 0.0, 0.0], Sampling(1.0, 0, 0.2)) == [True, True, True]
    assert kept([1.0, 3.0, 2.0], Sampling(0.0, 2)) == [False, True, True]
    assert kept([3.0, 3.0, 2.9], Sampling(min_p=1.0)) == [True, True, False]


def test_a_flat_vocabulary_of_gpt2s_size_is_summed_up_well():
    """With the options that sampling is compiled with: the sums are long."""
    logits = np.random.default_rng(0).standard_normal((2, 50257)).astype("f4") * 0.1
    filters = jax.jit(sampling.filter_logits, compiler_options=sampling_compiler_options())
    kept = (np.asarray(filters(logits, Sampling(1.0, 0, 0.999))) > MASKED).sum(axis=1)
    expected = [kept_by_hand(row, 1.0, 0, 0.999).sum() for row in logits]
    np.testing.assert_allclose(kept, expected, atol=5)  # of 50,257: rounding at the edge


# --------------------------------------------------------------------------------- draws

sample = jax.jit(sampling.sample)
keys_for = jax.jit(sampling.hash_keys, static_argnums=(2, 3))


def test_draws_along_a_text_are_independent_and_fit():
    probability = np.random.default_rng(0).dirichlet(np.ones(9))
    keys = keys_for(jax.random.key(1), 0, 40_000, 1)[:, 0]
    logits = np.broadcast_to(np.log(probability).astype("f4"), (len(keys), 9))
    drawn = np.asarray(sample(logits, keys, Sampling()))
    counts = np.bincount(drawn, minlength=9)
    assert scipy.stats.chisquare(counts, len(keys) * probability).pvalue > 1e-3
    # A token says nothing of the next.
    pairs = np.bincount(drawn[:-1] * 9 + drawn[1:], minlength=81).reshape(9, 9)
    assert scipy.stats.chi2_contingency(pairs).pvalue > 1e-3


def test_draws_follow_the_filtered_distribution():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], "f4"))
    many = np.broadcast_to(logits, (20_000, 4))
    (keys,) = keys_for(jax.random.key(0), 0, 1, len(many))
    drawn = np.asarray(sample(many, keys, Sampling(1.0, 3)))
    assert drawn.dtype == np.int32
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(shares, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], atol=0.015)
    assert (np.asarray(sample(many, keys, Sampling(0.0))) == 0).all()


def test_a_positions_key_depends_on_nothing_else():
    keys = np.asarray(keys_for(jax.random.key(0), 3, 4, 5))
    assert keys.shape == (4, 5, 2) and keys.dtype == np.uint32
    assert len(np.unique(keys.reshape(-1, 2), axis=0)) == 20
    assert np.array_equal(keys_for(jax.random.key(0), 5, 2, 3), keys[2:, :3])


@pytest.mark.parametrize(("samples", "devices"), [(8, 8), (5, 8), (7, 3), (1, 8)])
def test_samples_on_many_devices_are_those_of_one(samples, devices):
    how = Sampling(1.0, top_k=40, top_p=0.9, repetition_penalty=1.2)
    expected = run(prompt_of(5), 24, how=how, num_samples=samples)
    before = set(map(id, jax.live_arrays()))
    pieces = generate(
        params_of(CONFIG), prompt_of(5), 24, CONFIG, how, num_samples=samples, chunk=3,
        devices=jax.devices()[:devices],
    )  # fmt: skip
    found = [next(pieces)]
    used = min(samples, devices)
    new = [x for x in jax.live_arrays() if id(x) not in before]
    spread = [x for x in new if not x.sharding.is_fully_replicated]
    assert {len(x.sharding.device_set) for x in spread} == ({used} if used > 1 else set())
    assert np.array_equal(np.concatenate([*found, *pieces], axis=1), expected)
