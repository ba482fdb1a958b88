"""The memory of a step, before it is run."""

import dataclasses
import types
from typing import ClassVar

import jax
import pytest
from helpers import TRAIN, assert_one_clear_line

import gptjax
from gptjax.config import PRESETS, ModelConfig, TrainConfig
from gptjax.devices import memory
from gptjax.runtime_config import ComputeConfig, RuntimeConfig

# What the sequences need outweighs the weights.
CONFIG = TrainConfig(ModelConfig(1, 4, 128, block_size=512, vocab_size=501), batch_size=8)


def needs_of(config, runtime):
    return memory.of_program(memory.compile_step(config, runtime))


@pytest.fixture(scope="module")
def needs():
    return {kind: needs_of(CONFIG, RuntimeConfig(strategy=kind)) for kind in ("pmap", "fsdp")}


@pytest.mark.parametrize(("strategy", "share"), [("pmap", 1), ("fsdp", 8)])
def test_the_state_takes_twelve_bytes_a_parameter(needs, strategy, share):
    need = needs[strategy]
    matrices = 12 * 128**2 + (501 + 512) * 128
    expected = 12 * (matrices / share + CONFIG.model.num_parameters() - matrices)
    assert need.state == pytest.approx(expected, rel=0.01, abs=4 * 512 + 100)  # and the batch
    assert need.peak == 2 * need.state + need.step


def test_fsdp_leaves_activations_where_their_sequences_are(needs):
    # Six times as much as with pmap, where XLA moves them to the weights.
    assert needs["fsdp"].step < 1.5 * needs["pmap"].step


@pytest.mark.slow
def test_fsdp_needs_less_of_each_device_for_everything():
    wide = dataclasses.replace(PRESETS["gpt2"], n_layer=4, block_size=128)
    config, compute = TrainConfig(wide, batch_size=8), ComputeConfig(remat=True)
    whole, shared = (
        needs_of(config, RuntimeConfig(strategy=kind, compute=compute)) for kind in ("pmap", "fsdp")
    )
    assert shared.state < whole.state / 7.9 and shared.step < whole.step / 1.4


@pytest.mark.parametrize(("strategy", "share"), [("pmap", 1), ("fsdp", 8)])
def test_memory_is_known_by_kind(strategy, share):
    """A loop of blocks that keep, for each token, their input, qkv, attention's output, the sum
    after it and the MLP's hidden layer: 10 C numbers."""
    config = TrainConfig(ModelConfig(3, 2, 64, block_size=32, vocab_size=96), batch_size=16)
    runtime = RuntimeConfig(strategy=strategy, compute=ComputeConfig(scan_unroll=1))
    found = memory.by_kind(config, runtime, jax.devices())
    model = config.model
    matrices = 3 * 12 * 64**2 + (96 + 32) * 64
    parameters = matrices / share + model.num_parameters() - matrices
    assert found["parameters"] == 4 * parameters
    assert found["optimizer"] == 8 * parameters + 4  # and a count
    kept = 4 * 64 * (3 * 10 * 64 + 2 * 64)  # two sequences; and what ln_f and the head need
    gradient_of_head = 4 * 96 * 64
    assert found["activations"] == pytest.approx(kept + gradient_of_head, rel=0.1)


def test_the_memory_of_a_cpu_is_shared_by_its_devices():
    size, source = memory.available(None)
    assert 0 < size < 2**50 and source == "this machine's free memory / 8"


def test_a_run_that_may_not_fit_is_warned_of(tiny, train_tiny, tmp_path):
    class Notes(gptjax.Callback):
        said: ClassVar = []

        def on_note(self, trainer, text):
            self.said.append(text)

    train_tiny(tiny.config, tmp_path / "fits", callbacks=[Notes()])
    assert not Notes.said
    parameters = tiny.config.model.replace(vocab_size=44).num_parameters()
    little = 2.5 * 12 * parameters / 2**30  # twice the state fits, but no activations
    train_tiny(tiny.config, tmp_path / "not", callbacks=[Notes()], device_memory=little)
    silent = types.SimpleNamespace(memory_analysis=lambda: None)  # some backends do not tell
    assert memory.shortage(silent, RuntimeConfig()) == ""
    (note,) = Notes.said
    assert note.startswith("warning: this may not fit: each device needs up to 0.00 GiB of 0.00")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "count", "state"),
    # Weights and two moments in float32: 12 bytes times 1.558e9, 1.285e10 parameters.
    [("gpt2_xl", 8, 2.18), ("gpt2_xl", 64, 0.27), ("gpt3_13b", 8, 17.96), ("gpt3_13b", 64, 2.24)],
)
def test_the_large_configs_compile_and_fit(command, tmp_path, config, count, state):
    flags = f"--dry-run --device cpu --num-devices {count} --device-memory 95".split()
    result = command(TRAIN, config, *flags)
    assert result.returncode == 0 and "it fits: each device needs" in result.stdout, result.stderr
    found = float(result.stdout.split(" GiB more while")[0].split("; ")[-1])
    assert found == pytest.approx(state, rel=0.03, abs=0.011)
    assert not list(tmp_path.iterdir())  # no data, no run


@pytest.mark.slow
def test_what_does_not_fit_is_said_before_the_run(command, tmp_path, text_file):
    flags = "--data.source text.txt --dry-run --device-memory 0.0001".split()
    result = command(TRAIN, *flags, "--run-dir", "run")
    assert_one_clear_line(result, "it does not fit", "of 0.00 GiB (--device-memory)", code=1)
    assert not (tmp_path / "run").exists()
