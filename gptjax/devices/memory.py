"""How much memory a training step needs on each device, from compiling it: no array is made."""

import functools
import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from gptjax import finetune, train_step
from gptjax.config import ModelConfig, TrainConfig
from gptjax.devices import setup
from gptjax.devices.strategy import get_strategy
from gptjax.errors import RunError, UserError
from gptjax.model import compute_dtype
from gptjax.runtime_config import ComputeConfig, RuntimeConfig

GIB = 2**30

REMEDIES = "use --remat, more --gradient-accumulation-steps, --strategy fsdp, or more devices"


class StepMemory(NamedTuple):
    """Bytes on one device; on the fullest one, where they differ."""

    state: int
    """Parameters, optimizer state and the batch; as much again while a checkpoint is written, from
    a copy, and the next steps are taken."""
    step: int
    """In addition, during a step: gradients, activations, gathered weights."""

    @property
    def peak(self) -> int:
        return 2 * self.state + self.step


def compile_step(
    config: TrainConfig, runtime: RuntimeConfig, devices: Sequence[jax.Device] | None = None
) -> Any:
    """The program of one training step, over all devices or over the given ones."""
    step = get_strategy(runtime.strategy, devices).map_train_step(
        functools.partial(
            train_step.train_step,
            config=config,
            compute=_compute(config, runtime, devices),
            eot=_eot(config),
        ),
        runtime.gradient_accumulation_steps,
    )
    return step.compile_for(_shapes(config), config.batch_size, config.model.block_size + 1)


def compile_evaluation(
    config: TrainConfig, runtime: RuntimeConfig, devices: Sequence[jax.Device]
) -> Any:
    """The program that evaluates what fits in training: one micro-batch of all devices."""
    compute = _compute(config, runtime, devices, train=False)
    step = get_strategy(runtime.strategy, devices).map_eval_step(
        functools.partial(
            train_step.eval_step, config=config.model, compute=compute, eot=_eot(config)
        )
    )
    rows = config.batch_size // runtime.gradient_accumulation_steps
    return step.compile_for(_shapes(config).params, rows, config.model.block_size + 1)


def by_kind(
    config: TrainConfig, runtime: RuntimeConfig, devices: Sequence[jax.Device]
) -> dict[str, int]:
    """Bytes of each device for `parameters`, `optimizer`, and `activations`: what the forward pass
    leaves for the backward pass (where layers are unrolled XLA may keep less)."""
    shapes = _shapes(config)
    strategy = get_strategy(runtime.strategy, devices)

    def own(tree: Any) -> int:
        shardings = jax.tree.leaves(strategy.shardings(tree))
        return sum(
            math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x, sharding in zip(jax.tree.leaves(tree), shardings, strict=True)
        )

    rows = runtime.divide_batch(config, len(devices))
    compute = _compute(config, runtime, devices)

    def left(params: Any, windows: Any, key: Any) -> Any:
        trained, frozen = finetune.split(config, params)

        def loss(trained: Any) -> jax.Array:
            whole = finetune.join(trained, frozen)
            return train_step.loss(whole, windows, config.model, compute, key, eot=_eot(config))

        return jax.vjp(loss, trained)[1]

    windows = jax.ShapeDtypeStruct((rows, config.model.block_size + 1), jax.numpy.int32)
    key = jax.eval_shape(lambda: train_step.random_key(0))
    kept = Counter(
        (x.shape, x.dtype)
        for x in jax.tree.leaves(jax.eval_shape(left, shapes.params, windows, key))
    )
    kept.subtract((x.shape, x.dtype) for x in jax.tree.leaves(shapes.params))
    activations = sum(
        math.prod(shape) * dtype.itemsize * max(count, 0) for (shape, dtype), count in kept.items()
    )
    return {
        "parameters": own(shapes.params),
        "optimizer": own(shapes.opt_state),
        "activations": activations,
    }


