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

    def __init__(self, devices: Sequence[jax.Device]):
        super().__init__(devices)
        grid = torus(self.devices)
        self.mesh = Mesh(grid, [f"{SHARDS}_{i}" for i in range(grid.ndim)])
        self.axis_name: tuple[str, ...] = self.mesh.axis_names
        self._rows = PartitionSpec(self.axis_name)
        at = {device: i for i, device in enumerate(self.mesh.devices.flat)}
        self._order = np.array([at[device] for device in self.devices])

    def shardings(self, shapes: Any) -> Any:
        """Matrices are sharded along their first axis that the number of devices divides; all else
        is replicated."""

        def sharding(path: Any, x: Any) -> NamedSharding:
            layers = any(getattr(key, "key", None) == "h" for key in path)  # a leading axis
            divisible = [i for i in range(layers, x.ndim) if x.shape[i] % self.mesh.size == 0]
            if x.ndim - layers < 2 or not divisible:
                return NamedSharding(self.mesh, PartitionSpec())
            spec = PartitionSpec(*[None] * divisible[0], self.axis_name)
            return NamedSharding(self.mesh, spec)

        return jax.tree_util.tree_map_with_path(sharding, shapes)

    def map(self, function: Callable[..., Any], *, returns_state: bool) -> Any:
        def whole(state: Any, *rows: Any) -> Any:
            specs = jax.tree.map(lambda sharding: sharding.spec, self.shardings(state))
            spread = [
                PartitionSpec(None, *self._rows) if isinstance(x, Batch) else self._rows
                for x in rows
            ]
            out = (specs, PartitionSpec()) if returns_state else PartitionSpec()
            # Kernels do not say how their outputs vary over devices, so that is not checked.
            return jax.shard_map(
                function, mesh=self.mesh, in_specs=(specs, *spread), out_specs=out, check_vma=False
            )(state, *rows)

        return jax.jit(whole, donate_argnums=(0,) if returns_state else ())

    def distribute(
        self, rows: np.ndarray, accumulation_steps: int | None = None, *, abstract: bool = False
    ) -> Any:
        # A device gets the same rows, for each micro-batch too, as under pmap: so they lie in the
        # global array in the order of the mesh. (They know their numbers; see `gather`.)
        steps = () if accumulation_steps is None else (accumulation_steps,)
        each = rows.reshape(self.local_count, *steps, -1, *rows.shape[1:])
        sharding = NamedSharding(self.mesh, PartitionSpec(*[None] * len(steps), *self._rows))
        shape = (*steps, each.shape[1 + len(steps)] * len(self.devices), *rows.shape[1:])
        if abstract:
            return jax.ShapeDtypeStruct(shape, rows.dtype, sharding=sharding)
        own = [device for device in self.devices if device.process_index == jax.process_index()]
        parts = [jax.device_put(part, device) for part, device in zip(each, own, strict=True)]
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)

    def gather(self, rows: jax.Array) -> jax.Array:
        by_device = jax.lax.all_gather(rows, self.axis_name)[self._order]
        return by_device.reshape(-1, *rows.shape[1:])


def torus(devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as the links between them lie: of a TPU slice [x, y, z] without axes of one chip;
    others [devices]."""

    def place(device: Any) -> tuple[int, ...]:
        return (*getattr(device, "coords", ()), getattr(device, "core_on_chip", 0))

    places = np.array([place(device) for device in devices])
    sides = places.max(0) - places.min(0) + 1
    if sides.prod() != len(devices) or len(devices) == 1:
        return np.array(devices)
    grid = np.empty(sides, object)
    for device, at in zip(devices, places - places.min(0), strict=True):
        grid[tuple(at)] = device
    return grid.squeeze()
