"""How a training state and its batches lie on the devices of all hosts.

`Replicas`: every device holds all of the state, one copy along a leading axis, under `jax.pmap`
with donation. `Fsdp`: each holds a share, under `jax.jit` with a sharding for every array. The rest
of the project sees the methods of `Strategy` only; a step knows neither.
"""

import abc
import functools
import hashlib
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.config import StrategyKind
from gptjax.model import SHARDS
from gptjax.train import Batch

AXIS = "devices"


class Strategy(abc.ABC):
    """One way to lay out a state. "Built" arrays are laid out as they are saved and loaded; a
    "placed" state as it is trained."""

    @abc.abstractmethod
    def shardings(self, shapes: Any) -> Any:
        """For each array of a tree (of arrays or their shapes), where it is built."""

    def targets(self, shapes: Any) -> Any:
        """`shapes` with their shardings: what `checkpoint` is to load."""

        def target(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree.map(target, shapes, self.shardings(shapes))

    def build(self, make: Callable[..., Any], *args: Any) -> Any:
        """`make(*args)`, built; `args` are built too."""
        return jax.jit(make, out_shardings=self.shardings(jax.eval_shape(make, *args)))(*args)

    @abc.abstractmethod
    def place(self, built: Any) -> Any:
        """A state to train on. It may use the arrays it is given."""

    @abc.abstractmethod
    def unplace(self, placed: Any) -> Any:
        """A fresh built copy, which the next step does not touch: to be saved."""

    @abc.abstractmethod
    def for_sampling(self, placed: Any) -> Any:
        """Placed parameters for `generate`, uncopied where that can be."""

    @abc.abstractmethod
    def map_train_step(
        self, step: Callable[..., tuple[Any, dict[str, jax.Array]]], accumulation_steps: int = 1
    ) -> "TrainStep":
        """`step(state, Batch, axis_name=...) -> (state, metrics)` over all devices."""

    @abc.abstractmethod
    def map_eval_step(
        self, step: Callable[..., jax.Array]
    ) -> Callable[..., tuple[np.ndarray, int]]:
        """`step(params, windows, weights) -> float32 [b]` over all devices.

        The result takes placed parameters, this host's windows [R, T + 1] and weights [R, T] and
        its stop signal; it waits, and gives the rows of all hosts [all R], and the largest signal.
        """


class TrainStep(abc.ABC):
    """A training step over all devices of all hosts."""

    @abc.abstractmethod
    def __call__(self, state: Any, windows: np.ndarray, stop: int = 0) -> Any:
        """(the next state, metrics). `state` is placed, and used up. `windows` int32 [R, T + 1] are
        this host's rows of the batch (`host_rows`). `stop` is this host's signal: the metrics name
        the largest of all hosts' as `stop`, so all of them learn of it after the same step."""

    @abc.abstractmethod
    def compile(self, shapes: Any, rows: int, length: int) -> Any:
        """The compiled program for a state of these shapes and `rows` windows of `length` tokens on
        all devices, without making any array. On one host: `jax.pmap` cannot on several."""


def strategy(kind: StrategyKind) -> Strategy:
    """Over all devices there are."""
    return Replicas() if kind == "pmap" else Fsdp()


def host_rows(rows: int) -> slice:
    """Which of a global batch's rows this host feeds: a contiguous share."""
    share = rows // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def fetch(tree: Any) -> dict[str, float]:
    """Scalars that are the same on all devices, on the host; waits for them."""
    return {name: np.asarray(_local(x)).item() for name, x in tree.items()}


def every(value: int) -> list[int]:
    """The `value` of every host, which all must call."""
    if jax.process_count() == 1:
        return [value]
    return multihost_utils.process_allgather(np.int32(value)).reshape(-1).tolist()


def first_hosts(values: list[int]) -> list[int]:
    """The list of the first host, on all; all must call."""
    if jax.process_count() == 1:
        return values
    count = every(len(values))[0]
    padded = np.array((values + [0] * count)[:count], np.int32)
    return multihost_utils.broadcast_one_to_all(padded).tolist()


def same(text: str) -> bool:
    """Whether all hosts, which all must call, have the same `text`."""
    if jax.process_count() == 1:
        return True
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    return bool((multihost_utils.process_allgather(digest) == digest).all())


def meet() -> None:
    """To be called by all hosts when all have just joined. On CPUs the first collective must begin
    within 30 seconds on all of them; later ones may keep each other waiting."""
    if jax.process_count() == 1:
        return
    sys.stdout.flush()
    stdout, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # Gloo's greeting
    try:
        total = jax.pmap(lambda x: jax.lax.psum(x, AXIS), axis_name=AXIS)
        total(_everywhere(1)).block_until_ready()
        every(0)
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)


