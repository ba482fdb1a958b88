"""How large each trained parameter is, and its gradient: by a program of its own, so that the step
that trains stays what it is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import finetune, sharding, train_step
from gptjax.devices.hosts import first_shard
from gptjax.train_step import Batch, TrainState
from gptjax.trainer import Trainer

Norms = dict[str, dict[str, float]]
"""{"parameters" or "gradients": {"h.0.attn.c_attn.kernel": Euclidean norm, ...}}."""


class Watch:
    """The norms of a step: of the parameters that it starts from, and of the gradient (before
    clipping) of its batch."""

    def __init__(self, trainer: Trainer):
        config, compute = trainer.config, trainer.train_compute[0]
        axis_name = trainer.strategy.axis_name

        def norms(state: TrainState, batch: Batch) -> dict[str, Any]:
            _, grads, shared = train_step.gradients(
                state, batch, config, compute, axis_name, trainer.eot
            )
            trained, _ = finetune.split(config, state.params)
            return {"parameters": sizes(trained, shared), "gradients": sizes(grads, shared)}

        self._norms = trainer.strategy.map(norms, returns_state=False)

    def norms(self, trainer: Trainer, step: int) -> Norms:
        """Before step number `step` is taken. A collective: all hosts call it."""
        batch = trainer.strategy.batch(
            trainer.batch(step - 1), trainer.runtime.gradient_accumulation_steps
        )
        jax.block_until_ready(trainer.state.step)  # what came before is training time
        with trainer.clock.paused():
            found = self._norms(trainer.state, batch)
            return {kind: _by_name(tree) for kind, tree in found.items()}


def sizes(tree: Any, shared: Any) -> Any:
    """float32 norms of a tree like the parameters: [L] of what the blocks have, [] of the rest.
    `shared`: the axes along which a device has parts (`train_step.gradients`)."""

    def size(path: Any, x: jax.Array, axis: int) -> jax.Array:
        layers = path[0].key == "h"
        squares = jnp.square(x).sum(tuple(range(layers, x.ndim)))
        if axis != sharding.WHOLE:
            squares = jax.lax.psum(squares, sharding.mapped_axes())
        return jnp.sqrt(squares)

    return jax.tree_util.tree_map_with_path(size, tree, shared)


def _by_name(tree: Any) -> dict[str, float]:
    out = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        first, *rest = (key.key for key in path)
        norms = np.asarray(first_shard(x)).reshape(-1).tolist()
        for layer, norm in enumerate(norms):
            out[".".join([first, *[str(layer)] * (first == "h"), *rest])] = norm
    return out
