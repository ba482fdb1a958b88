"""metrics.jsonl: one whole line a row, through resumes, crashes and damage."""

import json
import types
from pathlib import Path

import fuzz
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax import config_io, metrics, run_logs
from gptjax.config import TrainConfig
from gptjax.errors import RunError, UserError
from gptjax.metrics import MetricsLog
from gptjax.runtime_config import RuntimeConfig


def row(step, **other):
    return {"step": step, "train_loss": 2.0, "seconds": float(step)} | other


def log_at(run_dir: Path, step: int = 0, unfinished: dict | None = None) -> MetricsLog:
    """The log of a run that starts at `step` and saves every 10 steps."""
    trainer = types.SimpleNamespace(
        runtime=RuntimeConfig(eval_interval=10),
        checkpoints=types.SimpleNamespace(run_dir=run_dir, directory=run_dir),
        start=types.SimpleNamespace(step=step, unfinished=unfinished),
    )
    log = MetricsLog()
    log.on_start(trainer)
    return log


def write(log: MetricsLog, *rows: dict) -> None:
    for each in rows:
        log.on_step(None, each)


def test_rows_have_every_field_and_nothing_else(tmp_path):
    write(log_at(tmp_path), row(1, secret=3), {"step": 2, "train_loss": 1.0})
    # A row without seconds is of a step that is not reported.
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert list(json.loads(line)) == [
        "step", "train_loss", "val_loss", "learning_rate", "grad_norm", "tokens_per_second",
        "seconds", "time", "goodput",
    ]  # fmt: skip
    assert run_logs.read_metrics(tmp_path / "metrics.jsonl")[0]["learning_rate"] is None


def test_a_resume_drops_rows_that_come_again_and_adds_up_time(tmp_path):
    write(log_at(tmp_path), row(10), row(20), row(30))
    write(log_at(tmp_path, 20), row(30, train_loss=1.0, seconds=5.0))
    found = [(r["step"], r["train_loss"], r["seconds"]) for r in run_logs.read_metrics(
        tmp_path / "metrics.jsonl")]  # fmt: skip
    assert found == [(10, 2.0, 10.0), (20, 2.0, 20.0), (30, 1.0, 25.0)]


def test_goodput_is_the_share_of_time_that_trained(tmp_path, monkeypatch):
    now = iter([1000.0, 1100.0, 1400.0, 1600.0])
    monkeypatch.setattr(metrics.time, "time", lambda: next(now))
    write(log_at(tmp_path), row(0, seconds=0.0), row(10, seconds=80.0), row(20, seconds=90.0))
    # 300 s later, from step 10 on: what came after it is lost.
    write(log_at(tmp_path, 10), row(20, seconds=100.0))
    found = [(r["time"], r["goodput"]) for r in run_logs.read_metrics(tmp_path / "metrics.jsonl")]
    assert found == [(1000.0, None), (1100.0, 0.8), (1600.0, (80 + 100) / 600)]


def test_the_goodput_of_an_older_version_s_run_is_not_known(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "seconds": 3600.0}\n')
    write(log_at(tmp_path, 10), row(20), row(30))
    assert [r["goodput"] for r in run_logs.read_metrics(tmp_path / "metrics.jsonl")] == [None] * 3


def test_a_run_that_has_lost_its_checkpoints_is_refused(tmp_path):
    write(log_at(tmp_path), row(10), row(20))
    log_at(tmp_path)  # it may have been killed before the first checkpoint was complete
    write(log_at(tmp_path), row(10), row(20), row(21))
    content = (tmp_path / "metrics.before.jsonl").read_text()
    assert [json.loads(line)["step"] for line in content.splitlines()] == [10, 20]
    content = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"trained to step 21, .* but it has no checkpoint"):
        log_at(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content
    # The intervals that count are those of the run.
    config_io.save_run_settings(tmp_path / "config.json", TrainConfig(), RuntimeConfig())
    log_at(tmp_path)


def test_a_step_that_is_to_be_evaluated_again_loses_its_row(tmp_path):
    write(log_at(tmp_path), row(10), row(20))
    write(log_at(tmp_path, 20, unfinished=row(20)), row(20, val_loss=1.5, seconds=0.0))
    found = [(r["step"], r["val_loss"], r["seconds"]) for r in run_logs.read_metrics(
        tmp_path / "metrics.jsonl")]  # fmt: skip
    assert found == [(10, None, 10.0), (20, 1.5, 10.0)]


def test_a_run_without_a_checkpoint_starts_its_log_anew(tmp_path):
    write(log_at(tmp_path), row(0), row(1))
    write(log_at(tmp_path), row(0))
    assert len(run_logs.read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row(1)) + "\n" + '{"step": 2, "tr')
    assert [r["step"] for r in run_logs.read_metrics(path)] == [1]
    write(log_at(tmp_path, 1), row(2))
    assert [r["step"] for r in run_logs.read_metrics(path)] == [1, 2]


@pytest.mark.parametrize(
    "bad",
    ['{"step"', '{"step": "1"}', '{"step": true}', "[]", '{"step": 1, "seconds": "x"}', "{}",
     '{"step": 9223372036854775808}'],
)  # fmt: skip
def test_a_damaged_line_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row(1)) + "\n" + bad + "\n" + json.dumps(row(2)) + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is damaged; remove it"):
        run_logs.read_metrics(path)


def test_a_file_that_is_none_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*metrics.jsonl: No such file"):
        run_logs.read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(UserError, match=r"metrics.jsonl is not UTF-8 text"):
        run_logs.read_metrics(tmp_path / "metrics.jsonl")


def test_a_log_that_cannot_be_written_is_one_clear_line(tmp_path):
    log = log_at(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*metrics.jsonl: Is a directory"):
        write(log, row(1))


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(drawn=st.data())
def test_a_damaged_file_is_read_or_refused(tmp_path, drawn):
    path = tmp_path / "metrics.jsonl"
    whole = row(10, val_loss=None, learning_rate=1.5, grad_norm=1, tokens_per_second=2.5)
    path.write_bytes(drawn.draw(fuzz.damaged((json.dumps(whole) + "\n").encode() * 2)))
    rows = fuzz.read_or_refuse(lambda: run_logs.read_metrics(path), path)
    for found in rows or ():
        assert {name: f"{found.get(name) or 0:.2f}" for name in metrics.FIELDS}
