"""The network: sizes, numbers as of a few lines of numpy, its cache, dropout in every branch."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest
from small_models import ALL_VARIANTS, SMALL, VARIANTS, assert_close, random_params

from gptjax import model
from gptjax.cache import init_cache
from gptjax.config import PRESETS, ModelConfig
from gptjax.runtime_config import ComputeConfig

# Scanned, so that a model of two layers compiles one.
SCANNED = ComputeConfig(scan_unroll=1)


@functools.partial(jax.jit, static_argnames="config")
def apply(config, params, tokens, cache=None, **options):
    return model.apply(config, params, tokens, cache, compute=SCANNED, **options)


def tokens_for(config: ModelConfig, batch: int = 2) -> np.ndarray:
    shape = (batch, config.block_size)
    return np.random.default_rng(0).integers(0, config.vocab_size, shape)


@functools.cache
def shapes(config: ModelConfig):
    return jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))


def count(config: ModelConfig) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes(config)))


# --------------------------------------------------------------------------------- sizes

# GPT-2: the counts of the released models; GPT-3: table 2.1 of arXiv:2005.14165.
GPT2 = {"gpt2": 124439808, "gpt2-medium": 354823168, "gpt2-large": 774030080, "gpt2-xl": 1557611200}
GPT3 = {
    "gpt3-small": 125e6, "gpt3-medium": 350e6, "gpt3-large": 760e6, "gpt3-xl": 1.3e9,
    "gpt3-2.7b": 2.7e9, "gpt3-6.7b": 6.7e9, "gpt3-13b": 13e9, "gpt3-175b": 175e9,
}  # fmt: skip


@pytest.mark.parametrize("name", GPT2)
def test_gpt2_sizes_have_the_released_parameter_counts(name):
    assert count(PRESETS[name]) == GPT2[name]


@pytest.mark.parametrize("name", GPT3)
def test_gpt3_sizes_are_within_3_percent_of_the_paper(name):
    assert count(PRESETS[name]) == pytest.approx(GPT3[name], rel=0.03)


@pytest.mark.parametrize("config", [*ALL_VARIANTS.values(), *PRESETS.values()])
def test_num_parameters_counts_what_init_makes(config):
    assert config.num_parameters() == count(config)
    tables = [shapes(config).get(name) for name in ("wte", "wpe", "lm_head")]
    embeddings = sum(math.prod(x.shape) for x in tables if x is not None)
    assert config.num_parameters(embeddings=False) == count(config) - embeddings


def test_two_sentences_of_four_tokens_give_2_by_4_by_50257():
    # "Every effort moves you" and "Every day holds a" in GPT-2's encoding.
    tokens = np.array([[6109, 3626, 6100, 345], [6109, 1110, 6622, 257]])
    config = dataclasses.replace(PRESETS["gpt2"], tied_head=False, qkv_bias=False, dropout=0.1)
    assert count(config) == 163_009_536
    logits, cache = jax.eval_shape(functools.partial(model.apply, config), shapes(config), tokens)
    assert (logits.shape, logits.dtype, cache) == ((2, 4, 50257), np.float32, None)


def test_initial_weights_have_gpt2s_spread():
    # More than 12 layers are not unrolled: quick to compile.
    config = ModelConfig(13, 4, 64, 200, vocab_size=500, tied_head=False)
    params = jax.jit(model.init, static_argnums=0)(config, jax.random.key(0))
    h = params["h"]
    for array in (params["wte"], params["wpe"], params["lm_head"], h["attn"]["c_attn"]["kernel"]):
        assert np.std(array) == pytest.approx(0.02, rel=0.03)
        assert abs(np.mean(array)) < 0.001
    for part in (h["attn"], h["mlp"]):
        assert np.std(part["c_proj"]["kernel"]) == pytest.approx(0.02 / math.sqrt(26), rel=0.03)
        assert not part["c_proj"]["bias"].any()
    # Every layer and every table draws its own.
    assert not np.allclose(h["mlp"]["c_fc"]["kernel"][0], h["mlp"]["c_fc"]["kernel"][1])
    assert not np.allclose(params["wte"], params["lm_head"])


# -------------------------------------------------------------------------------- numbers


MIXED = {
    "gpt2": dataclasses.replace(SMALL, dropout=0.5),  # which must not act in evaluation
    "nanogpt": dataclasses.replace(SMALL, bias=False, activation="gelu_erf", vocab_multiple=16),
    "every setting": dataclasses.replace(
        VARIANTS["every setting"], activation="silu", scale_attn_weights=True
    ),
    "no qkv bias": dataclasses.replace(SMALL, qkv_bias=False, tied_head=False),
    "only qkv bias": dataclasses.replace(
        SMALL, bias=False, qkv_bias=True, vocab_multiple=16, tied_head=False
    ),
    "banded": dataclasses.replace(
        ALL_VARIANTS["banded"], position="sinusoidal", scale_attn_by_inverse_layer_idx=True
    ),
    "no layers": ALL_VARIANTS["no layers"],
}
"""All settings in few programs: compiling is what takes time."""


@pytest.mark.parametrize("name", MIXED)
def test_logits_are_those_of_the_papers_formulas(name):
    config = MIXED[name]
    params, tokens = random_params(config, scale=0.5), tokens_for(config)
    logits, _ = apply(config, params, tokens)
    assert logits.dtype == np.float32
    assert_close(np.asarray(logits), numpy_gpt.logits(config, params, tokens))


@pytest.mark.parametrize("name", ["gpt2", "banded"])
def test_documents_of_a_sequence_are_computed_as_if_alone(name):
    config = MIXED[name]
    params, tokens = random_params(config, scale=0.5), tokens_for(config)
    positions = np.array([[*range(9), 0, 1, 2], [0, 0, *range(10)]], "i4")
    logits = np.asarray(apply(config, params, tokens, positions=positions)[0])
    for row, part in [(0, slice(9)), (0, slice(9, 12)), (1, slice(1)), (1, slice(2, 12))]:
        alone = numpy_gpt.logits(config, params, tokens[row : row + 1, part])
        assert_close(logits[row : row + 1, part], alone)


def test_bfloat16_stays_near_float32_and_returns_float32():
    params, tokens = random_params(SMALL), tokens_for(SMALL)
    exact = numpy_gpt.logits(SMALL, params, tokens)
    rough, _ = apply(dataclasses.replace(SMALL, dtype="bfloat16"), params, tokens)
    assert rough.dtype == jnp.float32
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 3e-2


def test_more_tokens_than_the_block_are_refused():
    with pytest.raises(ValueError, match="13 tokens do not fit block_size 12"):
        model.apply(SMALL, shapes(SMALL), np.zeros((1, 13), int))


# --------------------------------------------------------------- how it is computed, exactly


def test_remat_changes_no_gradient_and_holds_fewer_bytes():
    config = dataclasses.replace(SMALL, n_layer=5, block_size=64)
    params, tokens = random_params(config), tokens_for(config)
    found, scratch = {}, {}
    for again in ("none", "elementwise", "mlp", "attention", "full", True):
        compute = ComputeConfig(remat=again, scan_unroll=1)

        def loss(params, compute=compute):
            return model.apply(config, params, tokens, compute=compute)[0].var()

        program = jax.jit(jax.grad(loss)).lower(params).compile()
        scratch[again] = program.memory_analysis().temp_size_in_bytes
        found[again] = jax.tree.leaves(program(params))
    for gradients in found.values():
        for a, b in zip(gradients, found["none"], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert scratch["none"] > 1.3 * scratch["elementwise"]
    assert scratch["elementwise"] > 1.1 * max(scratch["mlp"], scratch["attention"])
    assert min(scratch["mlp"], scratch["attention"]) > 1.1 * scratch["full"]
    assert scratch[True] == scratch["full"]


@pytest.mark.parametrize(
    ("layers", "compute", "unrolled"),
    [(12, ComputeConfig(), True), (13, ComputeConfig(), False),
     (2, ComputeConfig(remat=True), False), (13, ComputeConfig(scan_unroll=13), True)],
)  # fmt: skip
def test_shallow_models_are_unrolled_unless_remat_needs_a_loop(layers, compute, unrolled):
    config = dataclasses.replace(SMALL, n_layer=layers, block_size=4)
    forward = jax.jit(lambda p, t: model.apply(config, p, t, compute=compute)[0])
    program = forward.lower(shapes(config), np.zeros((1, 4), np.int32)).as_text()
    assert ("stablehlo.while" not in program) == unrolled


# ---------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("lanes", [1, 16])  # which two heads fill
@pytest.mark.parametrize("name", ["gpt2", "banded", "no layers"])
def test_cached_logits_are_uncached_ones_however_text_is_cut(name, lanes):
    config = MIXED[name]
    params, tokens = random_params(config, scale=0.5), tokens_for(config)
    cache = init_cache(config, 2, config.block_size, np.float32, lanes=lanes)
    if config.n_layer:
        assert cache.keys.shape[1:] == (
            2 * 2 * 8 // max(8, lanes),
            config.block_size,
            max(8, lanes),
        )
    parts, start = [], 0
    for size in (5, 1, 5, 1):
        logits, cache = apply(config, params, tokens[:, start : start + size], cache)
        parts.append(logits)
        start += size
        assert cache.length == start
    assert_close(np.concatenate(parts, axis=1), numpy_gpt.logits(config, params, tokens))


def test_one_position_s_logits_are_those_of_all():
    config = MIXED["gpt2"]
    params, tokens = random_params(config, scale=0.5), tokens_for(config)
    expected = numpy_gpt.logits(config, params, tokens)
    one, _ = apply(config, params, tokens, logits_at=7)
    assert_close(np.asarray(one), expected[:, 7:8])
    # Behind a cache positions count from the new tokens.
    _, cache = apply(config, params, tokens[:, :5], init_cache(config, 2, 12, np.float32))
    one, _ = apply(config, params, tokens[:, 5:], cache, logits_at=2)
    assert_close(np.asarray(one), expected[:, 7:8])


# -------------------------------------------------------------------------------- dropout

RATE = 0.25
# A residual stream of zeros, and a head that shows the final LayerNorm's output.
BARE = ModelConfig(
    2, 4, 32, 2, vocab_size=32, tied_head=False, dropout=RATE, position="sinusoidal"
)  # fmt: skip


def bare_params():
    params = jax.tree.map(lambda x: np.zeros(x.shape, "f4"), shapes(BARE))
    params["ln_f"]["scale"] += 1
    params["lm_head"] += np.eye(32, dtype="f4")
    # The first position's numbers are sin(0) and cos(0): 0, 1.
    params["wte"][:, 1::2] -= 1
    return params


def values_seen(params):
    """The numbers of the residual stream, up to their mean and scale: in each of 500 rows their
    ranks, from the largest down."""
    logits, _ = apply(BARE, params, np.zeros((500, 1), int), dropout_key=jax.random.key(0))
    rounded = -np.round(np.asarray(logits[:, 0]), 4)
    return np.array([np.unique(row, return_inverse=True)[1] for row in rounded])


def test_dropout_acts_on_embeddings():
    config = dataclasses.replace(BARE, n_layer=0)
    params = {"wte": np.zeros((32, 32), "f4"), "lm_head": np.eye(32, dtype="f4")}
    params["wte"][:, ::2] = 1  # with the positions': all ones
    logits, _ = apply(config, params, np.zeros((500, 1), int), dropout_key=jax.random.key(0))
    assert np.unique(logits) == pytest.approx([0, 4 / 3], rel=1e-6)
    assert np.mean(np.asarray(logits) == 0) == pytest.approx(RATE, abs=0.02)


@pytest.mark.parametrize("branch", ["attn", "mlp"])
def test_dropout_acts_on_each_branchs_output(branch):
    params = bare_params()
    params["h"][branch]["c_proj"]["bias"][0] += 1
    seen = values_seen(params)
    assert set(np.unique(seen)) == {0, 1}
    assert np.mean(seen == 1) == pytest.approx(RATE, abs=0.02)


def test_dropout_acts_on_attention_weights():
    params = bare_params()
    params["h"]["attn"]["c_attn"]["bias"][0, 64:] = 1  # all values are one
    params["h"]["attn"]["c_proj"]["kernel"][0] += np.eye(32, dtype="f4")
    seen = values_seen(params)
    # A token alone has one weight a head: it takes all eight numbers of the head with it.
    gone = (seen.reshape(-1, 4, 8) == 1).all(axis=2)
    assert gone.mean() == pytest.approx(RATE, abs=0.03)
    assert np.mean(seen == 1) == pytest.approx(1 - (1 - RATE) ** 2, abs=0.03)


def test_layers_drop_independently():
    params = bare_params()
    params["h"]["mlp"]["c_proj"]["bias"] += 1
    seen = values_seen(params)
    shares = np.bincount(seen.reshape(-1)) / seen.size
    np.testing.assert_allclose(shares, [(1 - RATE) ** 2, 2 * RATE * (1 - RATE), RATE**2], atol=0.02)


def test_dropout_follows_the_key_and_the_row():
    config = dataclasses.replace(SMALL, dropout=0.5)
    params, tokens = random_params(config), tokens_for(config, batch=4)

    def logits(order, seed=0):
        key, rows = jax.random.key(seed), np.array(order)
        return np.asarray(apply(config, params, tokens[rows], dropout_key=key, rows=rows)[0])

    found = logits([0, 1, 2, 3])
    assert not np.allclose(found, logits([0, 1, 2, 3], seed=1))
    assert_close(logits([3, 1, 0, 2]), found[[3, 1, 0, 2]])
