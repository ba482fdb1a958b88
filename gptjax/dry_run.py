"""What training and sampling need of their devices, and how fast these can be at most: by compiling
the programs, for devices that need not be there."""

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from gptjax import finetune, sampling
from gptjax.config import ModelConfig, TrainConfig
from gptjax.devices import chips, memory, roofline, setup
from gptjax.devices.memory import REMEDIES, gib
from gptjax.errors import RunError, UserError
from gptjax.layers import compute_dtype
from gptjax.runtime_config import RuntimeConfig

MOST = 5
"""Instructions of a step that are listed, those that read and write most."""


def print_training(
    config: TrainConfig, runtime: RuntimeConfig, devices: Sequence[jax.Device]
) -> None:
    """What a training step needs of each device's memory; on a `runtime.topology` also what bounds
    its speed, and that of an evaluation.

    Raises:
        UserError: there are several hosts.
        RunError: it does not fit.
    """
    if setup.host_count() > 1:
        raise UserError(
            "a dry run takes one host: on any machine, --device cpu --num-devices N stands for N"
            " devices, --device-memory for the memory of each, and --topology for TPUs"
        )
    program, seconds = _timed(lambda: memory.compile_step(config, runtime, devices))
    found, kinds = memory.of_program(program), memory.by_kind(config, runtime, devices)
    chip = chips.find(devices[0].device_kind) if runtime.topology else None
    have, source = memory.available(runtime.device_memory)
    if chip and chip.memory and runtime.device_memory is None:
        have, source = chip.memory, devices[0].device_kind
    model = config.model
    compute, why = setup.resolve_compute(
        model, runtime, devices[0], train=True, packed=config.data.packed
    )
    layers = "unrolled" if compute.scan_unroll >= model.n_layer else "in a loop"
    trained = f" ({finetune.describe(config)} trained)" if finetune.is_partial(config) else ""
    temporary = max(0, found.step - kinds["activations"])
    print(
        f"model      {model.num_parameters():,} parameters{trained}, batch"
        f" {config.batch_size} x {model.block_size}\n"
        f"devices    {setup.describe(devices)}, {runtime.strategy}, computing in"
        f" {compute_dtype(model).name}; compiled in {seconds:.1f} s\n"
        f"network    attention by {compute.attention} ({why}); layers {layers}, --remat"
        f" {compute.remat}\n"
        f"each       parameters {gib(kinds['parameters'])}, optimizer {gib(kinds['optimizer'])};"
        f" {gib(found.step)} more for a step: activations {gib(kinds['activations'])}, temporary"
        f" {gib(temporary)}; {gib(found.state)} more while a checkpoint is written"
    )
    if chip:
        tokens = config.batch_size * model.block_size / len(devices)
        step = roofline.Program(program.as_text())
        print_bound("a step", step, chip, len(devices), tokens, model.flops_per_token())
        program, _ = _timed(lambda: memory.compile_evaluation(config, runtime, devices))
        evaluation = roofline.Program(program.as_text())
        tokens /= runtime.gradient_accumulation_steps
        print_bound("evaluating", evaluation, chip, len(devices), tokens)
        for size, instruction in step.traffic()[:MOST]:
            print(f"most bytes {size / 1e9:6.2f} GB  {instruction.shortly()}")
    of = f"{gib(found.peak)} of {gib(have)} ({source})"
    if found.peak > have:
        raise RunError(f"it does not fit: each device needs {of}; {REMEDIES}")
    print(f"it fits: each device needs {of}")


def print_sampling(
    config: ModelConfig, device: jax.Device, *, prompt: int, max_new_tokens: int, num_samples: int
) -> None:
    """What reading a prompt of so many tokens and each token after it cost a device at least.

    Raises:
        RunError: it does not fit.
    """
    chip = chips.find(device.device_kind)
    assert chip and chip.memory, device
    programs, seconds = _timed(
        lambda: sampling.compile_for(config, device, prompt, max_new_tokens, num_samples)
    )
    slots = sampling.slots(prompt, max_new_tokens, config.block_size)
    dtype = compute_dtype(config)
    # The table of token embeddings is the head too, so all of it is read.
    weights = config.num_parameters() * dtype.itemsize
    cache = 2 * config.n_layer * config.n_embd * slots * num_samples * dtype.itemsize
    print(
        f"model      {config.num_parameters():,} parameters, in {dtype.name}"
        f" {weights / 1e9:.3f} GB\n"
        f"device     {device.device_kind}; compiled in {seconds:.1f} s\n"
        f"samples    {num_samples} of {prompt} + {max_new_tokens} tokens; keys and values"
        f" {cache / 1e9:.3f} GB"
    )
    read, drawn = (roofline.Program(program.as_text()) for program in programs)
    print_bound("the prompt", read, chip, 1, num_samples * prompt)
    print_bound("a token", drawn, chip, 1, num_samples, times=sampling.CHUNK)
    moved = sum(size for size, _ in drawn.traffic()) / sampling.CHUNK
    print(f"           {moved / (weights + cache):.2f} times the weights, keys and values")
    for size, instruction in drawn.traffic()[:MOST]:
        print(f"most bytes {size / 1e9 / sampling.CHUNK:6.3f} GB  {instruction.shortly()}")
    found = map(memory.of_program, programs)
    needs = max(each.state + each.step for each in found)
    of = f"{gib(needs)} of {gib(chip.memory)} ({device.device_kind})"
    if needs > chip.memory:
        raise RunError(f"it does not fit: it needs {of}; lower num_samples")
    print(f"it fits: it needs {of}")


def _timed(make: Callable[[], Any]) -> tuple[Any, float]:
    """(what it makes, seconds). RunError where a TPU's compiler finds that it does not fit."""
    began = time.perf_counter()
    try:
        return make(), time.perf_counter() - began
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = re.findall(r"\(([\d.]+)([KMG])\)", str(error))
        more = [f"{number} {unit}iB" for number, unit in sizes[:2]]
        of = f": a step needs {' of '.join(more)}, besides the state" if len(more) > 1 else ""
        raise RunError(f"it does not fit{of}; {REMEDIES}") from None


def print_bound(
    what: str,
    program: roofline.Program,
    chip: chips.Chip,
    count: int,
    tokens: float,
    flops_per_token: float | None = None,
    times: int = 1,
) -> None:
    """What a program, which does it so many `times`, costs each of `count` devices, and the least
    time for its `tokens` of each device."""
    cost, sent = program.cost(), program.sent()
    seconds = {"arithmetic": cost.flops / chip.flops / times}
    if chip.memory_bandwidth:
        seconds["memory"] = cost.bytes / chip.memory_bandwidth / times
    if chip.links and count > 1:
        seconds["links"] = sent.total() / chip.links / times
    slowest = max(seconds, key=seconds.__getitem__)
    rate = tokens / seconds[slowest]
    kinds = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in sent.most_common())
    listed = ", ".join(f"{name} {1000 * value:.4g} ms" for name, value in seconds.items())
    mfu = f", MFU {rate * flops_per_token / chip.flops:.1%}" if flops_per_token else ""
    print(
        f"{what:10} {cost.flops / times / 1e12:.4g} TFLOP, {cost.bytes / times / 1e9:.4g} GB read"
        f" and written, {kinds or 'nothing'} sent (each device)\n"
        f"at best    {listed}: {slowest} bounds it; {rate:,.0f} tokens/s a device{mfu}"
    )
