"""Norms of parameters and gradients: under each strategy those of the whole arrays."""

import jax
import numpy as np
import pytest

import gptjax
from gptjax import train_step
from gptjax.trackers.watch import Watch

STEP = 3


class Look(gptjax.Callback):
    """The norms of step 3, and what they are of."""

    def before_step(self, trainer, step):
        if step == STEP:
            self.found = Watch(trainer).norms(trainer, step)
            self.params = jax.tree.map(
                np.asarray, trainer.strategy.for_sampling(trainer.state.params)
            )
            self.config = trainer.config
            self.windows = trainer.batch(step - 1)


def whole_norms(tree):
    """{"h.0.ln_1.scale": its norm, ...} in float64."""
    out = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        first, *rest = (key.key for key in path)
        x = np.asarray(x, np.float64)
        for layer, part in enumerate(x if first == "h" else [x]):
            name = [first, *([str(layer)] if first == "h" else []), *rest]
            out[".".join(name)] = float(np.sqrt((part**2).sum()))
    return out


@pytest.mark.parametrize(
    ("strategy", "accumulation", "layers"),
    [
        ("pmap", 1, 1),
        pytest.param("shard_map", 2, 2, marks=pytest.mark.slow),
        pytest.param("fsdp", 1, 2, marks=pytest.mark.slow),
        pytest.param("fsdp", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_norms_are_those_of_the_whole_arrays(
    tiny, train_tiny, tmp_path, strategy, accumulation, layers
):
    look = Look()
    config = tiny.config.replace({"max_steps": 3, "model.n_layer": layers})
    train_tiny(
        config, tmp_path / "run", callbacks=[look], strategy=strategy,
        gradient_accumulation_steps=accumulation, eval_interval=100,
    )  # fmt: skip
    expected = whole_norms(look.params)
    assert look.found["parameters"].keys() == look.found["gradients"].keys() == expected.keys()
    assert len(expected) == layers * 12 + 4
    for name, norm in expected.items():
        assert look.found["parameters"][name] == pytest.approx(norm, rel=1e-5), name
    key = jax.random.fold_in(train_step.random_key(config.seed), STEP - 1)
    rows = np.arange(len(look.windows), dtype=np.int32)
    grads = jax.jit(jax.grad(train_step.loss), static_argnums=2)(
        look.params, look.windows, look.config.model, dropout_key=key, rows=rows
    )
    for name, norm in whole_norms(grads).items():
        assert look.found["gradients"][name] == pytest.approx(norm, rel=1e-3, abs=1e-7), name
