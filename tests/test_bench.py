"""The benchmark: both sides do the same work, the table says what was measured."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_clear_line

from gptjax import bench, torch_gpt
from gptjax.bench import BenchFlags, Job, Spread
from gptjax.config import ModelConfig, TrainConfig
from gptjax.errors import RunError

TINY = """from gptjax.config import *
config = TrainConfig(
    ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=11, dropout=0.1),
    batch_size=4,
)
"""
QUICK = "--config tiny.py --seconds 0 --least-rounds 1 --turn-seconds 0.01".split()


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)


def run(command, mode, *flags, code=0):
    result = command("-m", "gptjax.bench", mode, *QUICK, *flags, "--json", "out.json")
    assert result.returncode == code, result.stderr
    return result


@pytest.mark.parametrize(
    ("mode", "flags", "sides"),
    [
        ("train", [], ["gptjax", "torch", "torch.compile"]),
        ("train", ["--gradient-accumulation-steps", "2", "--against", "none"], ["gptjax"]),
        ("generate", ["--max-new-tokens", "20"], ["gptjax", "torch"]),
        (
            "generate",
            ["--max-new-tokens", "15", "--num-samples", "2", "--against", "hf"],
            ["gptjax", "hf with cache"],
        ),
        ("startup", [], ["gptjax", "gptjax, cold", "torch"]),
    ],
)
def test_every_mode_measures_every_side_and_prints_what_it_wrote(
    command, tmp_path, tiny, mode, flags, sides
):
    result = run(command, mode, *flags)
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["side"] for row in report["rows"]] == sides
    assert all(row["turns"] >= 1 and row["peak_resident_bytes"] > 50e6 for row in report["rows"])
    assert report["rows"][0]["gptjax_is_faster_by"] == {"low": 1.0, "median": 1.0, "high": 1.0}
    assert result.stdout.splitlines() == bench.table(report)


def test_scaling_shares_the_batch_of_a_cpu_between_its_devices(command, tmp_path, tiny):
    run(command, "scaling")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["devices"] for row in rows][:2] == ["1 x cpu", "2 x cpu"]
    assert rows[0]["speedup"] == 1.0


def test_a_side_that_fails_is_named_in_one_line(command, tmp_path, tiny):
    result = run(command, "train", "--device", "tpu", code=1)
    assert_one_clear_line(result, "the gptjax side ended", "JAX finds no tpu here", code=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["walk"], "train|generate|startup|scaling"),
        (["train", "--against", "hf"], "--against hf is for generate"),
        ("generate --config tiny.py --against hf".split(), "--max-new-tokens 500 must be at most"),
        (["train", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["train", "--config", "nope.py"], "no config file nope.py"),
        ("train --config tiny.py --batch-size 3 --gradient-accumulation-steps 2".split(), "divide"),
    ],
)
def test_bad_flags_are_refused_in_one_line(command, tiny, arguments, words):
    result = command("-m", "gptjax.bench", *arguments)
    assert_one_clear_line(result, words, code=2)


def test_a_report_that_cannot_be_written_is_refused_before_the_measurement(command, tiny):
    result = command("-m", "gptjax.bench", "train", *QUICK, "--json", "no/such/folder")
    assert_one_clear_line(result, "no/such/folder", code=1)
    assert not result.stdout


def test_several_hosts_are_refused(command, tiny):
    result = command("-m", "gptjax.bench", "train", *QUICK, JAX_COORDINATOR_ADDRESS="host:1")
    assert_one_clear_line(result, "one machine", code=2)


def test_a_side_that_never_answers_ends_with_the_call(monkeypatch, tmp_path):
    silent = tmp_path / "silent.py"
    silent.write_text("import time; time.sleep(60)")
    real = bench.subprocess.Popen
    monkeypatch.setattr(
        bench.subprocess, "Popen", lambda _, **more: real([bench.sys.executable, silent], **more)
    )
    with pytest.raises(RunError, match="was not done within"):
        bench.Worker(Job("torch", "train", TrainConfig()), bench.time.monotonic() + 0.5)


def test_both_sides_see_the_same_gpu_of_those_that_the_user_may_use(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    for side in ("gptjax", "torch"):
        job = Job(side, "train", TrainConfig(), against=True)
        assert bench.visible(job)["CUDA_VISIBLE_DEVICES"] == "4"
    two = Job("gptjax x 2", "scaling", TrainConfig(), devices=2)
    assert bench.visible(two)["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert bench.visible(Job("gptjax", "train", TrainConfig())) == {}


def test_a_job_survives_the_way_to_its_worker():
    job = Job("torch", "train", TrainConfig(ModelConfig(vocab_size=5)), samples=3)
    assert Job.from_json(job.to_json()) == job


def test_the_spread_is_the_median_with_its_quartiles():
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)
    assert Spread.of([7.0]) == (7.0, 7.0, 7.0)


def test_a_process_is_watched_to_its_end(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import time; hold = bytearray(300 << 20); print({bench.FIRST_STEP!r}, flush=True)\n"
        "time.sleep(0.5)\n"
    )
    start = bench.watch("one", [bench.sys.executable, str(script)], {})
    assert start.whole - start.first_step > 0.5 and start.resident > 300 << 20
    script.write_text("raise SystemExit('lost')")
    with pytest.raises(RunError, match=r"exit code 1: lost"):
        bench.watch("one", [bench.sys.executable, str(script)], {})


# PyTorch's side has to be the model that it is said to be.
MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=11)


def test_pytorchs_fused_attention_is_the_formula():
    torch.manual_seed(0)
    plain, fused = (torch_gpt.TorchGPT(MODEL, fused=f) for f in (False, True))
    torch_gpt.initialise(plain)
    fused.load_state_dict(plain.state_dict())
    tokens = torch.randint(11, (2, 16))
    expected = plain(tokens)
    torch.testing.assert_close(fused(tokens), expected)
    torch.testing.assert_close(fused(tokens, last_only=True), expected[:, -1:])


def test_pytorchs_dropout_acts_in_training_only():
    torch.manual_seed(0)
    tokens = torch.randint(11, (2, 16))
    for fused in (False, True):
        model = torch_gpt.TorchGPT(dataclasses.replace(MODEL, dropout=0.5), fused=fused)
        torch_gpt.initialise(model)
        quiet = model.eval()(tokens)
        assert torch.equal(quiet, model(tokens))
        assert not torch.equal(quiet, model.train()(tokens))


def test_pytorch_starts_from_gpt2s_initialisation():
    model = torch_gpt.TorchGPT(dataclasses.replace(MODEL, n_embd=256, vocab_size=500))
    torch_gpt.initialise(model)
    stds = {name: p.std().item() for name, p in model.named_parameters() if p.ndim == 2}
    expected = {n: 0.02 / np.sqrt(4) if "c_proj" in n else 0.02 for n in stds}
    assert stds == pytest.approx(expected, rel=0.05)


def test_flags_change_the_configs_model(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    flags = BenchFlags(config=str(tmp_path / "tiny.py"), block_size=8, dropout=0.0, batch_size=2)
    config = bench.settings(flags)
    assert (config.model.block_size, config.model.dropout, config.batch_size) == (8, 0.0, 2)
    flags = BenchFlags(config=str(ROOT / "configs" / "gpt2.py"))
    assert bench.settings(flags).model.vocab_size == 50257
