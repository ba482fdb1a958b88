"""One optimizer step and one evaluation step, as pure functions that know nothing of devices
but the name of the axis they may average over."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax import optim
from gptjax.config import ModelConfig, TrainConfig
from gptjax.model import Params, apply, init_params

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that training changes. Random keys are not part of it: they follow from `step`."""

    step: jax.Array
    """int32 []: optimizer steps done."""
    params: Params
    opt_state: Any


def init_state(config: TrainConfig) -> TrainState:
    """Fresh parameters and an optimizer that has seen nothing."""
    params = init_params(config.model, config.seed)
    return TrainState(jnp.zeros((), jnp.int32), params, optim.optimizer(config).init(params))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Nats per target: logits [..., V], int targets [...] -> float32 [...]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


def loss(
    params: Params, windows: jax.Array, config: ModelConfig, key: jax.Array | None = None
) -> jax.Array:
    """float32 []: mean nats per target of int windows [b, T + 1]; with `key`, under dropout."""
    logits, _ = apply(config, params, windows[:, :-1], dropout_key=key)
    return cross_entropy(logits, windows[:, 1:]).mean()


def dropout_key(seed: int, step: jax.Array, axis_name: str | None) -> jax.Array:
    """The key of one device's dropout in one step. It follows from its arguments, so no key is
    ever saved."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def train_step(
    state: TrainState, batch: jax.Array, config: TrainConfig, axis_name: str | None = None
) -> tuple[TrainState, Metrics]:
    """One update.

    Args:
        batch: int32 [A, b, block_size + 1]: this device's A micro-batches.
        axis_name: the mapped axis to average gradients over; None runs on one device.

    Returns:
        The new state, and float32 scalars: `train_loss` of this batch before the update,
        `grad_norm` before clipping, and `learning_rate`.
    """
    key = dropout_key(config.seed, state.step, axis_name)

    def micro(index: jax.Array | int, windows: jax.Array) -> tuple[jax.Array, Any]:
        micro_key = jax.random.fold_in(key, index)
        return jax.value_and_grad(loss)(state.params, windows, config.model, micro_key)

    steps = batch.shape[0]
    if steps == 1:
        mean_loss, grads = micro(0, batch[0])
    else:

        def accumulate(total: Any, xs: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, micro(*xs)), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        total, _ = jax.lax.scan(accumulate, zeros, (jnp.arange(steps), batch))
        mean_loss, grads = jax.tree.map(lambda x: x / steps, total)
    if axis_name is not None:
        mean_loss, grads = jax.lax.pmean((mean_loss, grads), axis_name)
    metrics = {
        "train_loss": mean_loss,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": optim.learning_rate(config, state.step),
    }
    return apply_gradients(state, grads, config), metrics


def apply_gradients(state: TrainState, grads: Params, config: TrainConfig) -> TrainState:
    """The optimizer's part of a step."""
    updates, opt_state = optim.optimizer(config).update(grads, state.opt_state, state.params)
    rate = optim.learning_rate(config, state.step)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    return TrainState(state.step + 1, params, opt_state)


def eval_step(
    params: Params,
    windows: jax.Array,
    weights: jax.Array,
    config: ModelConfig,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(summed loss in nats, number of targets), over all devices of `axis_name`.

    Args:
        windows: int32 [b, block_size + 1].
        weights: float32 [b, block_size]: 1 for targets that count, 0 for padding.
    """
    logits, _ = apply(config, params, windows[:, :-1])
    loss = cross_entropy(logits, windows[:, 1:])
    sums = (loss * weights).sum(), weights.sum()
    return jax.lax.psum(sums, axis_name) if axis_name is not None else sums
