"""A run's page: what was logged, and nothing compared that cannot be."""

import json

import pytest

from gptjax import config_io
from gptjax.config import TrainConfig
from gptjax.errors import UserError
from gptjax.runtime_config import RuntimeConfig
from gptjax.viz import report

pytest.importorskip("plotly", reason="reports need plotly")


def make_run(folder, *, steps=40, tokenizer="char, 65 ids (aa)", rate=1e-3, bytes_per_token=1.0):
    folder.mkdir(parents=True)
    rows = [
        {"step": s, "train_loss": None if s == 0 else 4 / s, "val_loss": None, "seconds": s / 2}
        for s in range(steps + 1)
    ]
    for s in range(0, steps + 1, 10):
        rows[s]["val_loss"] = 5.0 - s / 10
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = TrainConfig().replace(
        {"optimizer.learning_rate": rate, "model.vocab_size": 65, "model.block_size": 32}
    )
    config_io.save_run_settings(folder / "config.json", config, RuntimeConfig(run_dir=str(folder)))
    start = {"event": "start", "step": 0, "time": 1.7e9, "tokenizer": tokenizer}
    start |= {"bytes_per_token": bytes_per_token, "machine": "<b>", "devices": "1 x cpu"}
    sample = {"event": "sample", "step": 10, "time": 1.7e9, "text": "</script><b>\u00e9"}
    again = sample | {"step": 10, "text": "taken again"}
    events = [start, sample, again, start | {"step": 20}]
    (folder / "history.jsonl").write_text("\n".join(map(json.dumps, events)))
    return folder


def test_a_page_holds_what_was_logged(tmp_path):
    gathered = report.gather([make_run(tmp_path / "run")])
    (run,) = gathered["runs"]
    assert run["best"] == {"step": 40, "val_loss": 1.0} and run["last"] == 40
    assert run["rows"]["train_loss"][:3] == [None, 4.0, 2.0]
    assert run["samples"] == [(10, "taken again")]
    assert [start["step"] for start in run["starts"]] == [0, 20]
    assert run["tokens_per_step"] == 12 * 32
    page = report.to_html(gathered)
    data = page.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["runs"][0]["rows"] == run["rows"]


def test_every_setting_stands_beside_its_default(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", rate=2e-3)]
    settings = {name: values for name, *values in report.gather(runs)["settings"]}
    assert settings["optimizer.learning_rate"] == ["0.001", "0.001", "0.002"]
    assert settings["model.block_size"] == ["1024", "32", "32"] and "run_dir" not in settings


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")]
    assert [run["name"] for run in report.gather(runs)["runs"]] == [str(path) for path in runs]


@pytest.mark.parametrize(
    ("tokenizer", "same"),
    [("char, 65 ids (aa)", True), ("char, 65 ids (bb)", False), ("gpt2, 50,257 ids (bb)", False),
     (None, True)],
)  # fmt: skip
def test_different_tokenizers_are_noticed_as_far_as_they_are_known(tmp_path, tokenizer, same):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", tokenizer=tokenizer)]
    if tokenizer is None:  # of a run from before there was a history
        (runs[1] / "history.jsonl").unlink()
    assert report.gather(runs)["same_tokens"] is same


def test_numbers_that_are_none_are_left_out(tmp_path):
    folder = make_run(tmp_path / "run")
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    rows[3] = '{"step": 3, "train_loss": NaN, "val_loss": Infinity}'
    (folder / "metrics.jsonl").write_text("\n".join(rows))
    gathered = report.gather([folder])
    assert gathered["runs"][0]["rows"]["train_loss"][3] is None
    assert "NaN" not in report.to_html(gathered).split('id="data">')[1].split("</script>")[0]


def test_a_long_run_is_thinned_but_keeps_its_best_and_its_end(tmp_path):
    folder = make_run(tmp_path / "run", steps=20_000)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["val_loss"] = 2.0
    rows[1234]["val_loss"] = 1.0
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (run,) = report.gather([folder])["runs"]
    steps = run["rows"]["step"]
    assert len(steps) < 2 * report.MOST_POINTS + 10 and steps == sorted(steps)
    assert {0, 1234, 20_000} <= {*steps} and run["best"] == {"step": 1234, "val_loss": 1.0}


def test_a_run_without_history_or_config_is_shown_as_far_as_it_goes(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "history.jsonl").unlink()
    (folder / "config.json").unlink()
    (run,) = report.gather([folder])["runs"]
    assert (run["starts"], run["samples"], run["bytes_per_token"]) == ([], [], None)
    assert run["tokens_per_step"] is None and run["settings"] == {}


def test_what_cannot_be_shown_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"nope/metrics\.jsonl"):
        report.gather([tmp_path / "nope"])
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no losses yet"):
        report.gather([folder])
