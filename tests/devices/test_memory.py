"""The memory of a step, before it is run."""

import dataclasses
import types
from typing import ClassVar

import jax
import pytest
from helpers import TRAIN, assert_one_clear_line

import gptjax
from gptjax.config import PRESETS, ModelConfig, TrainConfig
from gptjax.devices import dry_run, memory
from gptjax.errors import RunError
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


def test_a_dry_run_says_whether_each_device_has_enough(capsys):
    config = TrainConfig(ModelConfig(0, 4, 64, block_size=32, vocab_size=96), batch_size=8)
    dry_run.print_needs(config, RuntimeConfig(device_memory=1, strategy="fsdp"), jax.devices())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "model      8,192 parameters, batch 8 x 32"  # (96 + 32) x 64
    assert lines[1].startswith("devices    8 x cpu, fsdp, computing in float32; compiled in")
    assert lines[2].startswith("each       0.00 GiB for the state,")
    assert lines[3] == "it fits: each device needs 0.00 GiB of 1.00 GiB (--device-memory)"
    with pytest.raises(RunError, match=r"it does not fit: each device needs 0\.00 GiB of 0\.00"):
        dry_run.print_needs(config, RuntimeConfig(device_memory=1e-5), jax.devices())


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
    found = float(result.stdout.split("each       ")[1].split(" GiB")[0])
    assert found == pytest.approx(state, rel=0.03, abs=0.011)
    assert not list(tmp_path.iterdir())  # no data, no run


@pytest.mark.slow
def test_what_does_not_fit_is_said_before_the_run(command, tmp_path, text_file):
    flags = "--data.source text.txt --dry-run --device-memory 0.0001".split()
    result = command(TRAIN, *flags, "--run-dir", "run")
    assert_one_clear_line(result, "it does not fit", "of 0.00 GiB (--device-memory)", code=1)
    assert not (tmp_path / "run").exists()
