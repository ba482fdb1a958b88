"""The two ways to lay out a state over devices: the same numbers, the same checkpoints."""

import dataclasses
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import train_step
from gptjax.config import ModelConfig, OptimizerConfig, TrainConfig
from gptjax.data.batches import batch_at
from gptjax.devices import fsdp, hosts
from gptjax.devices.fsdp import Fsdp
from gptjax.devices.strategy import get_strategy
from gptjax.runtime_config import ComputeConfig

KINDS = "pmap", "shard_map", "fsdp"
FOUR = 6, 1, 4, 3
MODEL = ModelConfig(1, 2, 32, block_size=16, vocab_size=50, dropout=0.2)
CONFIG = TrainConfig(MODEL, optimizer=OptimizerConfig(1e-2), batch_size=16, max_steps=30)
TOKENS = (np.arange(5000) * 7 + np.random.default_rng(0).integers(0, 3, 5000)) % 50


def windows_at(step: int) -> np.ndarray:
    return batch_at(TOKENS, CONFIG.seed, step, batch_size=16, block_size=16)


def train(
    kind: str, start, config: TrainConfig = CONFIG, devices=None, accumulation_steps: int = 1
):
    """(the strategy, a saved copy of the first state, the state after three steps, the metrics)."""
    strategy = get_strategy(kind, devices and [jax.devices()[i] for i in devices])
    step = strategy.map_train_step(
        partial(train_step.train_step, config=config), accumulation_steps
    )
    state = strategy.to_devices(strategy.initialise(lambda x: jax.tree.map(jnp.copy, x), start))
    first = strategy.for_saving(state)
    for i in range(3):
        state, metrics = step(state, windows_at(i))
    return strategy, first, state, hosts.fetch(metrics)


def train_alone(start, config: TrainConfig = CONFIG):
    """(the state after three steps on one device, without any mapping; the last metrics)."""
    step = jax.jit(partial(train_step.train_step, config=config))
    state = start
    for i in range(3):
        state, metrics = step(state, train_step.whole_batch(windows_at(i)[None]))
    return state, {name: float(x) for name, x in metrics.items()}


def assert_same_training(ours, expected) -> None:
    strategy, _, state, metrics = ours
    expected_state, expected_metrics = expected
    assert metrics["train_loss"] == pytest.approx(expected_metrics["train_loss"], rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(expected_metrics["grad_norm"], rel=1e-4)
    saved = jax.tree.leaves(strategy.for_saving(state))
    for x, y in zip(saved, jax.tree.leaves(expected_state), strict=True):
        # Adam divides small gradients by their own size, which magnifies rounding.
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def start():
    """A state with random parameters, which takes no compiling."""
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: train_step.init_state(CONFIG))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    normal = jax.tree.map(lambda x: 0.1 * draw.standard_normal(x.shape, np.float32), shapes.params)
    return zeros._replace(params=normal)


@pytest.fixture(scope="module")
def alone(start):
    return train_alone(start)


@pytest.fixture(
    scope="module",
    params=[(kind, *how) for kind in KINDS for how in [(None, 1), (FOUR, 2)]],
    ids=lambda each: f"{each[0]}-{each[2]}",
)
def trained(request, start):
    """On all eight devices; and on four of them, out of order, with two accumulation steps."""
    kind, devices, accumulation_steps = request.param
    return train(kind, start, CONFIG, devices, accumulation_steps)


def test_many_devices_equal_one_dropout_included(trained, alone):
    assert_same_training(trained, alone)
    assert len(jax.tree.leaves(trained[2])[0].devices()) == len(trained[0].devices)


def test_fsdp_equals_one_device_whatever_way_the_links_lie(monkeypatch, start, alone):
    """On a torus of 2 x 4 whose order is not that of the rows."""
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    monkeypatch.setattr(
        fsdp, "torus", lambda devices: np.array([devices[i] for i in order]).reshape(2, 4)
    )
    ours = train("fsdp", start)
    assert_same_training(ours, alone)
    strategy, _, state, _ = ours
    evaluate = partial(train_step.eval_step, config=MODEL)
    windows, weights = windows_at(0), np.ones((16, 16), np.float32)
    params = jax.tree.map(np.asarray, strategy.for_sampling(state.params))
    sums, _ = strategy.map_eval_step(evaluate)(state.params, windows, weights)
    np.testing.assert_allclose(sums, jax.jit(evaluate)(params, windows, weights), rtol=1e-5)


