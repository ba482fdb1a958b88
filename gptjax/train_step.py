"""One optimizer step and one evaluation step, as pure functions. Of devices they know only the name
of the mapped axis that they may average over."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax import finetune, head, optim, sharding
from gptjax.config import ModelConfig, TrainConfig
from gptjax.layers import document_positions
from gptjax.model import Params, features, init, shared_axes
from gptjax.runtime_config import ComputeConfig

Metrics = dict[str, jax.Array]


class Batch(NamedTuple):
    """One device's share of a step's data, in A micro-batches; or all of it."""

    windows: Any
    """int32 [A, b, block_size + 1]."""
    rows: Any
    """int32 [A, b]: the windows' numbers in the global batch. Dropout follows from them, so that it
    does not matter how a batch is divided."""


def whole_batch(windows: Any) -> Batch:
    """int32 windows [A, b, T + 1] as all of a step's data."""
    steps, size, _ = windows.shape
    return Batch(windows, jnp.arange(steps * size, dtype=jnp.int32).reshape(steps, size))


class TrainState(NamedTuple):
    """All that training changes. Random keys are not part of it: they follow from `step`."""

    step: jax.Array
    """int32 []: optimizer steps done."""
    params: Params
    opt_state: Any


def init_state(config: TrainConfig) -> TrainState:
    """Fresh parameters and an optimizer that has seen nothing."""
    params = init(config.model, random_key(config.seed))
    return TrainState(jnp.zeros((), jnp.int32), params, optim.optimizer(config).init(params))


def random_key(seed: int) -> jax.Array:
    """The key of a run's seed; of this kind whatever JAX's default is, so that a run's numbers do
    not depend on it."""
    return jax.random.key(seed, impl="threefry2x32")


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Nats per target: logits [..., V], int targets [...] -> float32 [...]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


def loss(
    params: Params,
    windows: jax.Array,
    config: ModelConfig,
    compute: ComputeConfig = ComputeConfig(),
    dropout_key: jax.Array | None = None,
    rows: jax.Array | None = None,
    eot: int | None = None,
) -> jax.Array:
    """float32 []: mean nats per target of int windows [b, T + 1]; in training, with the dropout
    that follows from `dropout_key` and `rows` [b]. `eot`: keep apart the documents that this
    end-of-text token separates."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    positions = document_positions(inputs, eot)
    x, output, _ = features(
        config, params, inputs, compute=compute, dropout_key=dropout_key, rows=rows,
        positions=positions,
    )  # fmt: skip
    return head.mean_loss(x, output, targets, config.vocab_size)


def train_step(
    state: TrainState,
    batch: Batch,
    config: TrainConfig,
    compute: ComputeConfig = ComputeConfig(),
    axis_name: str | tuple[str, ...] | None = None,
    eot: int | None = None,
) -> tuple[TrainState, Metrics]:
    """One update.

    Args:
        batch: this device's share of the data.
        axis_name: the mapped axis, or axes, to average gradients over; None runs on one device.
        eot: as of `loss`.

    Returns:
        The new state, and float32 scalars: `train_loss` of this batch before the update,
        `grad_norm` before clipping, and `learning_rate`.
    """
    mean_loss, grads, shared = gradients(state, batch, config, compute, axis_name, eot)
    metrics = {
        "train_loss": mean_loss,
        "grad_norm": sharding.norm(grads, shared),
        "learning_rate": optim.learning_rate(config, state.step),
    }
    return apply_gradients(state, grads, config, metrics["grad_norm"], shared), metrics


def gradients(
    state: TrainState,
    batch: Batch,
    config: TrainConfig,
    compute: ComputeConfig = ComputeConfig(),
    axis_name: str | tuple[str, ...] | None = None,
    eot: int | None = None,
) -> tuple[jax.Array, Params, Any]:
    """(float32 [], the mean loss of a step's batch; its gradient, of what is trained; along which
    axes a device has parts of that); arguments as for `train_step`."""
    # The key follows from (seed, step), so no key is ever saved.
    key = jax.random.fold_in(random_key(config.seed), state.step)

    def micro_step(windows: jax.Array, rows: jax.Array) -> tuple[jax.Array, Any]:
        return loss_and_gradient(state.params, windows, config, compute, key, rows, eot)

    steps = batch.windows.shape[0]
    if steps == 1:
        mean_loss, grads = micro_step(batch.windows[0], batch.rows[0])
    else:

        def accumulate(total: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, micro_step(*part)), None

        trained, _ = finetune.split(config, state.params)
        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
        total, _ = jax.lax.scan(accumulate, zeros, batch)
        mean_loss, grads = jax.tree.map(lambda x: x / steps, total)
    shared = finetune.like(grads, shared_axes(config.model, state.params))
    if axis_name is not None:
        # Before clipping: the norm is that of the whole batch's gradient.
        mean_loss = jax.lax.pmean(mean_loss, axis_name)
        grads = sharding.average(grads, shared, axis_name)
    return mean_loss, finetune.without_frozen(config, grads), shared


def loss_and_gradient(
    params: Params,
    windows: jax.Array,
    config: TrainConfig,
    compute: ComputeConfig = ComputeConfig(),
    dropout_key: jax.Array | None = None,
    rows: jax.Array | None = None,
    eot: int | None = None,
) -> tuple[jax.Array, Params]:
    """`loss`, and its gradient by the parameters that are trained: of the others none is made."""
    trained, frozen = finetune.split(config, params)

    def of_trained(trained: Params) -> jax.Array:
        whole = finetune.join(trained, frozen)
        return loss(whole, windows, config.model, compute, dropout_key, rows, eot)

    return jax.value_and_grad(of_trained)(trained)


def apply_gradients(
    state: TrainState, grads: Params, config: TrainConfig, norm: jax.Array | None = None,
    shared: Any = None,
) -> TrainState:  # fmt: skip
    """The optimizer's part of a step; where a device has parts of the gradients, with their `norm`
    and along which axes they are `shared`."""
    optimizer = optim.optimizer(config, optim.learning_rate(config, state.step), norm, shared)
    trained, frozen = finetune.split(config, state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    return TrainState(state.step + 1, finetune.join(trained, frozen), opt_state)


def eval_step(
    params: Params,
    windows: jax.Array,
    weights: jax.Array,
    config: ModelConfig,
    compute: ComputeConfig = ComputeConfig(),
    eot: int | None = None,
) -> jax.Array:
    """float32 [b]: for each of int32 windows [b, T + 1] the weighted sum of its targets' nats;
    weights [b, T] are 1 for targets that count, 0 for padding and context. `eot`: as of `loss`."""
    inputs = windows[:, :-1]
    positions = document_positions(inputs, eot)
    x, output, _ = features(config, params, inputs, compute=compute, positions=positions)
    return (head.losses(x, output, windows[:, 1:], config.vocab_size) * weights).sum(-1)
