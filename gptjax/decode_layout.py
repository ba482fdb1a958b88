"""Parameters laid out for decoding, which reads all of them for every token."""

import functools
from typing import Any

import flax.traverse_util
import jax

from gptjax.config import ModelConfig
from gptjax.layers import compute_dtype
from gptjax.model import Params


def unstack(params: Params, config: ModelConfig, *, consume: bool = False) -> Params:
    """The same parameters with the blocks' apart ("h_0", "h_1", ...), and matrices in the compute
    precision. `apply` takes either.

    Of stacked ones XLA copies each block's slice for every token: at 124M a token takes 38 ms
    instead of 23. `consume` frees each given array when it is done with it.
    """
    wanted = compute_dtype(config)
    out: dict[tuple[str, ...], jax.Array] = {}
    for path, x in flax.traverse_util.flatten_dict(params).items():
        # Norms are computed in float32, and so is the sum of the two embeddings.
        wide = path[0] == "wpe" or any(name.startswith("ln_") for name in path)
        dtype = x.dtype if wide else wanted
        if path[0] == "h":
            for i, layer in enumerate(_split(x, dtype)):
                out[f"h_{i}", *path[1:]] = layer
        else:
            out[path] = x.astype(dtype)
        if consume and (path[0] == "h" or dtype != x.dtype):
            x.delete()
    return flax.traverse_util.unflatten_dict(out)


@functools.partial(jax.jit, static_argnames="dtype")
def _split(x: jax.Array, dtype: Any) -> tuple[jax.Array, ...]:
    return tuple(layer.astype(dtype) for layer in x)
