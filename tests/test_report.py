"""The loss curve: a real picture, or one clear line."""

import json

from conftest import assert_one_clear_line


def test_a_run_is_drawn_as_a_png(command, tmp_path):
    (tmp_path / "run").mkdir()
    rows = [{"step": s, "train_loss": 4 / (s + 1), "val_loss": None} for s in range(1, 50)]
    rows[10]["val_loss"] = 3.0
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = command("-m", "gptjax.report", "run")
    assert result.returncode == 0 and result.stdout == "drew run/loss.png\n" and not result.stderr
    picture = (tmp_path / "run" / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    both = command("-m", "gptjax.report", "run", "run", "--out", "both.svg")
    assert both.returncode == 0 and "<svg" in (tmp_path / "both.svg").read_text()


def test_no_run_or_no_picture_format_is_one_clear_line(command, tmp_path):
    assert_one_clear_line(command("-m", "gptjax.report"), "which run?")
    assert_one_clear_line(command("-m", "gptjax.report", "nope"), "nope/metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "train_loss": 2.0}))
    result = command("-m", "gptjax.report", ".", "--out", "x.foo")
    assert_one_clear_line(result, "cannot draw x.foo")
    result = command("-m", "gptjax.report", ".", "--out", "..")
    assert_one_clear_line(result, "it is a folder")
    (tmp_path / "metrics.jsonl").write_text("")
    assert_one_clear_line(command("-m", "gptjax.report", "."), "has no losses yet")