def _compute(
    config: TrainConfig, runtime: RuntimeConfig, devices: Sequence[jax.Device] | None, *,
    train: bool = True,
) -> ComputeConfig:  # fmt: skip
    device = devices[0] if devices else None
    packed = config.data.packed
    return setup.resolve_compute(config.model, runtime, device, train=train, packed=packed)[0]


def _eot(config: TrainConfig) -> int | None:
    """Any id: it does not matter to the size of a program which one separates documents."""
    return 0 if config.data.packed else None


def _shapes(config: TrainConfig) -> train_step.TrainState:
    return jax.eval_shape(lambda: train_step.init_state(config))


def of_program(program: Any) -> StepMemory:
    """Of a compiled training step, as XLA reports it. Raises RunError where it does not."""
    found = program.memory_analysis()
    if found is None:
        raise RunError(f"XLA does not tell the memory of programs for {jax.default_backend()}")
    # The new state takes the place of the old one.
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes
    code = found.generated_code_size_in_bytes
    return StepMemory(found.argument_size_in_bytes, found.temp_size_in_bytes + fresh + code)


def available(given: float | None) -> tuple[float, str]:
    """(bytes that a device has for us, how that is known): the `given` GiB, or what the device
    says; a CPU device has its share of the memory that is free now."""
    if given is not None:
        return given * GIB, "--device-memory"
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        return limit, jax.devices()[0].device_kind
    free, name = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "memory"
    if os.path.exists("/proc/meminfo"):  # on Linux, which also says what is free
        with open("/proc/meminfo") as file:
            known = dict(line.split(":") for line in file)
        free, name = int(known["MemAvailable"].split()[0]) * 1024, "free memory"
    count = jax.local_device_count()
    return free / count, f"this machine's {name}{f' / {count}' if count > 1 else ''}"


def shortage(program: Any, runtime: RuntimeConfig) -> str:
    """A warning, once the state has been made, where the step may not fit; else ""."""
    try:
        found = of_program(program)
    except RunError:
        return ""
    have, source = available(runtime.device_memory)
    if runtime.device_memory is None and jax.default_backend() == "cpu":
        have += found.state  # it is not free any more
    if found.peak <= have:
        return ""
    return (
        f"warning: this may not fit: each device needs up to {gib(found.peak)} of {gib(have)}"
        f" ({source}); {REMEDIES}"
    )


def refuse_too_large(config: TrainConfig, runtime: RuntimeConfig) -> None:
    """Before anything is made: UserError if not even the state fits a device."""
    sharded = setup.device_count() if runtime.strategy == "fsdp" else 1
    state = jax.tree.leaves(_shapes(config))
    need = sum(x.size * x.dtype.itemsize for x in state) / sharded
    have, source = available(runtime.device_memory)
    if need > have:
        raise UserError(
            f"{config.model.num_parameters():,} parameters do not fit: each device needs"
            f" {gib(need)} for them and the optimizer's state, of {gib(have)} ({source}); use a"
            " smaller model, or --strategy fsdp on more devices"
        )


def refuse_too_many(
    config: ModelConfig, num_samples: int, tokens: int, devices: int = 1, *,
    setting: str = "num_samples",
) -> None:  # fmt: skip
    """UserError if the keys and values of so many samples of `tokens` do not fit their devices;
    `setting`: what says how many."""
    size = compute_dtype(config).itemsize
    one = 2 * config.n_layer * config.n_embd * min(tokens, config.block_size) * size
    one += 4 * (config.vocab_size or 0)
    have, source = available(None)
    need = -(-num_samples // devices) * one
    if need > have:
        of = f" of each of {devices} devices" if devices > 1 else ""
        raise UserError(
            f"{num_samples:,} samples need {gib(need)}{of}, of {gib(have)} ({source}); lower"
            f" {setting}"
        )


def gib(size: float) -> str:
    """ "1.50 GiB"."""
    return f"{size / GIB:.2f} GiB"
