"""What of a model is trained, and how fast: frozen parameters, rates that differ by layer, LoRA.

A parameter is named by where it is in the tree, with the layer's number: h.0.attn.c_attn.kernel.
Letters in shape comments: L layers, [m, n] a kernel, R the rank of adapters.
"""

import fnmatch
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gptjax.config import ModelConfig, TrainConfig
from gptjax.errors import UserError
from gptjax.model import init

ADAPTERS = "lora_a", "lora_b"
"""The last part of their names."""


def split(config: TrainConfig, params: Any) -> tuple[Any, Any]:
    """(what is trained, what is frozen): two trees with some of the parameters each. What has a
    layer that is trained, is trained; `without_frozen` sees to its other layers."""
    flat = flatten_dict(factors(config, params))
    chosen = {path for path, factor in flat.items() if np.any(factor)}
    if len(chosen) == len(flat):
        return params, {}
    parts: tuple[dict, dict] = {}, {}
    for path, x in flatten_dict(params).items():
        parts[path not in chosen][path] = x
    return unflatten_dict(parts[0]), unflatten_dict(parts[1])


def join(trained: Any, frozen: Any) -> Any:
    """The inverse of `split`."""
    if not frozen:
        return trained
    return unflatten_dict(flatten_dict(trained) | flatten_dict(frozen))


def like(part: Any, tree: Any) -> Any:
    """Those leaves of a tree like the parameters that `part` has too."""
    wanted = flatten_dict(part).keys()
    return unflatten_dict({path: x for path, x in flatten_dict(tree).items() if path in wanted})


def factors(config: TrainConfig, params: Any) -> Any:
    """For each parameter what its learning rate is multiplied by: a number, or [L, 1, ...] where
    layers differ; 0 where it is frozen."""
    if not (is_partial(config) or config.optimizer.layer_decay < 1):
        return jax.tree.map(lambda _: 1.0, params)

    def factor(path: tuple[str, ...], x: Any) -> Any:
        found = [_factor(config, name) for name in names(path, x)]
        if len({*found}) == 1:
            return found[0]
        return np.reshape(found, (-1, *[1] * (x.ndim - 1)))

    flat = flatten_dict(params)
    return unflatten_dict({path: factor(path, x) for path, x in flat.items()})


def _factor(config: TrainConfig, name: str) -> float:
    if config.model.lora_rank and not name.endswith(ADAPTERS):
        return 0.0
    if any(matches(pattern, name) for pattern in config.freeze):
        return 0.0
    first, *rest = name.split(".")
    layers = config.model.n_layer
    below = layers - 1 - int(rest[0]) if first == "h" else layers * (first in ("wte", "wpe"))
    return max(config.optimizer.layer_decay**below, sys.float_info.min)  # 0 would be frozen


def names(path: tuple[str, ...], x: Any) -> list[str]:
    """Of one parameter in each layer, or its one name."""
    first, *rest = path
    firsts = [f"h.{i}" for i in range(x.shape[0])] if first == "h" else [first]
    return [".".join([each, *rest]) for each in firsts]


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern is that of the name, or of a part that it belongs to."""
    parts = name.split(".")
    return any(
        fnmatch.fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts) + 1)
    )


def without_frozen(config: TrainConfig, gradients: Any) -> Any:
    """The gradients of `split`'s first part, those of frozen layers zero."""
    return jax.tree.map(
        lambda x, factor: x if np.all(factor) else jnp.where(factor != 0, x, 0),
        gradients,
        factors(config, gradients),
    )


def num_trained(config: TrainConfig) -> int:
    """Numbers that are trained."""
    params = _shapes(config.model)
    counts = jax.tree.map(
        lambda x, factor: x.size * np.count_nonzero(factor) // np.size(factor),
        params,
        factors(config, params),
    )
    return sum(jax.tree.leaves(counts))


def is_partial(config: TrainConfig) -> bool:
    """Whether something is frozen."""
    return bool(config.freeze or config.model.lora_rank)


def describe(config: TrainConfig) -> str:
    """ "294,912 of 124,734,720"."""
    return f"{num_trained(config):,} of {config.model.num_parameters():,}"


def _shapes(config: ModelConfig) -> Any:
    known = config if config.vocab_size else config.replace(vocab_size=1)
    return jax.eval_shape(functools.partial(init, known), jax.random.key(0))


def check(config: TrainConfig) -> None:
    """UserError if a pattern names nothing, nothing is left to train, or Muon has nothing to do."""
    if not is_partial(config):
        return
    if config.model.lora_rank and config.optimizer.kind == "muon":
        raise UserError("muon is for kernels, which LoRA leaves as they are: --optimizer adamw")
    params = _shapes(config.model)
    known = [name for path, x in flatten_dict(params).items() for name in names(path, x)]
    for pattern in config.freeze:
        if not any(matches(pattern, name) for name in known):
            tops = sorted({name.split(".")[0] for name in known} - {"h"})
            inside = sorted(n.removeprefix("h.0.") for n in known if n.startswith("h.0."))
            raise UserError(
                f"freeze: no parameter is called {pattern!r}; there are {', '.join(tops)}, and in"
                f" each of {config.model.n_layer} layers, such as h.0: {', '.join(inside)}"
            )
    if not num_trained(config):
        raise UserError("freeze: all parameters would be frozen; leave some to train")


# ------------------------------------------------------------------------------------- LoRA


def only_adapters(params: Any) -> Any:
    """Some of a tree like the parameters."""
    flat = flatten_dict(params)
    return unflatten_dict({path: x for path, x in flat.items() if path[-1] in ADAPTERS})


def merge(config: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """The same model without adapters: they are added to the kernels, whose arrays are used up."""
    if not config.lora_rank:
        return config, params
    scale, flat = config.lora_alpha / config.lora_rank, flatten_dict(params)
    for path in [path[:-1] for path in flat if path[-1] == ADAPTERS[0]]:
        kernel, a, b = (flat.pop((*path, name)) for name in ("kernel", *ADAPTERS))
        add = jax.jit(_merged, donate_argnums=0, out_shardings=kernel.sharding)
        flat[*path, "kernel"] = add(kernel, a, b, scale)
    rest = {name for name in config.given if not name.startswith("lora_")}
    return ModelConfig(**{name: getattr(config, name) for name in rest}), unflatten_dict(flat)


def _merged(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """[L, m, n], [L, m, R], [L, R, n] -> [L, m, n]."""
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return kernel + product("lmr,lrn->lmn", a, b) * scale
