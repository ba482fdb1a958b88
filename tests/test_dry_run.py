"""What a step costs and how fast it can be at most, by hand."""

from collections import Counter

import pytest

from gptjax.config import ModelConfig, TrainConfig
from gptjax.devices import dry_run
from gptjax.devices.chips import Chip
from gptjax.devices.roofline import Cost

CONFIG = TrainConfig(ModelConfig(2, 2, 64, block_size=100, vocab_size=128), batch_size=8)


class Program:
    def cost(self):
        return Cost(3e12, 40e9)

    def collectives(self):
        return Counter({"all-reduce": 10**9, "all-gather": 10**8})


@pytest.mark.parametrize(
    ("chip", "count", "times"),
    [
        # 3e12 / 1e14; 40e9 / 1e12; (2 x 1e9 + 1e8) x 3/4 / 1e11
        (Chip(1e14, None, 1e12, 1e11), 4, {"arithmetic": 30.0, "memory": 40.0, "links": 15.75}),
        (Chip(1e13, None, 1e12, 1e11), 4, {"arithmetic": 300.0, "memory": 40.0, "links": 15.75}),
        (Chip(1e14, None, 1e12, 1e11), 1, {"arithmetic": 30.0, "memory": 40.0}),
        (Chip(1e14), 4, {"arithmetic": 30.0}),
    ],
)
def test_the_slowest_part_bounds_a_step(capsys, chip, count, times):
    dry_run.print_bound(CONFIG, Program(), chip, count)
    step, best = capsys.readouterr().out.splitlines()
    assert step == (
        "a step     3.00 TFLOP, 40.0 GB read and written, all-reduce 1.00 GB, all-gather 0.10 GB"
        " (each device)"
    )
    slowest = max(times, key=times.get)
    rate = 8 * 100 / count / (times[slowest] / 1000)
    mfu = rate * CONFIG.model.flops_per_token() / chip.flops
    listed = ", ".join(f"{name} {value:.1f} ms" for name, value in times.items())
    expected = f"{listed}: {slowest} bounds it; {rate:,.0f} tokens/s a device, MFU {mfu:.1%}"
    assert best.removeprefix("at best    ") == expected
