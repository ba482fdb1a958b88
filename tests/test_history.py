"""history.jsonl: starts, samples and ends, through a resume."""

import types

import numpy as np
import pytest
import tiny_runs

from gptjax import history, run_logs
from gptjax.data.tokenizers import Gpt2Tokenizer
from gptjax.errors import RunError, UserError
from gptjax.history import History
from gptjax.trainer import Trainer
from gptjax.viz import report


def events(run_dir):
    found = run_logs.read_history(run_dir / "history.jsonl")
    return [(event["event"], event["step"]) for event in found]


class Sampler(tiny_runs.Recorder):
    """Asks for a sample at each evaluation, as the command does."""

    def on_evaluate(self, trainer, row, best):
        if row["step"]:
            trainer.sample(row["step"])


def test_an_early_stop_is_recorded(tmp_path, train_tiny, monkeypatch):
    losses = [4.0, 2.0, 2.5, 2.5]
    monkeypatch.setattr(Trainer, "evaluate", lambda self, _: losses[self.step])
    config = tiny_runs.make_config(tmp_path)
    how = {"eval_interval": 1, "patience": 2, "callbacks": [History()]}
    train_tiny(config, tmp_path / "run", **how)
    *_, end = run_logs.read_history(tmp_path / "run" / "history.jsonl")
    assert (end["event"], end["step"], end["stopped_early"]) == ("end", 3, True)
    assert [x["early"] for x in report.gather([tmp_path / "run"])["runs"][0]["starts"]] == [True]


def test_a_run_and_its_resume_are_one_history(tmp_path, train_tiny):
    config = tiny_runs.make_config(tmp_path)
    run_dir = tmp_path / "run"
    recorder = Sampler(stop_after=6)
    train_tiny(config, run_dir, recorder, callbacks=[History()])
    stopped = recorder.trainer.checkpoints.latest_step
    assert events(run_dir) == [("start", 0), ("sample", 4), ("end", stopped)]
    train_tiny(config, run_dir, Sampler(), callbacks=[History()])
    assert events(run_dir)[3:] == [("start", stopped), ("sample", 8), ("sample", 12), ("end", 12)]
    start = run_logs.read_history(run_dir / "history.jsonl")[0]
    assert start["bytes_per_token"] == 1.0  # characters of ASCII
    assert start["tokenizer"].startswith("char, 44 ids (")
    assert "cores" in start["machine"] and "cpu" in start["devices"].lower()


def test_a_history_that_cannot_be_written_is_an_error(tmp_path, train_tiny):
    history = History()
    history._path, history._events = tmp_path / "nope" / "history.jsonl", []
    with pytest.raises(RunError, match=r"cannot write .*history\.jsonl: No such file"):
        history.on_sample(None, 3, "text")


def test_a_damaged_history_is_read_or_refused(tmp_path):
    path = tmp_path / "history.jsonl"
    assert run_logs.read_history(path) == []
    path.write_text('{"event": "start", "step": 0, "time": 1.0}\n{"event": "sam')
    assert events(tmp_path) == [("start", 0)]  # the last line is cut short
    for line in ("[]", '{"event": "sample", "step": 1, "time": 0}', '{"event": "end"}'):
        path.write_text(f"{line}\n")
        with pytest.raises(UserError, match=r"history\.jsonl, line 1 is damaged"):
            run_logs.read_history(path)


def test_what_is_damaged_is_kept_aside_and_training_goes_on(tmp_path, train_tiny):
    config = tiny_runs.make_config(tmp_path)
    run_dir = tmp_path / "run"
    train_tiny(config, run_dir, Sampler(stop_after=6), callbacks=[History()])
    (run_dir / "history.jsonl").write_text("[]\n[]\n")
    train_tiny(config, run_dir, Sampler(), callbacks=[History()])
    assert [event for event, _ in events(run_dir)] == ["start", "sample", "sample", "end"]
    assert (run_dir / "history.before.jsonl").read_text() == "[]\n[]\n"


def test_the_token_that_ends_a_document_has_no_bytes():
    tokenizer = Gpt2Tokenizer({bytes([byte]): byte for byte in range(256)})
    val = np.array([*tokenizer.encode("caf\u00e9"), tokenizer.eot] * 3000)
    dataset = types.SimpleNamespace(val=val, tokenizer=tokenizer)
    assert history.bytes_per_token(dataset) == pytest.approx(5 / 6, rel=1e-3)
