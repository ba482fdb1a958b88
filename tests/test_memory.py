"""Memory of a step, before it is run."""

import dataclasses

import pytest
from conftest import ROOT, assert_one_clear_line

from gptjax import memory
from gptjax.config import PRESETS, ModelConfig, ParallelConfig, TrainConfig

TRAIN = ROOT / "train_jax.py"
SMALL = ModelConfig(2, 2, 64, block_size=32, vocab_size=96)


def test_the_state_takes_twelve_bytes_a_parameter_or_its_share_of_them():
    for strategy, share in (("pmap", 1), ("fsdp", 8)):
        config = TrainConfig(model=SMALL, batch_size=8, parallel=ParallelConfig(strategy))
        found = memory.need(config)
        matrices = 2 * 12 * 64**2 + (96 + 32) * 64
        expected = 12 * (matrices / share + SMALL.num_parameters() - matrices)
        assert found.state == pytest.approx(expected, rel=0.01)
        assert found.peak == found.state + found.step + found.saving


def test_fsdp_takes_less_of_each_device_for_everything():
    wide = dataclasses.replace(PRESETS["gpt2"], n_layer=4, remat=True, block_size=128)
    whole, shared = (
        memory.need(TrainConfig(model=wide, batch_size=8, parallel=ParallelConfig(kind)))
        for kind in ("pmap", "fsdp")
    )
    assert shared.state < whole.state / 7.9 and shared.step < whole.step / 1.4


@pytest.mark.parametrize(
    ("config", "count", "state"),
    # Weights and two moments in float32: 12 bytes times 1.558e9, 1.285e10 parameters.
    [("gpt2_xl", 8, 2.18), ("gpt2_xl", 64, 0.27), ("gpt3_13b", 8, 17.96), ("gpt3_13b", 64, 2.24)],
)
def test_the_large_configs_compile_ahead_of_time_and_fit(command, tmp_path, config, count, state):
    flags = f"--dry-run --device cpu --num-devices {count} --device-memory 95".split()
    result = command(TRAIN, ROOT / "configs" / f"{config}.py", *flags)
    assert result.returncode == 0 and "it fits: each device needs" in result.stdout, result.stderr
    found = float(result.stdout.split("each       ")[1].split(" GiB")[0])
    assert found == pytest.approx(state, rel=0.03, abs=0.011)
    assert not list(tmp_path.iterdir())  # no data, no run


def test_what_does_not_fit_is_said_before_the_run(command, tmp_path, text_file):
    flags = "--data.source text.txt --dry-run --device-memory 0.0001".split()
    result = command(TRAIN, *flags, "--run-dir", "run")
    assert_one_clear_line(result, "it does not fit", "of 0.00 GiB (--device-memory)", code=1)
    assert not (tmp_path / "run").exists()
