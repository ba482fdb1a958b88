"""Every device holds a share of the state (fully sharded data parallelism, ZeRO-3: Rajbhandari et
al., arXiv:1910.02054), under `jax.shard_map`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.devices.base import Strategy
from gptjax.sharding import SHARDS
from gptjax.train_step import Batch


class Fsdp(Strategy):
    """A share of every matrix, and of the optimizer's moments of it, on every device; `sharding`
    says how the model gathers weights."""

    axis_name = SHARDS

    def __init__(self, devices: Sequence[jax.Device]):
        super().__init__(devices)
        self.mesh = Mesh(np.array(self.devices), (SHARDS,))

    def shardings(self, shapes: Any) -> Any:
        """Matrices are sharded along their last axis that the number of devices divides; all else
        is replicated."""

        def sharding(path: Any, x: Any) -> NamedSharding:
            layers = any(getattr(key, "key", None) == "h" for key in path)  # a leading axis
            divisible = [i for i in range(layers, x.ndim) if x.shape[i] % self.mesh.size == 0]
            if x.ndim - layers < 2 or not divisible:
                return NamedSharding(self.mesh, PartitionSpec())
            return NamedSharding(self.mesh, PartitionSpec(*[None] * divisible[-1], SHARDS))

        return jax.tree_util.tree_map_with_path(sharding, shapes)

    def map(self, function: Callable[..., Any], *, returns_state: bool) -> Any:
        def whole(state: Any, *rows: Any) -> Any:
            specs = jax.tree.map(lambda sharding: sharding.spec, self.shardings(state))
            spread = [
                PartitionSpec(None, SHARDS) if isinstance(x, Batch) else PartitionSpec(SHARDS)
                for x in rows
            ]
            out = (specs, PartitionSpec()) if returns_state else PartitionSpec()
            # Kernels say nothing of how their outputs vary over devices, so it is not checked.
            return jax.shard_map(
                function, mesh=self.mesh, in_specs=(specs, *spread), out_specs=out, check_vma=False
            )(state, *rows)

        return jax.jit(whole, donate_argnums=(0,) if returns_state else ())

    def distribute(
        self, rows: np.ndarray, accumulation_steps: int | None = None, *, abstract: bool = False
    ) -> Any:
        spec = PartitionSpec(SHARDS)
        if accumulation_steps is not None:
            # A device gets the same rows for each micro-batch as under pmap.
            split = rows.reshape(self.local_count, accumulation_steps, -1, *rows.shape[1:])
            rows = split.swapaxes(0, 1).reshape(accumulation_steps, -1, *rows.shape[1:])
            spec = PartitionSpec(None, SHARDS)
        sharding = NamedSharding(self.mesh, spec)
        if abstract:
            return jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=sharding)
        return jax.make_array_from_process_local_data(sharding, rows)

    def gather(self, rows: jax.Array) -> jax.Array:
        return jax.lax.all_gather(rows, SHARDS, tiled=True)
