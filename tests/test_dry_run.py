"""What a step costs and how fast it can be at most, by hand."""

from collections import Counter

import jax
import pytest

from gptjax import dry_run
from gptjax.config import ModelConfig, TrainConfig
from gptjax.devices.chips import Chip
from gptjax.devices.roofline import Cost
from gptjax.errors import RunError
from gptjax.runtime_config import RuntimeConfig

CONFIG = TrainConfig(ModelConfig(2, 2, 64, block_size=100, vocab_size=128), batch_size=8)


class Program:
    def cost(self):
        return Cost(3e12, 40e9)

    def sent(self):
        return Counter({"all-reduce": 10**9, "all-gather": 10**8})


@pytest.mark.parametrize(
    ("chip", "count", "times"),
    [
        # 3e12 / 1e14; 40e9 / 1e12; 1.1e9 / 1e11
        (Chip(1e14, None, 1e12, 1e11), 4, {"arithmetic": 30, "memory": 40, "links": 11}),
        (Chip(1e13, None, 1e12, 1e11), 4, {"arithmetic": 300, "memory": 40, "links": 11}),
        (Chip(1e14, None, 1e12, 1e11), 1, {"arithmetic": 30, "memory": 40}),
        (Chip(1e14), 4, {"arithmetic": 30}),
    ],
)
def test_the_slowest_part_bounds_a_step(capsys, chip, count, times):
    model = CONFIG.model
    dry_run.print_bound("a step", Program(), chip, count, 800 / count, model.flops_per_token())
    step, best = capsys.readouterr().out.splitlines()
    assert step == (
        "a step     3 TFLOP, 40 GB read and written, all-reduce 1.00 GB, all-gather 0.10 GB sent"
        " (each device)"
    )
    slowest = max(times, key=times.get)
    rate = 8 * 100 / count / (times[slowest] / 1000)
    mfu = rate * model.flops_per_token() / chip.flops
    listed = ", ".join(f"{name} {value} ms" for name, value in times.items())
    expected = f"{listed}: {slowest} bounds it; {rate:,.0f} tokens/s a device, MFU {mfu:.1%}"
    assert best.removeprefix("at best    ") == expected


def test_a_dry_run_says_whether_each_device_has_enough(capsys):
    config = TrainConfig(ModelConfig(0, 4, 64, block_size=32, vocab_size=96), batch_size=8)
    dry_run.print_training(config, RuntimeConfig(device_memory=1, strategy="fsdp"), jax.devices())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "model      8,192 parameters, batch 8 x 32"  # (96 + 32) x 64
    assert lines[1].startswith("devices    8 x cpu, fsdp, computing in float32; compiled in")
    assert lines[3].startswith("each       parameters 0.00 GiB, optimizer 0.00 GiB; ")
    assert lines[4] == "it fits: each device needs 0.00 GiB of 1.00 GiB (--device-memory)"
    with pytest.raises(RunError, match=r"it does not fit: each device needs 0\.00 GiB of 0\.00"):
        dry_run.print_training(config, RuntimeConfig(device_memory=1e-5), jax.devices())
