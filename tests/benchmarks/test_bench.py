"""The benchmark: all sides do the same work, and the table says what was measured."""

import json
import os
import sys
import time
import types

import pytest
from helpers import ROOT, assert_one_clear_line

from benchmarks import bench, ours, worker
from benchmarks.worker import Job
from gptjax.config import ModelConfig, TrainConfig
from gptjax.data import token_files
from gptjax.errors import RunError, UserError
from gptjax.runtime_config import RuntimeConfig

BENCH = ROOT / "benchmarks" / "bench.py"
TINY = """from gptjax.config import *
config = TrainConfig(
    ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=11, dropout=0.1),
    batch_size=4,
)
"""
QUICK = "--config tiny.py --seconds 0 --least-rounds 1 --turn-seconds 0.01".split()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    (tmp_path / "tiny.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)


def job(side="gptjax", mode="train", **more) -> Job:
    runtime = RuntimeConfig(num_devices=more.pop("num_devices", None))
    return Job(side, mode, TrainConfig(), runtime, more.pop("folder", ""), **more)


def measured(command, tmp_path, *arguments: str) -> list[dict]:
    """The rows of a real measurement, whose table was printed."""
    result = command(*arguments, *QUICK, "--json", "out.json")
    assert result.returncode == 0 and not result.stderr, result.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert result.stdout.splitlines() == bench.table(report)
    for row in report["rows"]:
        assert row["turns"] >= 1 and row["peak_resident_bytes"] > 50e6
        assert row["page_faults_per_unit"] >= 0 and 0 <= row["system_time_share"] <= 1
    return report["rows"]


def test_training_is_measured_by_itself(command, tmp_path, tiny):
    (row,) = measured(command, tmp_path, BENCH, "train", "--against", "none")
    assert row["side"] == "gptjax" and row["gptjax_is_faster_by"] == [1.0, 1.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "flags", "sides"),
    [
        pytest.param(
            "train",
            "--gradient-accumulation-steps 2",
            ["gptjax", "torch", "torch.compile"],
            marks=pytest.mark.long,
        ),
        ("generate", "--max-new-tokens 20", ["gptjax", "torch"]),
        (
            "generate",
            "--max-new-tokens 15 --num-samples 2 --against hf",
            ["gptjax", "hf with cache"],
        ),
        pytest.param("startup", "", ["gptjax", "gptjax, cold", "torch"], marks=pytest.mark.long),
    ],
)
def test_every_mode_measures_every_side(command, tmp_path, tiny, mode, flags, sides):
    pytest.importorskip("torch", reason="needs PyTorch")
    rows = measured(command, tmp_path, "-m", "gptjax", "bench", mode, *flags.split())
    assert [row["side"] for row in rows] == sides


@pytest.mark.slow
def test_scaling_divides_the_batch_of_a_cpu(command, tmp_path, tiny):
    rows = measured(command, tmp_path, BENCH, "scaling")
    assert [row["device_count"] for row in rows][:2] == [1, 2]
    assert rows[0]["speedup"] == 1.0


def test_the_loop_is_held_between_turns():
    pauses: list[int] = []
    rows = iter(range(9))

    def turns():
        for units in (1, 3, 2, 100):
            pauses.append(row)
            yield units

    callback = ours.TakeTurns(turns())
    for row in rows:  # row 0 is the first evaluation's
        callback.on_step(types.SimpleNamespace(state=()), {"step": row})
    assert pauses == [0, 1, 4, 6]


def test_a_turn_reports_what_was_used_in_it():
    sent = []

    class Pipe:
        send = staticmethod(sent.append)
        recv = staticmethod(iter([5, 2]).__next__)

    turns = worker.Turns(Pipe(), lambda: {"fact": len(sent)})
    assert next(turns) == 5
    held = b"x" * (64 << 20)
    assert next(turns) == 2
    ready, first = sent
    assert (ready["fact"], first["fact"]) == (0, 1)
    assert first["resident"] >= len(held) and first["page_faults"] > 0
    assert first["seconds"] > 0 and first["user"] + first["system"] > 0


def test_the_data_set_opens_with_its_tokens(tmp_path):
    bench.write_data(tmp_path / "data", 70_000)
    found = token_files.load(tmp_path / "data")
    assert (len(found.train), len(found.val)) == (1_000_000, 100_000)
    assert found.tokenizer.n_vocab == 70_000 and found.train[:50_000].max() > 65_536


def test_the_parent_loads_neither_jax_nor_pytorch(command):
    check = "import sys, benchmarks.bench; sys.exit(len({'jax', 'torch'} & {*sys.modules}))"
    result = command("-c", check)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_side_that_fails_is_named_in_one_line(command, tiny):
    result = command(BENCH, "train", *QUICK, "--device", "tpu")
    assert_one_clear_line(result, "the gptjax side failed", "JAX finds no tpu here", code=1)


