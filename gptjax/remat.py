"""Which activations the backward pass computes again, instead of keeping them from the forward pass
(Chen et al., arXiv:1604.06174)."""

from collections.abc import Callable

import jax

from gptjax.runtime_config import ComputeConfig

UNROLLED = 12
"""Up to so many layers are unrolled: faster, but slower to compile."""

KEPT = {
    "elementwise": ("qkv", "attention", "middle", "hidden"),
    "mlp": ("qkv", "attention", "middle"),
    "attention": ("middle", "hidden"),
    "full": (),
}
"""By what is computed again, the names of what a block keeps: the outputs of its matrix products
and of attention, as `model.Block` names them."""

AGAIN = {
    "none": "nothing",
    "elementwise": "all but matrix products and attention",
    "mlp": "the MLP, and all else but matrix products and attention",
    "attention": "attention, and all else but matrix products",
    "full": "everything",
}
"""In words."""


def resolve(compute: ComputeConfig, n_layer: int, *, loop: bool = False) -> ComputeConfig:
    """With `remat` and `scan_unroll` decided. `loop`: the layers shall be a loop, unless the number
    of unrolled ones is given."""
    again = compute.remat
    if isinstance(again, bool):
        again = "full" if again else "none"
    # Remat saves memory only inside a loop: in unrolled code XLA merges the recomputation.
    loop = loop or again in KEPT or n_layer > UNROLLED
    unroll = compute.scan_unroll or (1 if loop else max(1, n_layer))
    if again == "auto":
        again = "none" if unroll >= n_layer else "elementwise"
    return compute.replace(remat=again, scan_unroll=unroll)


def policy(again: str, *, gathers: bool = False) -> Callable[..., bool] | None:
    """For `jax.checkpoint`; None: everything is kept. `gathers`: weights are gathered (`sharding`),
    which are never kept."""
    if again == "none":
        names = jax.checkpoint_policies.save_anything_except_these_names
        return names("weights") if gathers else None
    return jax.checkpoint_policies.save_only_these_names(*KEPT[again])
