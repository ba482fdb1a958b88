"""What `pmap` does, bit for bit, by `jax.shard_map`, which JAX develops further."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.devices.hosts import first_shard
from gptjax.devices.pmap import Pmap


class ShardMap(Pmap):
    """Stacked as under `Pmap`, because XLA rounds otherwise where arrays have other axes; but the
    arrays are global, [devices of all hosts, ...]."""

    def __init__(self, devices: Sequence[jax.Device]):
        super().__init__(devices)
        self.mesh = Mesh(np.array(self.devices), (self.axis_name,))
        self._stacked = NamedSharding(self.mesh, PartitionSpec(self.axis_name))

    def to_devices(self, state: Any) -> Any:
        def stack(x: jax.Array) -> jax.Array:
            copies = [jax.device_put(first_shard(x)[None], d) for d in self.mesh.local_devices]
            shape = (len(self.devices), *x.shape)
            return jax.make_array_from_single_device_arrays(shape, self._stacked, copies)

        return jax.tree.map(stack, state)

    def map(self, function: Callable[..., Any], *, returns_state: bool) -> Any:
        def one(*args: Any) -> Any:
            found = function(*jax.tree.map(lambda x: x.squeeze(0), args))
            return jax.tree.map(lambda x: x[None], found)

        # Kernels do not say how their outputs vary over devices, so that is not checked.
        spec = self._stacked.spec
        mapped = jax.shard_map(one, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return jax.jit(mapped, donate_argnums=(0,) if returns_state else ())

    def distribute(
        self, rows: np.ndarray, accumulation_steps: int | None = None, *, abstract: bool = False
    ) -> Any:
        rows = super().distribute(rows, accumulation_steps)
        if abstract:
            return jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=self._stacked)
        return jax.make_array_from_process_local_data(self._stacked, rows)

    def abstract_state(self, shapes: Any) -> Any:
        stacked = super().abstract_state(shapes)
        return jax.tree.map(lambda x: x.update(sharding=self._stacked), stacked)
