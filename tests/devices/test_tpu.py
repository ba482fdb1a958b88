"""By the TPU's own compiler, for slices that are not here."""

import re

import jax
import pytest
from helpers import GENERATE, TRAIN, assert_one_clear_line

from gptjax import config_io
from gptjax.config import DataConfig, ModelConfig, TrainConfig
from gptjax.devices import memory, roofline, setup, topology
from gptjax.runtime_config import ComputeConfig, RuntimeConfig

pytestmark = pytest.mark.tpu

MODEL = ModelConfig(4, 8, 512, block_size=128, vocab_size=512, dtype="bfloat16")


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


@pytest.mark.parametrize("name", ["v5e-8", "v5e-16", "v5p-16"])
@pytest.mark.parametrize("strategy", ["pmap", "shard_map", "fsdp"])
def test_what_a_step_sends_is_what_it_should(name, strategy):
    devices = len(topology.devices(name))
    sent = roofline.Program(compiled(name, strategy=strategy).as_text()).sent()
    share = (devices - 1) / devices
    if strategy != "fsdp":  # float32 gradients, of which a ring sends each number twice
        assert sent["all-reduce"] == pytest.approx(8 * MODEL.num_parameters() * share, rel=0.02)
        assert sent.total() < 1.01 * sent["all-reduce"]
        return
    blocks, outside = 4 * 12 * MODEL.n_embd**2, (512 + 128) * MODEL.n_embd
    # bfloat16 weights for the forward pass and again for the backward pass; float32 gradients.
    # Arrays lie in tiles: more is sent where a device's part does not fill them.
    assert sent["all-gather"] == pytest.approx((4 * blocks + 4 * outside) * share, rel=0.1)
    scattered = sent["reduce-scatter"] + sent["collective-permute"]
    assert scattered == pytest.approx((4 * blocks + 4 * outside) * share, rel=0.2)
    assert sent["all-reduce"] < 0.02 * sent.total()  # biases and norms


def test_muon_sends_each_matrix_twice_in_bfloat16():
    """To the device that orthogonalises it, and back; with the arithmetic shared out too."""
    devices, model = topology.devices("v5e-8"), MODEL.replace(n_layer=8)
    config = TrainConfig(model, batch_size=16)
    found = [
        roofline.Program(
            memory.compile_step(each, RuntimeConfig(strategy="fsdp"), devices).as_text()
        )
        for each in (config, config.replace({"optimizer.kind": "muon"}))
    ]
    adamw, muon = (program.sent() for program in found)
    share = 1 / 8 * 7 / 8
    assert muon["all-to-all"] == pytest.approx(2 * 2 * 8 * 12 * MODEL.n_embd**2 * share, rel=0.01)
    assert muon.total() - muon["all-to-all"] == pytest.approx(adamw.total(), rel=0.01)
    # 5 iterations for one layer: 4 square matrices and 2 that are 4 times as wide.
    products = 2 * MODEL.n_embd**3 * 5 * (4 * 3 + 2 * (4 + 1 + 4))
    more = found[1].cost().flops - found[0].cost().flops
    assert more == pytest.approx(products, rel=0.05)


def test_a_scanned_program_costs_what_the_unrolled_one_does():
    unrolled, scanned = (
        roofline.Program(
            compiled("v5e-1", compute=ComputeConfig(remat="none", scan_unroll=unroll)).as_text()
        ).cost()
        for unroll in (4, 1)
    )
    assert scanned.flops == pytest.approx(unrolled.flops, rel=0.01)


def test_attention_with_dropout_costs_what_it_does_without():
    without, dropped = (
        roofline.Program(
            memory.compile_step(
                TrainConfig(
                    MODEL.replace(n_layer=1, dropout=dropout, block_size=1024), batch_size=4
                ),
                RuntimeConfig(),
                topology.devices("v5e-1"),
            ).as_text()
        ).cost()
        for dropout in (0.0, 0.1)
    )
    assert dropped.flops == pytest.approx(without.flops, rel=0.01)
    assert dropped.bytes < 1.1 * without.bytes


