"""Parameters laid out for decoding are the same model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest
from small_models import ALL_VARIANTS, SMALL, assert_close, random_params

from gptjax import model
from gptjax.cache import init_cache
from gptjax.decode_layout import unstack

TOKENS = np.random.default_rng(0).integers(0, 23, (2, 12))
BANDED = dataclasses.replace(ALL_VARIANTS["banded"], tied_head=False)

apply = jax.jit(model.apply, static_argnames="config")


@pytest.mark.parametrize("config", [BANDED, ALL_VARIANTS["no layers"]], ids=["banded", "none"])
def test_unstacked_parameters_are_the_same_model(config):
    params = jax.tree.map(jnp.asarray, random_params(config, scale=0.5))
    apart = unstack(params, config)
    assert "h" not in apart and sum(key.startswith("h_") for key in apart) == config.n_layer
    expected = numpy_gpt.logits(config, params, TOKENS)
    assert_close(np.asarray(apply(config, apart, TOKENS)[0]), expected)
    # One position's logits, which is all that the last layer then computes; and with a cache.
    cache = init_cache(config, 2, 12, np.float32, stacked="h_0" not in apart)
    one, cache = apply(config, apart, TOKENS[:, :6], cache, logits_at=4)
    assert_close(np.asarray(one), expected[:, 4:5])
    one, cache = apply(config, apart, TOKENS[:, 6:], cache, logits_at=3)
    assert_close(np.asarray(one), expected[:, 9:10])
    assert cache.length == 12


def test_matrices_take_the_compute_precision_norms_do_not():
    config = dataclasses.replace(SMALL, dtype="bfloat16", tied_head=False)
    apart = unstack(random_params(config), config)
    wide = {"/".join(key.key for key in path) for path, x in jax.tree.leaves_with_path(apart)
            if x.dtype == np.float32}  # fmt: skip
    norms = {f"h_{i}/{norm}/{leaf}" for i in (0, 1) for norm in ("ln_1", "ln_2")
             for leaf in ("scale", "bias")}  # fmt: skip
    assert wide == {"wpe", "ln_f/scale", "ln_f/bias"} | norms
    rest = [x for x in jax.tree.leaves(apart) if x.dtype != np.float32]
    assert rest and all(x.dtype == jnp.bfloat16 for x in rest)


def test_rounding_weights_early_takes_no_further_from_float32():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    params = random_params(config, scale=0.5)
    exact = numpy_gpt.logits(SMALL, params, TOKENS)
    errors = [
        np.linalg.norm(apply(config, p, TOKENS)[0] - exact)
        for p in (params, unstack(params, config))
    ]
    assert errors[1] < 1.5 * errors[0]


def test_consume_frees_what_was_given_and_copied():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    params = jax.tree.map(jnp.array, random_params(config))
    apart = unstack(params, config, consume=True)
    assert all(x.is_deleted() for x in jax.tree.leaves(params["h"]))
    assert params["wte"].is_deleted()  # the new one is of another precision
    assert not any(x.is_deleted() for x in jax.tree.leaves(apart))
    params = jax.tree.map(jnp.array, random_params(config))
    unstack(params, config)
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))
