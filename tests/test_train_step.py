"""One step by hand, and in pieces. (Over several devices: devices/test_strategy.)"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import optax
import pytest
from small_models import random_params

from gptjax import optim, train_step
from gptjax.config import ModelConfig, OptimizerConfig, TrainConfig
from gptjax.runtime_config import ComputeConfig
from gptjax.train_step import whole_batch

MODEL = ModelConfig(1, 2, 8, 6, vocab_size=11, dropout=0.3)
CONFIG = TrainConfig(
    model=MODEL,
    optimizer=OptimizerConfig(1e-2, min_lr=1e-3, warmup_steps=5, grad_clip=0.1),
    batch_size=8,
    max_steps=30,
    seed=3,
)
WINDOWS = np.random.default_rng(0).integers(0, 11, (8, 7))
step = jax.jit(train_step.train_step, static_argnames=("config", "compute", "axis_name"))


def state_at(count: int, config: TrainConfig = CONFIG) -> train_step.TrainState:
    """After so many updates, with weights and moments that are anything."""
    params = jax.tree.map(jnp.asarray, random_params(config.model, scale=0.3))
    moments = [random_params(config.model, seed, scale=0.01) for seed in (1, 2)]
    state = optim.adam_state(config, jnp.int32(count), moments[0], jax.tree.map(abs, moments[1]))
    return train_step.TrainState(jnp.int32(count), params, state)


def assert_close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def test_cross_entropy_is_minus_log_of_the_softmax():
    logits = np.array([[[1.0, 2.0, 3.0], [30.0, 0.0, -30.0]]], "f4")
    nats = train_step.cross_entropy(jnp.asarray(logits, "bfloat16"), np.array([[2, 1]]))
    assert nats.dtype == np.float32
    expected = [[np.log(1 + np.exp(-1.0) + np.exp(-2.0)), 30.0]]
    np.testing.assert_allclose(nats, expected, rtol=1e-6)


def test_the_loss_is_the_mean_over_all_targets():
    params = random_params(MODEL, scale=0.5)
    ours = jax.jit(train_step.loss, static_argnames="config")(params, WINDOWS, MODEL)
    assert float(ours) == pytest.approx(numpy_gpt.nats(MODEL, params, WINDOWS).mean(), rel=1e-5)


def test_documents_kept_apart_have_their_own_losses_and_gradients():
    """Each with the end-of-text token before it, and with that after it as its last target."""
    model, params = MODEL.replace(dropout=0.0), random_params(MODEL, scale=0.5)
    eot, row = 10, np.array([3, 1, 10, 4, 4, 10, 2])
    documents = [row[:3], row[2:6], row[5:]]
    gradient = jax.value_and_grad(train_step.loss)
    packed = jax.jit(lambda p: gradient(p, row[None], model, eot=eot))(params)
    parts = [jax.jit(lambda p, x=x: gradient(p, x[None], model))(params) for x in documents]
    count = [len(x) - 1 for x in documents]
    expected = jax.tree.map(lambda *x: np.average(np.array(x), 0, count), *parts)
    assert_close(packed, expected, rtol=1e-4, atol=1e-6)
    by_row = train_step.eval_step(params, row[None], np.ones((1, 6)), model, eot=eot)
    nats = sum(numpy_gpt.nats(model, params, x[None]).sum() for x in documents)
    assert float(by_row[0]) == pytest.approx(nats, rel=1e-5)


def test_eval_step_sums_the_targets_that_count():
    params = random_params(MODEL, scale=0.5)
    weights = np.random.default_rng(1).integers(0, 2, (8, 6)).astype("f4")
    weights[3] = 0
    ours = jax.jit(train_step.eval_step, static_argnames="config")(params, WINDOWS, weights, MODEL)
    expected = (numpy_gpt.nats(MODEL, params, WINDOWS) * weights).sum(axis=1)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def whole_step():
    """(the state before, the state and metrics after one step on the whole batch)."""
    before = state_at(7)
    return before, *step(before, whole_batch(WINDOWS[None]), CONFIG)


@jax.jit
def by_hand(state):
    """(the next state, metrics) of a step on all windows, from the loss's gradient."""
    key = jax.random.fold_in(train_step.random_key(CONFIG.seed), state.step)
    loss, grads = jax.value_and_grad(train_step.loss)(
        state.params, WINDOWS, MODEL, dropout_key=key, rows=jnp.arange(8)
    )
    rate = optim.learning_rate(CONFIG, state.step)
    transform = optim.optimizer(CONFIG, rate)
    updates, opt_state = transform.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norm = jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(grads)))
    metrics = {"train_loss": loss, "grad_norm": norm, "learning_rate": rate}
    return train_step.TrainState(state.step + 1, params, opt_state), metrics


