"""Every device holds a copy of the whole state and trains on its rows, under `jax.pmap`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.devices.base import Strategy
from gptjax.devices.hosts import first_shard


class Pmap(Strategy):
    """In the layout for training the copies of an array are stacked, [local devices, ...]."""

    axis_name = "devices"

    def shardings(self, shapes: Any) -> Any:
        """A copy on the first device of every host: with several hosts Orbax does not save stacked
        arrays."""
        first = {device.process_index: device for device in reversed(self.devices)}
        mesh = Mesh(np.array([first[host] for host in sorted(first)]), ("hosts",))
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shapes)

    def to_devices(self, state: Any) -> Any:
        copy = jax.pmap(lambda _, x: x, self.axis_name, in_axes=(0, None), devices=self.devices)
        return copy(np.arange(self.local_count), jax.tree.map(first_shard, state))

    def for_saving(self, state: Any) -> Any:
        def save(x: jax.Array, sharding: NamedSharding) -> jax.Array:
            return jax.make_array_from_single_device_arrays(x.shape, sharding, [x])

        single = self.for_sampling(state)
        return jax.tree.map(save, single, self.shardings(single))

    def for_sampling(self, params: Any) -> Any:
        return jax.tree.map(lambda x: first_shard(x).reshape(x.shape[1:]), params)

    def map(self, function: Callable[..., Any], *, returns_state: bool) -> Any:
        donated = (0,) if returns_state else ()
        return jax.pmap(function, self.axis_name, devices=self.devices, donate_argnums=donated)

    def distribute(
        self, rows: np.ndarray, accumulation_steps: int | None = None, *, abstract: bool = False
    ) -> Any:
        steps = () if accumulation_steps is None else (accumulation_steps,)
        return rows.reshape(self.local_count, *steps, -1, *rows.shape[1:])

    def abstract_state(self, shapes: Any) -> Any:
        count = self.local_count
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), shapes)

    def gather(self, rows: jax.Array) -> jax.Array:
        return jax.lax.all_gather(rows, self.axis_name, tiled=True)
