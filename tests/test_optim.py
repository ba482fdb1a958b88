"""The schedule by hand, the decay mask by name, and AdamW as its paper has it."""

import dataclasses
import functools
import math

import jax
import numpy as np
import optax
import pytest

from gptjax import model, optim
from gptjax.config import ModelConfig, OptimizerConfig, TrainConfig

SCHEDULE = TrainConfig(
    optimizer=OptimizerConfig(1e-3, min_lr=1e-4, warmup_steps=100, lr_decay_steps=1500),
    max_steps=2000,
)


def nanogpt_rate(it: int) -> float:
    """nanoGPT's documented rule, in Python's floats."""
    if it < 100:
        return 1e-3 * (it + 1) / 101
    if it > 1500:
        return 1e-4
    ratio = (it - 100) / (1500 - 100)
    return 1e-4 + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (1e-3 - 1e-4)


@pytest.mark.parametrize("step", [0, 1, 50, 99, 100, 101, 800, 1499, 1500, 1501, 1999, 5000])
def test_learning_rate_is_nanogpts_formula(step):
    assert float(optim.learning_rate(SCHEDULE, step)) == pytest.approx(nanogpt_rate(step), rel=1e-5)


def test_learning_rate_by_hand():
    assert float(optim.learning_rate(SCHEDULE, 0)) == pytest.approx(1e-3 / 101)
    assert float(optim.learning_rate(SCHEDULE, 100)) == pytest.approx(1e-3)
    assert float(optim.learning_rate(SCHEDULE, 800)) == pytest.approx((1e-3 + 1e-4) / 2)


def test_decay_ends_at_max_steps_unless_given_otherwise():
    short = OptimizerConfig(1e-3, min_lr=1e-4, warmup_steps=0)
    config = TrainConfig(optimizer=short, max_steps=10)
    rates = [float(optim.learning_rate(config, step)) for step in (0, 5, 10)]
    assert rates == pytest.approx([1e-3, (1e-3 + 1e-4) / 2, 1e-4])


@pytest.mark.parametrize("warmup", [7, 20])
def test_a_schedule_of_warm_up_alone_stays_finite(warmup):
    """As many steps of warm-up as there are, or more."""
    config = TrainConfig(optimizer=OptimizerConfig(1e-3, 1e-4, warmup_steps=warmup), max_steps=7)
    rates = [float(optim.learning_rate(config, step)) for step in range(30)]
    assert all(map(math.isfinite, rates))
    assert rates[:7] == pytest.approx([1e-3 * (i + 1) / (warmup + 1) for i in range(7)])
    assert rates[warmup + 1 :] == pytest.approx([1e-4] * (29 - warmup))


def test_a_linear_schedule_by_hand():
    rates = OptimizerConfig(1e-2, min_lr=0.0, warmup_steps=4, lr_schedule="linear")
    config = TrainConfig(optimizer=rates, max_steps=104)
    found = [float(optim.learning_rate(config, step)) for step in (0, 3, 4, 29, 54, 104, 200)]
    assert found == pytest.approx([2e-3, 8e-3, 1e-2, 7.5e-3, 5e-3, 0, 0], abs=1e-9)


def test_muon_updates_the_blocks_matrices_only():
    model_config = ModelConfig(2, 2, 8, 4, vocab_size=5, tied_head=False)
    config = TrainConfig(model_config, optimizer=OptimizerConfig(kind="muon"))
    params = jax.eval_shape(functools.partial(model.init, model_config), jax.random.key(0))
    kinds = jax.tree.leaves_with_path(optim.kinds(config, params))
    assert {"/".join(key.key for key in path) for path, kind in kinds if kind == "muon"} == {
        "h/attn/c_attn/kernel", "h/attn/c_proj/kernel", "h/mlp/c_fc/kernel", "h/mlp/c_proj/kernel",
    }  # fmt: skip
    state = jax.eval_shape(optim.optimizer(config).init, params)
    # One momentum of a matrix, two moments of all else.
    names = [path[-1].key for path, _ in jax.tree.leaves_with_path(state) if path[-1] != "count"
             and hasattr(path[-1], "key")]  # fmt: skip
    assert names.count("kernel") == 4 and names.count("wte") == 2


def test_muons_rate_follows_the_schedule():
    """Half of the peak of one is half of the peak of the other; decay by the matrix's own rate."""
    rates = OptimizerConfig(1e-2, kind="muon", muon_learning_rate=0.3, weight_decay=0.5)
    config = TrainConfig(ModelConfig(1, 1, 8, 4, vocab_size=5), optimizer=rates)
    params = {"h": {"mlp": {"c_fc": {"kernel": np.ones((1, 8, 8), "f4")}}}, "wte": np.ones((5, 8))}
    grads = jax.tree.map(np.zeros_like, params)
    transform = optim.optimizer(config, 5e-3)
    updates, _ = transform.update(grads, transform.init(params), params)
    kernel = updates["h"]["mlp"]["c_fc"]["kernel"]
    np.testing.assert_allclose(kernel, -0.15 * 0.5 * np.ones((1, 8, 8)), rtol=1e-6)
    np.testing.assert_allclose(updates["wte"], -5e-3 * 0.5 * np.ones((5, 8)), rtol=1e-6)


