"""Hashed random numbers: even, independent, the same everywhere; as JAX's without the trick."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gptjax import hashed_random

BITS = 1 << 17


@pytest.fixture(params=["hashed", "jax"])
def each_kind(request, monkeypatch):
    """With the hash, and with what its off-switch puts in its place."""
    monkeypatch.setenv("GPTJAX_TRICKS", "" if request.param == "hashed" else "-hashed_random")
    return request.param


def keys(count, seed=0):
    return jax.random.bits(jax.random.key(seed, impl="threefry2x32"), (count, 2), jnp.uint32)


def fmix32(h):
    """MurmurHash3's finaliser by Python's own integers, from its author's source code
    (https://github.com/aappleby/smhasher, MurmurHash3.cpp)."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ (h >> 16)


def test_mix_is_murmurhash3s_finaliser():
    asked = [0, 1, 2, 12345, 2**31, 2**32 - 1]
    ours = hashed_random.mix(jnp.array(asked, jnp.uint32))
    assert ours.dtype == jnp.uint32 and ours.tolist() == [fmix32(h) for h in asked]


def test_masks_are_what_they_were():
    """Otherwise a run that is resumed would not be the same."""
    key, rows = jax.random.key(3, impl="threefry2x32"), jnp.array([0, 9])
    first, second = jax.random.bits(key, (2,), jnp.uint32).tolist()
    bits = [
        [fmix32(fmix32(i ^ first) + fmix32(row ^ second) & 0xFFFFFFFF) for i in range(50)]
        for row in (0, 9)
    ]
    for rate in (0.2, 0.5):
        mask = hashed_random.dropout_mask(key, rows, (2, 50), rate)
        assert np.array_equal(mask, np.array(bits) >= rate * 2**32)


def test_bits_are_even_and_independent(each_kind):
    bits = np.asarray(hashed_random.random_bits(keys(4), BITS))
    assert bits.shape == (4, BITS) and bits.dtype == np.uint32
    for row in bits:
        for byte in row[:, None].view("u1").T:
            assert scipy.stats.chisquare(np.bincount(byte, minlength=256)).pvalue > 1e-4
    # Chance makes correlations of about 1 / sqrt(2^17) = 0.003.
    masks = (bits >= np.uint32(0.2 * 2**32)).astype("f8")
    for lag in (1, 2, 64, 384, 4096):
        assert abs(np.corrcoef(masks[0, :-lag], masks[0, lag:])[0, 1]) < 0.015
    assert np.abs(np.corrcoef(masks) - np.eye(4)).max() < 0.015


def test_neighbouring_keys_are_no_better_known_than_strangers():
    bits = np.asarray(hashed_random.random_bits(keys(1), BITS))
    assert len(np.unique(bits)) == BITS  # one to one
    near = keys(1) ^ jnp.array([[1, 0], [0, 1]], jnp.uint32)
    flipped = np.bitwise_count(np.asarray(hashed_random.random_bits(near, BITS)) ^ bits)
    np.testing.assert_allclose(flipped.mean(axis=1) / 32, 0.5, atol=0.02)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_masks_drop_the_rate_in_every_row(each_kind, rate):
    rows = jnp.array([0, 1, 7, 2**31 - 1])
    mask = np.asarray(hashed_random.dropout_mask(jax.random.key(3), rows, (4, 100, 300), rate))
    assert mask.dtype == bool and mask.shape == (4, 100, 300)
    # Of 30,000 draws: five standard deviations.
    error = 5 * np.sqrt(rate * (1 - rate) / 30_000)
    np.testing.assert_allclose(1 - mask.mean(axis=(1, 2)), rate, atol=error)
    assert np.abs(np.corrcoef(mask.reshape(4, -1)) - np.eye(4)).max() < 0.03


def test_a_rows_mask_follows_from_its_number_and_the_key(each_kind):
    def mask(rows, seed=3, shape=(5, 6)):
        key, rows = jax.random.key(seed), jnp.array(rows)
        return np.asarray(hashed_random.dropout_mask(key, rows, (len(rows), *shape), 0.5))

    whole = mask([0, 1, 2, 3])
    assert np.array_equal(mask([3, 1]), whole[[3, 1]])
    assert not np.array_equal(mask([0, 1, 2, 3], seed=4), whole)


def test_gumbel_noise_has_its_distribution(each_kind):
    noise = np.asarray(hashed_random.gumbel(keys(2, seed=1), 50_000))
    assert noise.shape == (2, 50_000) and noise.dtype == np.float32
    assert scipy.stats.kstest(noise.reshape(-1), "gumbel_r").pvalue > 1e-3
    assert abs(np.corrcoef(noise)[0, 1]) < 0.02


def test_gumbel_noise_is_exact_up_to_its_largest(monkeypatch):
    """All 32 bits count where noise is large, as a rare token needs it; the rest is finite."""
    bits = np.array([0, 1, 2, 3, 10, 1000, 2**20 + 1, 2**31, 2**32 - 2**17, 2**32 - 1], "u4")
    monkeypatch.setattr(hashed_random, "random_bits", lambda keys, size: jnp.asarray(bits))
    noise = np.asarray(hashed_random.gumbel(keys(1), len(bits)), "f8")
    uniform = np.minimum((bits + 0.5) / 2**32, 1 - 2.0**-24)
    np.testing.assert_allclose(noise, -np.log(-np.log1p(-uniform)), rtol=2e-6)


def test_rare_tokens_win_as_often_as_they_should(monkeypatch):
    """P(noise > log(1 / p) + another's noise) is p / (1 + p), here by the noise of the smallest of
    2^32 numbers, which decide it, and the other's whole distribution."""
    bits = np.arange(1 << 16, dtype="u4")
    monkeypatch.setattr(hashed_random, "random_bits", lambda keys, size: jnp.asarray(bits))
    large = np.asarray(hashed_random.gumbel(keys(1), len(bits)), "f8")[::-1]
    other = scipy.stats.gumbel_r.ppf((np.arange(100_000) + 0.5) / 100_000)
    for p in (1e-7, 1e-8, 1e-9):
        needed = other - np.log(p)
        wins = len(bits) - np.searchsorted(large, needed)
        rest = needed < large[0]  # which numbers beyond these decide
        share = np.where(rest, -np.expm1(-np.exp(-needed)), wins / 2**32).mean()
        assert share == pytest.approx(p / (1 + p), rel=0.03), p


@pytest.mark.slow
@pytest.mark.long
def test_fifty_thousand_tokens_are_drawn_by_their_probabilities():
    """Chi-square, with 50,000 tokens of which each is drawn once in a hundred million
    times (with 23 bits once in three billion times, which
    gives a p of 0.003)."""
    probabilities = np.concatenate([[0.5, 0.3], np.full(255, 2e-4 / 51), np.full(50_000, 1e-8)])
    probabilities[0] += 1 - probabilities.sum()
    logits = jnp.log(jnp.asarray(probabilities, jnp.float32))

    @jax.jit
    def draw(seed):
        chosen = (hashed_random.gumbel(keys(256, seed), len(logits)) + logits).argmax(-1)
        return jnp.array([(chosen == 0).sum(), (chosen == 1).sum(), (chosen >= 257).sum()])

    counts = sum(np.asarray(draw(seed)) for seed in range(100))
    total = 100 * 256
    expected = total * np.array([*probabilities[:2], 50_000 * 1e-8])
    counts, expected = (np.append(x, total - x.sum()) for x in (counts, expected))
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-2, (counts, expected)


def test_the_off_switch_is_jaxs_own_whatever_its_default(monkeypatch):
    monkeypatch.setenv("GPTJAX_TRICKS", "-hashed_random")
    expected = [
        jax.random.bits(jax.random.wrap_key_data(key, impl="threefry2x32"), (10,), jnp.uint32)
        for key in keys(3)
    ]
    assert np.array_equal(hashed_random.random_bits(keys(3), 10), expected)
    with jax.default_prng_impl("rbg"):
        assert np.array_equal(hashed_random.random_bits(keys(3), 10), expected)
