"""metrics.jsonl across resumes and crashes; the clock; plain lines."""

import json
import time

import pytest

from gptjax import metrics
from gptjax.errors import RunError, UserError


def row(step, **other):
    return {"step": step, "train_loss": 2.0, "seconds": float(step)} | other


def test_rows_have_every_field_and_nothing_else(tmp_path):
    log = metrics.Log(tmp_path / "metrics.jsonl", 0)
    log.append(row(1, secret=3))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert list(json.loads(line)) == [
        "step", "train_loss", "val_loss", "learning_rate", "grad_norm", "tokens_per_second",
        "seconds",
    ]  # fmt: skip


def test_a_resume_drops_the_rows_that_come_again_and_goes_on_counting_time(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = metrics.Log(path, 0)
    for step in (10, 20, 30):
        log.append(row(step))
    resumed = metrics.Log(path, 20)
    assert resumed.seconds == 20.0
    resumed.append(row(30, train_loss=1.0))
    assert [(r["step"], r["train_loss"]) for r in metrics.read(path)] == [
        (10, 2.0), (20, 2.0), (30, 1.0),
    ]  # fmt: skip


def test_a_run_killed_before_its_first_checkpoint_starts_its_log_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics.Log(path, None).append(row(0))
    metrics.Log(path, None).append(row(0))
    assert len(metrics.read(path)) == 1


def test_a_line_cut_short_by_a_crash_is_left_out_but_damage_elsewhere_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row(1)) + "\n" + '{"step": 2, "tr')
    assert [r["step"] for r in metrics.read(path)] == [1]
    for bad in ('{"step"', '{"step": "1"}', '{"step": true}', "[]", '{"step": 1, "seconds": "x"}'):
        path.write_text(bad + "\n" + json.dumps(row(1)) + "\n")
        with pytest.raises(UserError, match="line 1 is damaged"):
            metrics.read(path)


def test_a_log_that_cannot_be_written_is_one_clear_line(tmp_path):
    log = metrics.Log(tmp_path / "metrics.jsonl", 0)
    log._path = tmp_path / "gone" / "metrics.jsonl"
    with pytest.raises(RunError, match=r"cannot write .*gone"):
        log.append(row(1))


def test_evaluation_time_does_not_count_as_training_time():
    clock = metrics.StepClock(100.0, 0)
    with clock.paused():
        time.sleep(0.2)
    time.sleep(0.05)
    rate = clock.steps_per_second(10)
    assert 100.05 <= clock.seconds() < 100.2
    assert 10 / 0.2 < rate <= 10 / 0.05
    assert clock.steps_per_second(10) is None


def test_outside_a_terminal_progress_is_plain_lines(capsys):
    with metrics.Display(total=100, done=0, visible=True) as display:
        numbers = {"train_loss": 1.5, "learning_rate": 1e-3, "grad_norm": 0.25}
        display.progress(numbers | {"step": 50, "tokens_per_second": 1234.5}, 0.4567, 75)
        display.say("[not markup]")
    assert capsys.readouterr().out == (
        "step 50/100 | loss 1.5000 | lr 1.00e-03 | grad norm 0.25 | 1,234 tokens/s | MFU 45.7%"
        " | 1m15s left\n[not markup]\n"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (75, "1m15s"), (7322, "2h02m")]
)
def test_clock(seconds, text):
    assert metrics.clock(seconds) == text
