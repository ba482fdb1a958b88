"""What the ways to lay out training over devices have in common."""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.devices.hosts import first_shard, row_numbers
from gptjax.train_step import Batch, Metrics


class Strategy(abc.ABC):
    """One way to lay out a state over devices. A state has two layouts: one for saving, in which it
    is also initialised and restored, and one for training. Here they are the same."""

    axis_name: str | tuple[str, ...] | None = None
    """The axis, or axes, over which a step has to average; None: it sees the global batch."""

    def __init__(self, devices: Sequence[jax.Device]):
        # By host, in the order of `host_rows`: a pod may list its devices in another one.
        self.devices = sorted(devices, key=lambda device: (device.process_index, device.id))
        self.local_count = len(self.devices) // jax.process_count()

    @abc.abstractmethod
    def shardings(self, shapes: Any) -> Any:
        """The sharding of each array of a tree (of arrays or shapes), in the layout for saving."""

    def targets(self, shapes: Any) -> Any:
        """A `jax.ShapeDtypeStruct` with its sharding for each array: what to restore into."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
        return jax.tree.map(lambda x, s: x.update(sharding=s), abstract, self.shardings(shapes))

    def initialise(self, make: Callable[..., Any], *args: Any) -> Any:
        """`make(*args)`; its result and `args` are in the layout for saving."""
        return jax.jit(make, out_shardings=self.shardings(jax.eval_shape(make, *args)))(*args)

    def to_devices(self, state: Any) -> Any:
        """From the layout for saving to that for training. It may keep the arrays it is given."""
        return state

    def for_saving(self, state: Any) -> Any:
        """From the layout for training to that for saving: a copy that no later step touches."""
        return self.initialise(lambda tree: jax.tree.map(jnp.copy, tree), state)

    def for_sampling(self, params: Any) -> Any:
        """Parameters in the layout for training as sampling takes them, uncopied where possible."""
        return params

    def map_train_step(
        self, step: Callable[..., tuple[Any, Metrics]], accumulation_steps: int = 1
    ) -> "TrainStep":
        """`step(state, Batch, axis_name=...) -> (state, metrics)` over all devices."""
        return TrainStep(self, step, accumulation_steps)

    def map_eval_step(self, step: Callable[..., jax.Array]) -> "EvalStep":
        """`step(params, windows, weights) -> float32 [b, ...]` over all devices."""
        return EvalStep(self, step)

    def signal(self, value: int) -> np.ndarray:
        """int32 [local devices]: a number of this host, to be distributed as rows are."""
        return np.full(self.local_count, value, np.int32)

    @abc.abstractmethod
    def map(self, function: Callable[..., Any], *, returns_state: bool) -> Any:
        """`function(state, *rows)` compiled for all devices: of a state (or parameters) in the
        layout for training, and rows as `distribute` makes them. It returns what is the same on all
        devices; with `returns_state` before that the next state, and the first is donated."""

    @abc.abstractmethod
    def distribute(
        self, rows: np.ndarray, accumulation_steps: int | None = None, *, abstract: bool = False
    ) -> Any:
        """This host's rows [R, ...] as an argument of a mapped function, which finds [rows, ...]
        there, or [accumulation_steps, rows, ...]. `abstract`: only shape and sharding."""

    def batch(self, windows: np.ndarray, accumulation_steps: int, **options: bool) -> Batch:
        """This host's windows [R, T + 1] of a step's batch, as `distribute` makes them."""
        parts = windows, row_numbers(len(windows))
        return Batch(*(self.distribute(x, accumulation_steps, **options) for x in parts))

    def abstract_state(self, shapes: Any) -> Any:
        """A state in the layout for training, of `jax.ShapeDtypeStruct`."""
        return self.targets(shapes)

    def gather(self, rows: jax.Array) -> jax.Array:
        """In a mapped function: [rows, ...] of all devices, in the global batch's order."""
        return rows


class TrainStep:
    """A training step over all devices of all hosts."""

    def __init__(self, strategy: Strategy, step: Callable[..., Any], accumulation_steps: int):
        def with_signal(state: Any, batch: Batch, stop: jax.Array) -> tuple[Any, Metrics]:
            state, metrics = step(state, batch, axis_name=strategy.axis_name)
            return state, metrics | {"stop": strategy.gather(stop).max()}

        self._mapped = strategy.map(with_signal, returns_state=True)
        self._strategy, self._accumulation_steps = strategy, accumulation_steps

    def __call__(self, state: Any, windows: np.ndarray, stop: int = 0) -> tuple[Any, Metrics]:
        """(the next state, metrics). `state`, in the layout for training, is donated: its arrays
        cannot be used again. `windows`: int32 [R, T + 1], this host's rows of the batch
        (`host_rows`). `stop`: this host's stop signal; the metrics contain the largest of all
        hosts' as `stop`, so that all learn of it after the same step."""
        return self._mapped(state, *self._inputs(windows, stop))

    def _inputs(self, windows: np.ndarray, stop: int, **options: bool) -> tuple[Batch, Any]:
        strategy = self._strategy
        batch = strategy.batch(windows, self._accumulation_steps, **options)
        return batch, strategy.distribute(strategy.signal(stop), **options)

    def compile(self, state: Any, windows: np.ndarray) -> Any:
        """The program for these arguments, which the first call takes then."""
        return self._mapped.lower(state, *self._inputs(windows, 0)).compile()

    def compile_for(self, shapes: Any, rows: int, length: int) -> Any:
        """The program for a state of these shapes and a global batch of `rows` windows of `length`
        tokens, without making any array. For a run of one process; the devices may be those of
        many hosts, and need not be there."""
        inputs = self._inputs(np.empty((rows, length), np.int32), 0, abstract=True)
        return self._mapped.lower(self._strategy.abstract_state(shapes), *inputs).compile()


class EvalStep:
    """An evaluation step over all devices of all hosts."""

    def __init__(self, strategy: Strategy, step: Callable[..., jax.Array]):
        def gathered(params: Any, windows: jax.Array, weights: jax.Array, stop: jax.Array) -> Any:
            return strategy.gather(step(params, windows, weights)), strategy.gather(stop).max()

        self._mapped = strategy.map(gathered, returns_state=False)
        self._strategy = strategy

    def __call__(
        self, params: Any, windows: np.ndarray, weights: np.ndarray, stop: int = 0
    ) -> tuple[np.ndarray, int]:
        """(the numbers for the rows of all hosts, flat; the largest stop signal); waits for them.

        `params` are in the layout for training; this host's int32 windows [R, T + 1], weights
        [R, T] and stop signal.
        """
        strategy = self._strategy
        rows = map(strategy.distribute, (windows, weights, strategy.signal(stop)))
        found = self._mapped(params, *rows)
        sums, largest = (np.asarray(first_shard(x)).reshape(-1) for x in found)
        return sums, int(largest[0])

    def compile_for(self, shapes: Any, rows: int, length: int) -> Any:
        """As `TrainStep.compile_for`, for parameters of these shapes."""
        strategy = self._strategy
        given = np.empty((rows, length), np.int32), np.empty((rows, length - 1), np.float32)
        inputs = (strategy.distribute(x, abstract=True) for x in (*given, strategy.signal(0)))
        return self._mapped.lower(strategy.abstract_state(shapes), *inputs).compile()