def _local(x: Any) -> Any:
    # Never x[0]: indexing an array that lives on many devices gathers it.
    return x.addressable_shards[0].data if isinstance(x, jax.Array) else x


def _numbered(windows: np.ndarray) -> Batch:
    """This host's windows [R, T + 1] with their numbers in the global batch."""
    first = jax.process_index() * len(windows)
    return Batch(windows, np.arange(first, first + len(windows), dtype=np.int32))


# ------------------------------------------------------------------------------ replicas


class Replicas(Strategy):
    """A copy of the state on every device, stacked along a leading axis."""

    def shardings(self, shapes: Any) -> Any:
        """A copy on the first device of every host: in a run on several hosts Orbax does not save
        stacked arrays."""
        hosts = {device.process_index: device for device in reversed(jax.devices())}
        mesh = Mesh(np.array([hosts[i] for i in sorted(hosts)]), ("hosts",))
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shapes)

    def place(self, built: Any) -> Any:
        copy = jax.pmap(lambda _, x: x, axis_name=AXIS, in_axes=(0, None))
        return copy(np.arange(jax.local_device_count()), jax.tree.map(_local, built))

    def unplace(self, placed: Any) -> Any:
        def one(x: jax.Array, sharding: NamedSharding) -> jax.Array:
            (device,) = sharding.addressable_devices
            copy = jax.device_put(_local(x).reshape(x.shape[1:]), device)
            return jax.make_array_from_single_device_arrays(copy.shape, sharding, [copy])

        return jax.tree.map(one, placed, self.shardings(placed))

    def for_sampling(self, placed: Any) -> Any:
        return jax.tree.map(lambda x: _local(x).reshape(x.shape[1:]), placed)

    def map_train_step(
        self, step: Callable[..., tuple[Any, dict[str, jax.Array]]], accumulation_steps: int = 1
    ) -> TrainStep:
        return _ReplicaStep(step, accumulation_steps)

    def map_eval_step(
        self, step: Callable[..., jax.Array]
    ) -> Callable[..., tuple[np.ndarray, int]]:
        def mapped(params: Any, batch: Batch, weights: jax.Array, stop: jax.Array) -> Any:
            sums = step(params, batch.windows, weights)
            found = jax.lax.all_gather((sums, batch.rows), AXIS, tiled=True)
            return *found, jax.lax.pmax(stop, AXIS)

        pmapped = jax.pmap(mapped, axis_name=AXIS)

        def run(params: Any, windows: np.ndarray, weights: np.ndarray, stop: int = 0) -> Any:
            batch = Batch(*map(_spread, _numbered(windows)))
            found = pmapped(params, batch, _spread(weights), _everywhere(stop))
            sums, rows, largest = (np.asarray(_local(x)).reshape(-1) for x in found)
            # A pod's devices need not come in the order of its hosts.
            return sums[np.argsort(rows)], int(largest[0])

        return run


def _spread(rows: Any, *more: int) -> np.ndarray:
    """This host's rows [R, ...] -> [local devices, *more, b, ...]."""
    return rows.reshape(jax.local_device_count(), *more, -1, *rows.shape[1:])


def _everywhere(value: int) -> np.ndarray:
    """int32 [local devices]."""
    return np.full(jax.local_device_count(), value, np.int32)


