"""What a training step takes of each device's memory, by compiling it: no array is made."""

import functools
import os
import time
from typing import NamedTuple

import jax

from gptjax import devices, parallel, train
from gptjax.config import TrainConfig
from gptjax.errors import RunError, UserError
from gptjax.model import compute_dtype

GIB = 2**30


class Need(NamedTuple):
    """Bytes on one device; on the fullest one, where they differ."""

    state: int
    """Parameters and optimizer state; and the batch."""
    step: int
    """Besides, during a step: gradients, activations, weights put together."""

    @property
    def saving(self) -> int:
        """Besides: a copy of the state that is being written, while the next steps are taken."""
        return self.state

    @property
    def peak(self) -> int:
        return self.state + self.step + self.saving


def need(config: TrainConfig) -> Need:
    """Of one training step over all devices there are, as XLA reports it."""
    strategy = parallel.strategy(config.parallel.strategy)
    step = strategy.map_train_step(
        functools.partial(train.train_step, config=config), config.gradient_accumulation_steps
    )
    shapes = jax.eval_shape(lambda: train.init_state(config))
    program = step.compile(shapes, config.batch_size, config.model.block_size + 1)
    found = program.memory_analysis()
    # The new state takes the old one's place.
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes
    code = found.generated_code_size_in_bytes
    return Need(found.argument_size_in_bytes, found.temp_size_in_bytes + fresh + code)


def available(gib: float | None) -> tuple[float, str]:
    """(bytes a device has for us, where that is known from): `gib`, or what the device says; of a
    CPU its share of the memory that is free now."""
    if gib is not None:
        return gib * GIB, "--device-memory"
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        return limit, jax.devices()[0].device_kind
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if os.path.exists("/proc/meminfo"):  # what caches hold can be had too
        with open("/proc/meminfo") as file:
            known = dict(line.split(":") for line in file)
        free = int(known["MemAvailable"].split()[0]) * 1024
    count = jax.local_device_count()
    return free / count, f"this machine's free memory{f' / {count}' if count > 1 else ''}"


def dry_run(config: TrainConfig) -> None:
    """Compile, and say what a run would need and whether that is there.

    Raises:
        UserError: there are several hosts.
        RunError: it is not.
    """
    if devices.host_count() > 1:
        raise UserError(
            "a dry run takes one host: on any machine, --device cpu --num-devices N stands for N"
            " devices, and --device-memory for theirs"
        )
    began = time.perf_counter()
    found = need(config)
    took = time.perf_counter() - began
    have, whose = available(config.device_memory)
    model = config.model
    print(
        f"model      {model.num_parameters():,} parameters, batch {config.batch_size} x"
        f" {model.block_size}\n"
        f"devices    {devices.describe()}, {config.parallel.strategy}, computing in"
        f" {compute_dtype(model).name}; compiled in {took:.1f} s\n"
        f"each       {_gib(found.state)} for the state, {_gib(found.step)} more for a step,"
        f" {_gib(found.saving)} more while a checkpoint is written"
    )
    of = f"{_gib(found.peak)} of {_gib(have)} ({whose})"
    if found.peak > have:
        raise RunError(
            f"it does not fit: each device needs {of}; turn on --model.remat, raise"
            " --gradient-accumulation-steps, use --parallel.strategy fsdp, or more devices"
        )
    print(f"it fits: each device needs {of}")


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
