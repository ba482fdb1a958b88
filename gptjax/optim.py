"""AdamW or Muon, with nanoGPT's schedule, clipping, and decay of matrices only."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptjax import finetune
from gptjax.config import TrainConfig
from gptjax.layers import compute_dtype
from gptjax.muon import scale_by_muon

DECAYED = ("kernel", "wte", "wpe", "lm_head", *finetune.ADAPTERS)
UNDECAYED = ("bias", "scale")


def learning_rate(config: TrainConfig, step: jax.Array | int) -> jax.Array:
    """float32 []: the rate of the update that follows `step` updates.

    Linear warm-up that does not waste step 0, then half a cosine down to `min_lr`: nanoGPT's
    formula (after Loshchilov & Hutter, arXiv:1608.03983); or a straight line down to it.
    """
    step = jnp.asarray(step, jnp.float32)
    opt, warmup = config.optimizer, config.optimizer.warmup_steps
    rising = opt.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, config.lr_decay_steps - warmup)
    progress = jnp.clip(progress, 0, 1)
    left = 1 - progress if opt.lr_schedule == "linear" else 0.5 * (1 + jnp.cos(jnp.pi * progress))
    falling = opt.min_lr + left * (opt.learning_rate - opt.min_lr)
    return jnp.where(step < warmup, rising, falling)


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: linear kernels and embeddings, by name (stacked blocks
    make the number of axes useless)."""

    def decays(path: tuple[Any, ...], _: jax.Array) -> bool:
        name = path[-1].key
        assert name in DECAYED + UNDECAYED, f"a parameter unknown to the decay mask: {name}"
        return name in DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def kinds(config: TrainConfig, params: Any) -> Any:
    """For each parameter "muon" or "adamw": what updates it. Muon's are the blocks' matrices."""

    def kind(path: tuple[Any, ...], _: jax.Array) -> str:
        matrix = path[0].key == "h" and path[-1].key == "kernel"
        return "muon" if matrix and config.optimizer.kind == "muon" else "adamw"

    return jax.tree_util.tree_map_with_path(kind, params)


def optimizer(
    config: TrainConfig,
    rate: jax.Array | float = 0.0,
    norm: jax.Array | None = None,
    shared: Any = None,
) -> optax.GradientTransformation:
    """Clip, then AdamW (arXiv:1711.05101), or Muon for the matrices that it serves. `init` takes
    all parameters, `update` those that are trained (`finetune.split`).

    `rate` is the learning rate of this update (`init` needs none). It is passed in, not computed
    from a count inside: so there is one step counter, the train state's. So are, where a device has
    parts of the parameters, their `norm` and along which axes they are `shared`.
    """
    opt = config.optimizer

    def clip(grads: Any, _: Any = None) -> Any:
        if not opt.grad_clip:
            return grads
        size = optax.tree.norm(grads) if norm is None else norm
        return jax.tree.map(
            lambda x: jnp.where(size < opt.grad_clip, x, x / size * opt.grad_clip), grads
        )

    rates, scaled = {"adamw": rate}, optax.scale_by_adam(opt.beta1, opt.beta2)
    if opt.kind == "muon":
        rates["muon"] = opt.muon_learning_rate * rate / opt.learning_rate
        if shared is not None:
            of, none = kinds(config, shared), optax.MaskedNode()
            shared = jax.tree.map(lambda axis, kind: axis if kind == "muon" else none, shared, of)
        dtype = compute_dtype(config.model)
        orthogonal = scale_by_muon(opt.muon_beta, opt.muon_iterations, dtype, shared)
        scaled = optax.partition(
            {"adamw": scaled, "muon": orthogonal}, functools.partial(kinds, config)
        )
    direction = optax.chain(
        optax.stateless(clip), scaled, optax.add_decayed_weights(opt.weight_decay, decay_mask)
    )

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = direction.update(grads, state, params)
        of, by_layer = kinds(config, updates), finetune.factors(config, updates)

        def scaled(u: Any, kind: str, factor: Any) -> Any:
            u = -rates[kind] * u
            return u if np.all(factor == 1) else factor * u

        return jax.tree.map(scaled, updates, of, by_layer), state

    def init(params: Any) -> Any:
        return direction.init(finetune.split(config, params)[0])

    return optax.GradientTransformation(init, update)


def adam_state(config: TrainConfig, count: Any, mu: Any, nu: Any) -> Any:
    """The state of `optimizer` after `count` updates, from Adam's moments (trees like the
    parameters)."""
    empty = jax.eval_shape(optimizer(config).init, mu)
    return optax.tree.set(empty, count=count, mu=mu, nu=nu)


def adam_parts(opt_state: Any) -> tuple[Any, ...]:
    """(count, mu, nu): the inverse of `adam_state`."""
    return tuple(optax.tree.get(opt_state, name) for name in ("count", "mu", "nu"))