class _ReplicaStep(TrainStep):
    def __init__(self, step: Callable[..., Any], accumulation_steps: int):
        def mapped(state: Any, batch: Batch, stop: jax.Array) -> Any:
            state, metrics = step(state, batch, axis_name=AXIS)
            return state, metrics | {"stop": jax.lax.pmax(stop, AXIS)}

        self._pmapped = jax.pmap(mapped, axis_name=AXIS, donate_argnums=0)
        self._accumulation_steps = accumulation_steps

    def __call__(self, state: Any, windows: np.ndarray, stop: int = 0) -> Any:
        batch = [_spread(part, self._accumulation_steps) for part in _numbered(windows)]
        return self._pmapped(state, Batch(*batch), _everywhere(stop))

    def compile(self, shapes: Any, rows: int, length: int) -> Any:
        def stacked(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((jax.device_count(), *x.shape), x.dtype)

        batch = _spread(np.empty((rows, length), np.int32), self._accumulation_steps)
        args = jax.tree.map(stacked, shapes), Batch(batch, batch[..., 0]), _everywhere(0)
        return self._pmapped.lower(*args).compile()


# ---------------------------------------------------------------------------------- fsdp


class Fsdp(Strategy):
    """A share of every matrix, and of all that the optimizer keeps of it, on every device (ZeRO-3:
    Rajbhandari et al., arXiv:1910.02054). `model` says where weights are whole."""

    def __init__(self) -> None:
        # In the order of `host_rows`.
        order = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        self.mesh = Mesh(np.array(order), (SHARDS,))

    def shardings(self, shapes: Any) -> Any:
        """Matrices in shares along their last axis that divides; all else whole everywhere."""

        def sharding(path: Any, x: Any) -> NamedSharding:
            layers = any(getattr(key, "key", None) == "h" for key in path)
            divisible = [i for i in range(layers, x.ndim) if x.shape[i] % self.mesh.size == 0]
            if x.ndim - layers < 2 or not divisible:
                return self._sharding()
            return self._sharding(*[None] * divisible[-1], SHARDS)

        return jax.tree_util.tree_map_with_path(sharding, shapes)

    def _sharding(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def place(self, built: Any) -> Any:
        return built

    def unplace(self, placed: Any) -> Any:
        return self.build(functools.partial(jax.tree.map, jnp.copy), placed)

    def for_sampling(self, placed: Any) -> Any:
        return placed

    def map_train_step(
        self, step: Callable[..., tuple[Any, dict[str, jax.Array]]], accumulation_steps: int = 1
    ) -> TrainStep:
        return _ShardedStep(self, step, accumulation_steps)

    def map_eval_step(
        self, step: Callable[..., jax.Array]
    ) -> Callable[..., tuple[np.ndarray, int]]:
        def whole(params: Any, windows: jax.Array, weights: jax.Array, stop: jax.Array) -> Any:
            return step(params, windows, weights), stop.max()

        jitted = jax.jit(whole, out_shardings=self._sharding())

        def run(params: Any, windows: np.ndarray, weights: np.ndarray, stop: int = 0) -> Any:
            rows = (self.distribute(part) for part in (windows, weights, _everywhere(stop)))
            with jax.set_mesh(self.mesh):
                sums, stop = jitted(params, *rows)
            return np.asarray(sums), int(stop)

        return run

    def distribute(self, rows: np.ndarray, accumulation_steps: int | None = None) -> jax.Array:
        """This host's rows [R, ...] as a part of the global array [all R, ...], or of
        [accumulation_steps, all R / accumulation_steps, ...]: of each micro-batch a device has the
        rows that it would have as a replica."""
        if accumulation_steps is None:
            sharding, count = self._sharding(SHARDS), len(rows)
            shape = (count * jax.process_count(), *rows.shape[1:])
        else:
            sharding = self._sharding(None, SHARDS)
            spread = _spread(rows, accumulation_steps)
            rows = spread.swapaxes(0, 1).reshape(accumulation_steps, -1, *rows.shape[1:])
            shape = (accumulation_steps, rows.shape[1] * jax.process_count(), *rows.shape[2:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)


class _ShardedStep(TrainStep):
    def __init__(self, fsdp: Fsdp, step: Callable[..., Any], accumulation_steps: int):
        def whole(state: Any, batch: Batch, stop: jax.Array) -> Any:
            state, metrics = step(state, batch)
            layout = jax.tree.map(lambda x: x.spec, fsdp.shardings(state))
            return jax.lax.with_sharding_constraint(
                state, layout
            ), jax.lax.with_sharding_constraint(metrics | {"stop": stop.max()}, PartitionSpec())

        self._jitted = jax.jit(whole, donate_argnums=0)
        self._fsdp = fsdp
        self._accumulation_steps = accumulation_steps

    def __call__(self, state: Any, windows: np.ndarray, stop: int = 0) -> Any:
        batch = (self._fsdp.distribute(x, self._accumulation_steps) for x in _numbered(windows))
        with jax.set_mesh(self._fsdp.mesh):
            return self._jitted(state, Batch(*batch), self._fsdp.distribute(_everywhere(stop)))

    def compile(self, shapes: Any, rows: int, length: int) -> Any:
        steps = self._accumulation_steps

        def of(shape: tuple[int, ...], *axes: str | None) -> jax.ShapeDtypeStruct:
            sharding = self._fsdp._sharding(*axes)
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

        windows = of((steps, rows // steps, length), None, SHARDS)
        batch = Batch(windows, of((steps, rows // steps), None, SHARDS))
        stop = of((jax.device_count(),), SHARDS)
        with jax.set_mesh(self._fsdp.mesh):
            return self._jitted.lower(self._fsdp.targets(shapes), batch, stop).compile()