def test_documents_are_kept_apart_within_the_kernel():
    """So a step costs what it does without, and no device holds all scores of a head."""
    plain, packed = (
        roofline.Program(
            memory.compile_step(
                TrainConfig(
                    MODEL.replace(n_layer=1, block_size=256),
                    DataConfig(tokenizer="gpt2", pack=pack),
                    batch_size=4,
                ),
                RuntimeConfig(),
                topology.devices("v5e-1"),
            ).as_text()
        ).cost()
        for pack in ("blocks", "documents")
    )
    assert packed.flops == pytest.approx(plain.flops, rel=0.01)
    assert packed.bytes < 1.1 * plain.bytes


TOO_LARGE = {("gpt2_xl", "pmap"), ("gpt3_13b", "pmap"), ("gpt3_13b", "fsdp")}
"""For 16 GiB, or 8 or 16 times 16."""


# All four combinations would take minutes more; docs/many-devices.md recommends the last line.
@pytest.mark.parametrize(
    ("config", "name", "strategy"),
    [(config, "v5e-8", "pmap") for config in config_io.shipped()]
    + [(config, "v5e-16", "fsdp") for config in config_io.shipped()]
    + [("gpt2_xl", "v5e-8", "fsdp")],
)
def test_every_config_compiles_for_a_host_and_a_pod(config, strategy, name):
    experiment, runtime = config_io.load_config(config)
    devices = topology.devices(name)
    model = setup.resolve_dtype(experiment.model, devices[0])
    model = model.replace(vocab_size=model.vocab_size or 96)
    runtime = runtime.replace(strategy=strategy)
    unit = len(devices) * runtime.gradient_accumulation_steps
    size = -(-experiment.batch_size // unit) * unit
    experiment = experiment.replace(model=model, batch_size=size)
    if (config, strategy) in TOO_LARGE:
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            memory.compile_step(experiment, runtime, devices)
        return
    program = memory.compile_step(experiment, runtime, devices)
    needs = memory.of_program(program)
    assert needs.state + needs.step < 16 * 2**30
    rows = runtime.divide_batch(experiment, len(devices)) * model.block_size
    if model.vocab_size > 1000:  # nor its gradient
        assert not re.search(rf"f32\[(\d+,)*{rows},{model.padded_vocab_size}\]", program.as_text())


def test_a_dry_run_says_what_bounds_training(command, text_file):
    flags = "quickstart --data.source text.txt --dry-run --topology v5e-8".split()
    result = command(TRAIN, *flags)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "8 x TPU v5 lite, pmap, computing in bfloat16; compiled in" in result.stdout
    assert "attention by splash (flash attention, in blocks of 128 x 128)" in result.stdout
    assert result.stdout.count("\nat best    arithmetic ") == 2  # a step, evaluating
    assert result.stdout.count("\nmost bytes ") == 5
    assert result.stdout.splitlines()[-1].endswith("of 16.00 GiB (TPU v5 lite)")


def test_a_dry_run_of_what_does_not_fit_is_an_error(command):
    flags = "gpt2_xl --strategy pmap --dry-run --topology v5e-8".split()
    result = command(TRAIN, *flags)
    assert_one_clear_line(result, "it does not fit: a step needs", "GiB, besides the", code=1)


@pytest.mark.parametrize("samples", [1, 16])
def test_a_token_costs_the_weights_and_the_cache_once(command, samples):
    flags = f"gpt2 --dry-run --topology v5e-1 --num-samples {samples}".split()
    result = command(GENERATE, *flags)
    assert result.returncode == 0 and not result.stderr, result.stderr
    found = re.search(r"([\d.]+) times the weights, keys and values", result.stdout)
    assert 0.9 < float(found[1]) < 1.1, result.stdout


def test_training_elsewhere_goes_on_without_a_word(command, text_file):
    flags = "--data.source text.txt --n-layer 1 --n-embd 16 --n-head 2 --block-size 16".split()
    steps = "--batch-size 4 --max-steps 2 --eval-batches 1 --run-dir run".split()
    result = command(TRAIN, *flags, *steps, JAX_PLATFORMS="")
    assert result.returncode == 0 and not result.stderr, result.stderr