def test_a_step_is_the_losss_gradient_in_the_optimizer(whole_step):
    before, after, metrics = whole_step
    expected, expected_metrics = by_hand(before)
    assert after.step == 8 and after.step.dtype == np.int32
    assert_close(after, expected, rtol=1e-4, atol=1e-7)
    assert_close(metrics, expected_metrics, rtol=1e-5)
    assert metrics["grad_norm"] > CONFIG.optimizer.grad_clip  # it is that before clipping


def test_micro_batches_are_the_whole_batch_in_pieces(whole_step):
    before, whole, whole_metrics = whole_step
    after, metrics = step(before, whole_batch(WINDOWS.reshape(4, 2, 7)), CONFIG)
    assert_close(metrics, whole_metrics, rtol=1e-5)
    assert_close(after, whole, rtol=1e-4, atol=1e-6)


def test_dropout_differs_by_step_and_repeats():
    def loss_at(count):
        return float(step(state_at(count), whole_batch(WINDOWS[None]), CONFIG)[1]["train_loss"])

    assert loss_at(0) == loss_at(0)
    assert len({loss_at(0), loss_at(1), loss_at(1000)}) == 3


@pytest.mark.parametrize(("unroll", "loops"), [(0, False), (1, True)])
def test_settings_of_the_computation_reach_the_network(unroll, loops):
    """Two layers, unrolled or in a loop."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, n_layer=2, dropout=0.0))
    compute = ComputeConfig(scan_unroll=unroll)
    state, weights = jax.eval_shape(lambda: train_step.init_state(config)), np.ones((8, 6), "f4")
    for function, args in (
        (train_step.train_step, (state, whole_batch(WINDOWS[None]), config, compute)),
        (train_step.eval_step, (state.params, WINDOWS, weights, config.model, compute)),
    ):
        program = jax.jit(function, static_argnames=("config", "compute")).lower(*args).as_text()
        assert ("stablehlo.while" in program) == loops


# -------------------------------------------------------------------------- the beginning


def test_initial_state_is_the_seeds_and_counts_nothing(monkeypatch):
    # Weights that say of which model and key they are.
    def init(config, key):
        return {"wte": jax.random.key_data(key) + jnp.float32(config.n_layer)}

    monkeypatch.setattr(train_step, "init", init)
    state = train_step.init_state(CONFIG)
    key = jax.random.key_data(jax.random.key(3, impl="threefry2x32"))
    assert np.array_equal(state.params["wte"], key + jnp.float32(1))
    count, mu, nu = optim.adam_parts(state.opt_state)
    assert (int(state.step), int(count)) == (0, 0) and state.step.dtype == np.int32
    assert not mu["wte"].any() and not nu["wte"].any()


def test_keys_do_not_depend_on_jaxs_default_kind():
    expected = jax.random.key_data(train_step.random_key(5))
    with jax.default_prng_impl("rbg"):
        assert np.array_equal(jax.random.key_data(train_step.random_key(5)), expected)


def test_a_whole_batch_numbers_its_rows_through_all_pieces():
    batch = whole_batch(np.zeros((2, 3, 5), int))
    assert batch.rows.tolist() == [[0, 1, 2], [3, 4, 5]] and batch.rows.dtype == np.int32
