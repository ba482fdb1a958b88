"""What a run needs of its devices, and how fast these can be at most: by compiling the step."""

import time
from collections.abc import Sequence

import jax

from gptjax.config import TrainConfig
from gptjax.devices import chips, memory, roofline, setup
from gptjax.devices.memory import REMEDIES, gib
from gptjax.errors import RunError, UserError
from gptjax.layers import compute_dtype
from gptjax.runtime_config import RuntimeConfig


def print_needs(config: TrainConfig, runtime: RuntimeConfig, devices: Sequence[jax.Device]) -> None:
    """Compile the training step for these devices, which need not be here. Print what it needs of
    each one's memory; of a `runtime.topology` also what bounds its speed.

    Raises:
        UserError: there are several hosts.
        RunError: it does not fit.
    """
    if setup.host_count() > 1:
        raise UserError(
            "a dry run takes one host: on any machine, --device cpu --num-devices N stands for N"
            " devices, --device-memory for the memory of each, and --topology for TPUs"
        )
    began = time.perf_counter()
    program = memory.compile_step(config, runtime, devices)
    seconds = time.perf_counter() - began
    found = memory.of_program(program)
    chip = chips.find(devices[0].device_kind) if runtime.topology else None
    have, source = memory.available(runtime.device_memory)
    if chip and chip.memory and runtime.device_memory is None:
        have, source = chip.memory, devices[0].device_kind
    model, state = config.model, gib(found.state)
    print(
        f"model      {model.num_parameters():,} parameters, batch {config.batch_size} x"
        f" {model.block_size}\n"
        f"devices    {setup.describe(devices)}, {runtime.strategy}, computing in"
        f" {compute_dtype(model).name}; compiled in {seconds:.1f} s\n"
        f"each       {state} for the state, {gib(found.step)} more for a step, {state} more while"
        " a checkpoint is written"
    )
    if chip:
        print_bound(config, roofline.Program(program.as_text()), chip, len(devices))
    of = f"{gib(found.peak)} of {gib(have)} ({source})"
    if found.peak > have:
        raise RunError(f"it does not fit: each device needs {of}; {REMEDIES}")
    print(f"it fits: each device needs {of}")


def print_bound(
    config: TrainConfig, program: roofline.Program, chip: chips.Chip, count: int
) -> None:
    """What a step costs each of `count` devices, and the least time that it can take."""
    cost, sent = program.cost(), program.collectives()
    tokens = config.batch_size * config.model.block_size / count
    seconds = {"arithmetic": cost.flops / chip.flops}
    if chip.memory_bandwidth:
        seconds["memory"] = cost.bytes / chip.memory_bandwidth
    if chip.links and count > 1:
        # A ring passes a sum round twice.
        moved = sum(size * (2 if kind == "all-reduce" else 1) for kind, size in sent.items())
        seconds["links"] = moved * (count - 1) / count / chip.links
    slowest = max(seconds, key=seconds.__getitem__)
    rate = tokens / seconds[slowest]
    mfu = rate * config.model.flops_per_token() / chip.flops
    kinds = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in sent.most_common())
    times = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds.items())
    print(
        f"a step     {cost.flops / 1e12:.2f} TFLOP, {cost.bytes / 1e9:.1f} GB read and written,"
        f" {kinds or 'nothing sent'} (each device)\n"
        f"at best    {times}: {slowest} bounds it; {rate:,.0f} tokens/s a device, MFU {mfu:.1%}"
    )
