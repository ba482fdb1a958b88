"""What made the first number that is not finite, by operation, module, line and direction."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from gptjax import nonfinite
from gptjax.config import ModelConfig, TrainConfig
from gptjax.errors import RunError
from gptjax.model import init
from gptjax.runtime_config import ComputeConfig

ZERO, ONE, HUGE = np.float32(0), np.float32(1), np.float32(3e38)


def doubled(x):
    return jax.lax.scan(lambda x, _: (x * 2, x), x, None, length=200)[0]


def twice(x):
    return jax.lax.while_loop(lambda x: x < 1e38, lambda x: x**3, x)


@pytest.mark.parametrize(
    ("function", "x", "words"),
    [
        (jnp.log, ZERO, "log, forward, makes inf from numbers up to 0"),
        (jnp.log, -ONE, "log, forward, makes nan from numbers up to 1"),
        (jax.jit(lambda x: jnp.exp(100 * x) + 1), ONE, "exp, forward, makes inf"),
        (jax.grad(jnp.sqrt), ZERO, "div, forward, makes inf from numbers up to 0.5"),
        (lambda x: x - x, np.float32(np.inf), "sub, forward, makes nan from numbers up to inf"),
        (doubled, ONE, "mul (turn 128 of a loop of 200), forward, makes inf from"),
        (twice, 2 * ONE, "integer_pow, forward, makes inf"),  # 8, 512, ..., 2**81, 2**243
        (lambda x: jax.lax.cond(x > 0, jnp.log, jnp.exp, 100 * x), ONE, None),
        (lambda x: jax.lax.cond(x > 0, jnp.exp, jnp.log, 100 * x), ONE, "exp, forward, makes inf"),
        (jax.checkpoint(lambda x: jnp.sin(x) * HUGE * 9), ONE, "mul, forward, makes inf"),
        # A mask is no mistake.
        (lambda x: jnp.exp(jnp.where(x > 2, x, -jnp.inf)), ONE, None),
        (lambda x: x + 1, np.float32(np.inf), None),
        # Nor what comes to nothing.
        (lambda x: jnp.where(x == 0, 0, 1 / x), ZERO, None),
        (lambda x: jnp.exp(-(x**3)) + jnp.log(x - 9), HUGE, None),
        (lambda x: jnp.exp(-(x**3)) + jnp.log(-x), HUGE, "numbers up to 3e+38; then log, forward,"),
        (lambda x: jax.lax.scan(lambda x, y: (x, x + y), x, jnp.zeros(0)), ONE, None),
        (jax.vmap(jnp.log), jnp.zeros(3), "log, forward, makes inf from numbers up to 0"),
    ],
)  # fmt: skip
def test_the_first_operation_is_named(function, x, words):
    found = nonfinite.first(function, x)
    assert found is None if words is None else words in found, found


MODEL = ModelConfig(2, 2, 16, block_size=8, vocab_size=11)
WINDOWS = np.arange(27, dtype=np.int32).reshape(3, 9) % 11


def explain(model=MODEL, compute=ComputeConfig(), change=lambda params: params) -> str:
    params = change(init(model, jax.random.key(0)))
    return nonfinite.explain(params, WINDOWS, np.arange(3), 2, 7, TrainConfig(model), compute)


def scaled(part, layer, factor, params):
    module, name = part
    kernel = params["h"][module][name]["kernel"]
    changed = {name: params["h"][module][name] | {"kernel": kernel.at[layer].mul(factor)}}
    return params | {"h": params["h"] | {module: params["h"][module] | changed}}


def test_a_forward_overflow_is_placed_in_its_layer():
    found = explain(change=functools.partial(scaled, ("mlp", "c_fc"), 1, 1e38))
    assert " in h.1.mlp (layers.py:" in found and "forward, makes inf from numbers up to" in found


def test_a_backward_overflow_is_placed_in_its_layer():
    # The residual stream stays finite; its gradient, times the weights of layer 1, does not.
    def change(params):
        params = scaled(("mlp", "c_fc"), 1, 1e-30, params)
        return scaled(("mlp", "c_proj"), 1, 1e38, params) | {"lm_head": params["wte"] * 1e14}

    found = explain(MODEL.replace(tied_head=False), change=change)
    assert "in h.1.mlp" in found and "backward, makes inf from numbers up to" in found


def test_parameters_that_are_not_finite_are_named():
    found = explain(change=lambda params: params | {"wpe": params["wpe"] * np.inf})
    assert found == "the update of step 7 made wpe so"


def test_a_norm_that_overflows_is_told_from_gradients_that_do():
    def change(params):
        return params | {"lm_head": params["wte"] * 1e22}

    found = explain(MODEL.replace(tied_head=False), change=change)
    assert re.search(r"the norm overflows, the largest gradient is \d\.\d+e\+[12]\d in h\.", found)


@pytest.mark.parametrize("interval", ["eval_interval", "save_interval"])
def test_an_update_that_is_not_finite_is_told_before_it_is_saved(
    tiny, train_tiny, tmp_path, interval
):
    rates = tiny.config.optimizer.replace(learning_rate=1e30, weight_decay=1e30, warmup_steps=0)
    with pytest.raises(RunError, match=r"loss became nan: the last update made h.* so; there is"):
        train_tiny(tiny.config.replace(optimizer=rates), tmp_path / "run", **{interval: 1})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "compute"),
    [
        ({"dropout": 0.1}, {}),
        ({"position": "sinusoidal", "tied_head": False}, {"remat": "full"}),
        ({"attention_pattern": ("dense", "banded"), "attention_window": 3}, {"scan_unroll": 2}),
        ({"dtype": "bfloat16"}, {"remat": "elementwise"}),
    ],
)
def test_what_is_healthy_has_no_such_operation(model, compute):
    assert explain(MODEL.replace(model), ComputeConfig(**compute)).startswith("the loss and grad")
    config, compute = MODEL.replace(model), ComputeConfig(**compute)
    loss = functools.partial(nonfinite.train_step.loss, config=config, compute=compute)
    gradients = jax.value_and_grad(loss)
    assert nonfinite.first(gradients, init(config, jax.random.key(0)), WINDOWS) is None


@pytest.mark.parametrize("strategy", ["pmap", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_run_that_diverges_says_where(tiny, train_tiny, tmp_path, strategy):
    rate = tiny.config.optimizer.replace(learning_rate=3e37)
    config = tiny.config.replace(optimizer=rate)
    recorder = tiny_runs.Recorder()
    with pytest.raises(RunError) as caught:
        train_tiny(config, tmp_path / "run", recorder, strategy=strategy, debug_nans=True)
    said = str(caught.value)
    assert "train_loss became nan at step 2: " in said and "makes inf from numbers up to" in said
    assert "(layers.py:" in said or "(model.py:" in said
    assert "lower --learning-rate" in said and "--debug-nans" not in said