def test_bad_flags_are_refused_in_one_line(command):
    result = command(BENCH, "train", "--batch-size", "0", "--speed", "3")
    assert_one_clear_line(result, "batch_size 0 must be at least 1", "unknown flag --speed")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("walk", "cannot measure 'walk'; expected .*generate"),
        ("train --against hf", "--against hf is for generate"),
        ("generate --config tiny.py --against hf", "--max-new-tokens 500 must be at most"),
        ("train --seconds -1", "seconds -1.0 is outside"),
        ("train --config nope.py", "no config file nope.py"),
        ("train --config tiny.py --batch-size 3 --gradient-accumulation-steps 2", "not divide"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny, arguments, words):
    with pytest.raises(UserError, match=words):
        bench.main(arguments.split())


def test_a_report_that_cannot_be_written_is_refused_first(tiny, capsys):
    with pytest.raises(OSError, match="no/such/folder"):
        bench.main(["train", *QUICK, "--json", "no/such/folder"])
    assert not capsys.readouterr().out


def test_several_hosts_are_refused(tiny, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    with pytest.raises(UserError, match="one machine"):
        bench.main(["train", *QUICK])


def test_a_side_that_is_too_slow_ends_with_the_call(tmp_path):
    with pytest.raises(RunError, match="the torch side did not finish within"):
        bench.Worker(job("torch", folder=str(tmp_path)), deadline=time.monotonic())


def test_all_sides_see_the_same_allowed_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    for side in ("gptjax", "torch"):
        assert bench.visible_devices(job(side, compared=True))["CUDA_VISIBLE_DEVICES"] == "4"
    two = job("gptjax x 2", "scaling", num_devices=2)
    assert bench.visible_devices(two)["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert bench.visible_devices(job()) == {}


def test_a_process_is_measured_to_its_end(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"hold = bytearray(300 << 20); print({worker.FIRST_STEP!r}, flush=True)\n"
        "import time; time.sleep(0.2)"
    )
    found = bench.time_process("one", [sys.executable, str(script)], {})
    assert 0 < found["seconds"] < found["whole"]
    assert found["resident"] > 300 << 20 and found["page_faults"] > 0
    script.write_text("raise SystemExit('lost')")
    with pytest.raises(RunError, match="the one side failed: exit code 1: lost"):
        bench.time_process("one", [sys.executable, str(script)], os.environ.copy())


def test_a_row_is_of_medians_and_ratios_round_by_round():
    def costs(*seconds: float, system: float = 0.0) -> list[dict[str, float]]:
        rest = {"user": 1 - system, "system": system, "page_faults": 7, "resident": 100}
        return [{"seconds": s} | rest for s in seconds]

    row = bench.row("torch", costs(5, 1, 2, 4, 3, system=0.25), costs(1, 1, 1, 1, 2))
    assert row == {
        "side": "torch",
        "seconds": [2, 3, 4],
        "gptjax_is_faster_by": [1.5, 2, 4],
        "page_faults_per_unit": 7,
        "system_time_share": 0.25,
        "peak_resident_bytes": 100,
        "turns": 5,
    }
    assert bench.quartiles([7.0]) == [7.0, 7.0, 7.0]


def test_the_tables_columns_are_aligned():
    row = {
        "tokens_per_second": [900.0, 1234.0, 2000.0], "mfu": 0.25, "compile_seconds": 1.0,
        "peak_device_bytes": None, "peak_resident_bytes": 5e8, "page_faults_per_unit": 44_500.0,
        "system_time_share": 0.4, "gptjax_is_faster_by": [1.0, 1.5, 2.0],
    }  # fmt: skip
    report = {
        "mode": "train", "machine": "m", "setting": "s", "sides": {},
        "rows": [row | {"side": "gptjax"}, row | {"side": "torch.compile", "compile_seconds": 99}],
    }  # fmt: skip
    titles, first, second = bench.table(report)[2:]
    assert len({len(titles), len(first), len(second)}) == 1
    for title, cell in {
        "tokens/s": "1.23k", "memory": "500MB", "faults/step": "44.5k", "system time": "40.0%",
        "compile": "1.0 s", "gptjax is faster": "1.50x (1.00 to 2.00)",
    }.items():  # fmt: skip
        end = titles.index(title) + len(title)
        assert first[:end].endswith(cell)


def test_flags_change_the_configs_settings(tiny):
    words = "train --config tiny.py --block-size 8 --dropout 0 --batch-size 2 --remat"
    _, jobs = bench.settings([*words.split(), "--gradient-accumulation-steps", "2"], "")
    assert [job.side for job in jobs] == ["gptjax", "torch", "torch.compile"]
    for job in jobs:
        assert job.config.model == ModelConfig(2, 2, 16, block_size=8, vocab_size=11, dropout=0.0)
        assert job.config.batch_size == 2 and job.runtime.compute.remat and job.compared
        assert job.runtime.gradient_accumulation_steps == 2


def test_a_configs_accumulation_is_for_its_cluster():
    _, (job,) = bench.settings("scaling --config gpt2 --batch-size 2".split(), "")
    assert job.config.model.vocab_size == 50257 and not job.compared
    assert job.runtime.gradient_accumulation_steps == 1