@pytest.fixture
def optimised():
    """Programs as users have them, or nearly so (see conftest)."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_shard_map_is_pmap_bit_for_bit(start, optimised, accumulation_steps):
    kinds = "pmap", "shard_map"
    trained = [train(kind, start, accumulation_steps=accumulation_steps) for kind in kinds]
    states = [strategy.for_saving(state) for strategy, _, state, _ in trained]
    for x, y in zip(*map(jax.tree.leaves, states), strict=True):
        assert np.array_equal(x, y)
    assert trained[0][3] == trained[1][3]


@pytest.mark.parametrize("kind", KINDS)
def test_the_old_state_is_donated_to_the_new_one(kind, start):
    strategy = get_strategy(kind)
    step = strategy.map_train_step(partial(train_step.train_step, config=CONFIG))
    state = strategy.to_devices(strategy.initialise(lambda: jax.tree.map(jnp.asarray, start)))
    found = step.compile(state, windows_at(0)).memory_analysis()
    own = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert found.alias_size_in_bytes == own
    with warnings.catch_warnings(action="error"):  # "Some donated buffers were not usable"
        step(state, windows_at(0))
    assert all(x.is_deleted() for x in jax.tree.leaves(state))


UNEVEN = {
    "n_head": 3, "n_embd": 36,  # which does not divide among 8 devices
    "tied_head": False, "bias": False, "position": "sinusoidal",
    "attention_pattern": ("banded",), "attention_window": 5, "vocab_multiple": 64,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("width", [32, 36])
def test_fsdp_orthogonalises_whole_matrices(width):
    """Muon's, of which a device has parts: three layers among eight devices; and where the width
    does not divide, so that some matrices are parts along another axis, or whole."""
    model = dataclasses.replace(MODEL, n_layer=3, n_embd=width)
    rates = OptimizerConfig(1e-2, warmup_steps=2, kind="muon", muon_learning_rate=0.1)
    config = dataclasses.replace(CONFIG, model=model, optimizer=rates)
    start = jax.jit(lambda: train_step.init_state(config))()
    assert_same_training(train("fsdp", start, config), train_alone(start, config))


@pytest.mark.parametrize(
    ("change", "compute"),
    [
        (UNEVEN, {}),
        pytest.param({"n_layer": 0}, {}, marks=pytest.mark.slow),
        pytest.param(
            {"n_layer": 2, "attention_pattern": ("dense", "banded")}, {}, marks=pytest.mark.slow
        ),
        pytest.param({"n_layer": 2, "bias": False}, {"remat": True}, marks=pytest.mark.slow),
    ],
)
def test_fsdp_equals_one_device_for_every_kind_of_model(change, compute):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, **change))
    step = partial(train_step.train_step, config=config, compute=ComputeConfig(**compute))
    strategy = get_strategy("fsdp")
    state, metrics = strategy.map_train_step(step)(
        strategy.initialise(lambda: train_step.init_state(config)), windows_at(0)
    )
    alone = jax.jit(
        lambda batch: train_step.train_step(train_step.init_state(config), batch, config)
    )
    expected, expected_metrics = alone(train_step.whole_batch(windows_at(0)[None]))
    ours = strategy, None, state, hosts.fetch(metrics)
    assert_same_training(ours, (expected, hosts.fetch(expected_metrics)))


def test_a_saved_copy_is_untouched_by_later_steps(trained, start):
    strategy, first, state, _ = trained
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(start), strict=True):
        assert np.array_equal(x, y)
    assert not np.array_equal(strategy.for_saving(state).params["wte"], start.params["wte"])


def test_states_are_laid_out_for_saving_as_they_are_restored(trained):
    strategy, first, state, _ = trained
    targets = jax.tree.leaves(strategy.targets(first))
    initialised = strategy.initialise(lambda: jax.tree.map(jnp.zeros_like, first))
    for saved in (first, initialised, strategy.for_saving(state)):
        for x, target in zip(jax.tree.leaves(saved), targets, strict=True):
            assert x.sharding == target.sharding and x.shape == target.shape


def test_copies_on_different_devices_are_bitwise_the_same(trained):
    strategy, _, state, _ = trained
    for leaf in jax.tree.leaves(state):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == len(strategy.devices)
        if not isinstance(strategy, Fsdp) or leaf.sharding.is_fully_replicated:
            assert all(np.array_equal(copies[0], copy) for copy in copies)


def test_evaluation_gives_every_rows_loss_in_order(trained, alone):
    strategy, _, state, _ = trained
    step = strategy.map_eval_step(partial(train_step.eval_step, config=MODEL))
    windows = windows_at(0)
    weights = np.random.default_rng(0).integers(0, 2, (16, 16)).astype(np.float32)
    sums, stop = step(state.params, windows, weights, 2)
    params = jax.tree.map(np.asarray, strategy.for_sampling(state.params))
    expected = jax.jit(partial(train_step.eval_step, config=MODEL))(params, windows, weights)
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    assert stop == 2


def test_fsdp_leaves_an_eighth_of_every_matrix_on_each_device(start):
    state = get_strategy("fsdp").initialise(lambda: jax.tree.map(jnp.asarray, start))
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        share = 8 if any(end in name for end in ("kernel", "wte", "wpe")) else 1
        assert x.addressable_shards[0].data.size == x.size // share, name


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_sees_the_largest_signal_in_one_trace(kind):
    traces = []

    def step(state, batch, axis_name=None):
        traces.append(batch)
        return state, {"loss": batch.windows.sum().astype(jnp.float32)}

    strategy = get_strategy(kind)
    mapped = strategy.map_train_step(step)
    state = strategy.to_devices(strategy.initialise(lambda: {"x": jnp.zeros(3)}))
    for signal in (0, 15, 2):
        state, metrics = mapped(state, np.ones((8, 2), np.int32), signal)
        assert hosts.fetch(metrics)["stop"] == signal
    assert len(traces) == 1