def test_weight_decay_falls_on_exactly_these_parameters():
    config = ModelConfig(2, 2, 8, 4, vocab_size=5, tied_head=False)
    params = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    mask = jax.tree.leaves_with_path(optim.decay_mask(params))
    names = {"/".join(key.key for key in path): value for path, value in mask}
    assert {name for name, decays in names.items() if decays} == {
        "wte", "wpe", "lm_head", "h/attn/c_attn/kernel", "h/attn/c_proj/kernel",
        "h/mlp/c_fc/kernel", "h/mlp/c_proj/kernel",
    }  # fmt: skip
    assert {name for name, decays in names.items() if not decays} == {
        "h/attn/c_attn/bias", "h/attn/c_proj/bias", "h/mlp/c_fc/bias", "h/mlp/c_proj/bias",
        "h/ln_1/scale", "h/ln_1/bias", "h/ln_2/scale", "h/ln_2/bias", "ln_f/scale", "ln_f/bias",
    }  # fmt: skip


def test_a_parameter_of_an_unknown_name_is_noticed():
    with pytest.raises(AssertionError, match="unknown to the decay mask: gain"):
        optim.decay_mask({"ln_f": {"gain": 1.0}})


# ------------------------------------------------------------------------------- updates

DECAYS = {("wte",): 0.1, ("ln_f", "scale"): 0.0}
ADAM = OptimizerConfig(3e-2, weight_decay=0.1, beta1=0.8, beta2=0.95, grad_clip=1.0)


def gradients(size: float, seed: int):
    draw = np.random.default_rng(seed)
    return {
        "wte": size * draw.standard_normal((7, 5), "f4"),
        "ln_f": {"scale": size * draw.standard_normal(5, "f4")},
    }


def adamw(start, steps, clip: float):
    """Loshchilov & Hutter, arXiv:1711.05101, algorithm 2, after clipping; in float64."""
    x, m, v = (np.array(value, "f8") for value in (start, 0 * start, 0 * start))
    for t, (gradient, norm, decay, rate) in enumerate(steps, 1):
        g = gradient * min(1, clip / norm)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        direction = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        x -= rate * (direction + decay * x)
    return x


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_updates_are_clipped_adamws(clip):
    """Some gradients are clipped, some are not; with 0 none is."""
    config = TrainConfig(optimizer=dataclasses.replace(ADAM, grad_clip=clip))
    sizes, rates = (10.0, 0.01, 1.0, 100.0), (3e-2, 1e-2, 2e-2, 3e-2)
    start = gradients(1.0, seed=9)
    grads = [gradients(size, seed) for seed, size in enumerate(sizes)]
    params, state = start, optim.optimizer(config).init(start)
    for gradient, rate in zip(grads, rates, strict=True):
        updates, state = optim.optimizer(config, rate).update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    norms = [np.sqrt(sum((x.astype("f8") ** 2).sum() for x in jax.tree.leaves(g))) for g in grads]
    for path, decay in DECAYS.items():

        def at(tree, path=path):
            return functools.reduce(dict.__getitem__, path, tree)

        steps = [(at(g), n, decay, r) for g, n, r in zip(grads, norms, rates, strict=True)]
        expected = adamw(at(start), steps, clip or np.inf)
        np.testing.assert_allclose(at(params), expected, rtol=2e-5, atol=1e-6)


def test_adams_parts_make_its_state_again():
    config = TrainConfig(optimizer=ADAM)
    params = gradients(1.0, seed=0)
    transform = optim.optimizer(config, 1e-2)
    _, state = transform.update(gradients(1.0, seed=1), transform.init(params), params)
    # Without a rate it moves nothing.
    still, _ = optim.optimizer(config).update(gradients(1.0, seed=1), state, params)
    assert not any(x.any() for x in jax.tree.leaves(still))
    count, mu, nu = optim.adam_parts(state)
    g = gradients(1.0, seed=1)
    norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(g)))
    assert int(count) == 1
    np.testing.assert_allclose(mu["wte"], 0.2 * g["wte"] / norm, rtol=1e-5)
    np.testing.assert_allclose(nu["ln_f"]["scale"], 0.05 * (g["ln_f"]["scale"] / norm) ** 2, 1e-5)
    again = optim.adam_state(config, count, mu, nu)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(state)))
