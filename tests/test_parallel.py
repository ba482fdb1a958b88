"""The two ways to lay out a state: the same numbers, the same checkpoints."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import data, parallel, train
from gptjax.config import ModelConfig, TrainConfig

STRATEGIES = {kind: parallel.strategy(kind) for kind in ("pmap", "fsdp")}
MODEL = ModelConfig(2, 2, 32, block_size=16, vocab_size=50, dropout=0.2)
CONFIG = TrainConfig(model=MODEL, batch_size=16, max_steps=30, learning_rate=1e-2)
TOKENS = (np.arange(5000) * 7 + np.random.default_rng(0).integers(0, 3, 5000)) % 50


def rows_at(step: int) -> np.ndarray:
    return data.batch_at(TOKENS, CONFIG.seed, step, batch_size=16, block_size=16)


def trained(strategy: parallel.Strategy, config: TrainConfig, accumulation_steps: int = 1):
    """(the built state after three steps, the last metrics)."""
    step = strategy.map_train_step(partial(train.train_step, config=config), accumulation_steps)
    state = strategy.place(strategy.build(lambda: train.init_state(config)))
    for i in range(3):
        state, metrics = step(state, rows_at(i), stop=0)
    return strategy.unplace(state), parallel.fetch(metrics)


def trained_alone(config: TrainConfig):
    """The same on one device, without any mapping."""
    step = jax.jit(partial(train.train_step, config=config))
    state = jax.jit(lambda: train.init_state(config))()
    for i in range(3):
        state, metrics = step(state, train.whole_batch(rows_at(i)[None]))
    return state, {name: float(x) for name, x in metrics.items()}


@pytest.fixture(scope="module")
def alone():
    return trained_alone(CONFIG)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("kind", STRATEGIES)
def test_eight_devices_equal_one_dropout_included(kind, accumulation_steps, alone):
    assert_same_training(trained(STRATEGIES[kind], CONFIG, accumulation_steps), alone)


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 0},
        {"n_head": 3, "n_embd": 36, "tied_head": False},  # shares of nothing: 36 / 8 is no whole
        {"position": "sinusoidal", "vocab_multiple": 64, "attention_pattern": ("dense", "banded")},
        {"remat": True, "bias": False},
    ],
)
def test_fsdp_equals_one_device_for_every_kind_of_model(change):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, **change))
    assert_same_training(trained(STRATEGIES["fsdp"], config), trained_alone(config))


def assert_same_training(ours, expected):
    (state, metrics), (their_state, their_metrics) = ours, expected
    assert metrics["train_loss"] == pytest.approx(their_metrics["train_loss"], rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(their_metrics["grad_norm"], rel=1e-4)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(their_state), strict=True):
        # Adam divides small gradients by their own size, which magnifies rounding.
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_what_is_built_is_what_the_loader_makes_and_a_copy_outlives_the_next_step(kind):
    strategy = STRATEGIES[kind]
    built = strategy.build(lambda: train.init_state(CONFIG))
    for x, target in zip(
        jax.tree.leaves(built), jax.tree.leaves(strategy.targets(built)), strict=True
    ):
        assert x.sharding == target.sharding and x.shape == target.shape
    before = jax.tree.map(np.array, built)
    state = strategy.place(built)
    copy = strategy.unplace(state)
    step = strategy.map_train_step(partial(train.train_step, config=CONFIG))
    for i in range(3):
        state, _ = step(state, rows_at(i))
    for x, y in zip(jax.tree.leaves(copy), jax.tree.leaves(before), strict=True):
        assert np.array_equal(x, y)
    assert not np.array_equal(strategy.unplace(state).params["wte"], before.params["wte"])


@pytest.mark.parametrize("kind", STRATEGIES)
def test_all_devices_learn_the_largest_stop_signal_after_the_same_step(kind):
    strategy = STRATEGIES[kind]

    def step(state, batch, axis_name=None):
        return state, {"loss": batch.windows.sum().astype(jnp.float32)}

    mapped = strategy.map_train_step(step)
    for signal in (0, 15):
        state = strategy.place(strategy.build(lambda: {"x": jnp.zeros(3)}))
        _, metrics = mapped(state, np.ones((8, 2), np.int32), stop=signal)
        assert parallel.fetch(metrics)["stop"] == signal


@pytest.mark.parametrize("kind", STRATEGIES)
def test_evaluation_gives_every_rows_loss_in_order_and_the_stop_signal(kind):
    strategy = STRATEGIES[kind]
    params = strategy.place(strategy.build(lambda: train.init_state(CONFIG).params))
    step = strategy.map_eval_step(partial(train.eval_step, config=MODEL))
    windows = rows_at(0)
    weights = np.random.default_rng(0).integers(0, 2, (16, 16)).astype(np.float32)
    sums, stop = step(params, windows, weights, 2)
    bare = jax.jit(partial(train.eval_step, config=MODEL))
    expected = bare(strategy.for_sampling(params), windows, weights)
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    assert stop == 2


def test_every_replica_holds_bitwise_the_same_state_after_steps_with_dropout():
    strategy = STRATEGIES["pmap"]
    step = strategy.map_train_step(partial(train.train_step, config=CONFIG))
    state = strategy.place(strategy.build(lambda: train.init_state(CONFIG)))
    for i in range(3):
        state, _ = step(state, rows_at(i))
    for leaf in jax.tree.leaves(state):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == 8 and all(np.array_equal(copies[0], c) for c in copies)


def test_fsdp_leaves_an_eighth_of_every_matrix_on_each_device():
    state = STRATEGIES["fsdp"].build(lambda: train.init_state(CONFIG))
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        share = 8 if any(end in name for end in ("kernel", "wte", "wpe")) else 1
        assert x.addressable_shards[0].data.size == x.size // share, name


@pytest.mark.parametrize("kind", STRATEGIES)
def test_one_trace_serves_all_steps(kind):
    traces = []

    def counted(state, batch, axis_name=None):
        traces.append(1)
        return train.train_step(state, batch, CONFIG, axis_name)

    strategy = STRATEGIES[kind]
    step = strategy.map_train_step(counted)
    state = strategy.place(strategy.build(lambda: train.init_state(CONFIG)))
    for i in range(4):
        state, _ = step(state, rows_at(i), stop=i)
    assert len(traces) == 1


def test_hosts_feed_contiguous_shares_of_the_same_global_batch(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    shares = []
    for host in range(4):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        shares.append(np.arange(32)[parallel.host_rows(32)])
    assert np.array_equal(np.concatenate(shares), np.arange(32))
