"""By the TPU's own compiler, for slices that are not here."""

import dataclasses

import pytest
from helpers import TRAIN

from gptjax.config import ModelConfig, TrainConfig
from gptjax.devices import memory, roofline, topology
from gptjax.runtime_config import ComputeConfig, RuntimeConfig

pytestmark = pytest.mark.tpu

MODEL = ModelConfig(4, 2, 128, block_size=128, vocab_size=512, dtype="bfloat16")


def compiled(name, **runtime):
    devices = topology.devices(name)
    config = TrainConfig(MODEL, batch_size=2 * len(devices))
    return memory.compile_step(config, RuntimeConfig(**runtime), devices)


@pytest.mark.parametrize("name", ["v5e-1", "v5e-8", "v5e-16", "v4-16", "v5p-16", "v6e-8"])
def test_a_slice_has_its_chips_on_its_hosts(name):
    kinds = {"v5e": "TPU v5 lite", "v4": "TPU v4", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
    # v5e and v6e count chips; so far libtpu gives v4's two cores apart.
    counts = {"v5e-1": 1, "v5e-8": 8, "v5e-16": 16, "v4-16": 16, "v5p-16": 8, "v6e-8": 8}
    found = topology.devices(name)
    assert len(found) == counts[name]
    assert {device.device_kind for device in found} == {kinds[name.split("-")[0]]}
    hosts = {"v5e-16": 4, "v4-16": 2, "v5p-16": 2}
    assert len({device.process_index for device in found}) == hosts.get(name, 1)


@pytest.mark.parametrize("name", ["v5e-8", "v5e-16"])
@pytest.mark.parametrize("strategy", ["pmap", "fsdp"])
def test_a_step_compiles_for_one_host_and_several(name, strategy):
    program = compiled(name, strategy=strategy)
    found = memory.of_program(program)
    assert 0 < found.peak < 2**30
    sent = roofline.Program(program.as_text()).collectives()
    size = 4 * dataclasses.replace(MODEL).num_parameters()
    if strategy == "pmap":
        assert sent["all-reduce"] == pytest.approx(size, rel=0.02)
    else:
        # bfloat16 matrices, gathered for the forward pass and again for the backward pass.
        blocks = 4 * 12 * MODEL.n_embd**2 * 2
        assert 1.7 * blocks < sent["all-gather"] < 4 * blocks


def test_a_scanned_program_costs_what_the_unrolled_one_does():
    unrolled, scanned = (
        roofline.Program(
            compiled("v5e-1", compute=ComputeConfig(remat="none", scan_unroll=unroll)).as_text()
        ).cost()
        for unroll in (4, 1)
    )
    assert scanned.flops == pytest.approx(unrolled.flops, rel=0.01)


def test_a_dry_run_says_what_bounds_the_step(command, text_file):
    flags = "quickstart --data.source text.txt --dry-run --topology v5e-8".split()
    result = command(TRAIN, *flags)
    assert result.returncode == 0 and not result.stderr, result.stderr
    lines = result.stdout.splitlines()
    assert "8 x TPU v5 lite, pmap, computing in bfloat16; compiled in" in result.stdout
    assert any(line.startswith("at best    arithmetic ") for line in lines)
    assert lines[-1].endswith("of 16.00 GiB (TPU v5 lite)")


def test_training_elsewhere_goes_on_without_a_word(command, text_file):
    flags = "--data.source text.txt --n-layer 1 --n-embd 16 --n-head 2 --block-size 16".split()
    steps = "--batch-size 4 --max-steps 2 --eval-batches 1 --run-dir run".split()
    result = command(TRAIN, *flags, *steps, JAX_PLATFORMS="")
    assert result.returncode == 0 and not result.stderr, result.stderr
