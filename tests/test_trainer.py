"""The training loop: what callbacks are told, what is written, and how it ends."""

import json
import re
import shutil

import helpers
import jax
import numpy as np
import numpy_gpt
import pytest
import tiny_runs
from helpers import assert_same_run, logged
from rich.console import Console

import gptjax
from gptjax import config_io, run_metadata
from gptjax.checkpoint import Checkpoints
from gptjax.config import DataConfig
from gptjax.data import prepare, token_files
from gptjax.errors import RunError, UserError
from gptjax.trainer import Trainer


def test_callbacks_are_told_everything_in_order(tiny):
    assert tiny.recorder.events == [
        "start",
        ("step", 0), ("evaluate", 0, False),
        ("step", 1), ("step", 2), ("step", 3),
        ("step", 4), ("save", 4), ("evaluate", 4, True),
        ("step", 5), ("step", 6), ("step", 7),
        ("step", 8), ("save", 8), ("evaluate", 8, True),
        ("step", 9), ("step", 10), ("step", 11),
        ("step", 12), ("save", 12), ("evaluate", 12, True),
        "end",
    ]  # fmt: skip


def test_a_row_has_what_is_known_of_its_step(tiny):
    first, *rows = tiny.recorder.rows
    known = {name for name, value in first.items() if value is not None}
    assert known == {"step", "val_loss", "seconds"} and "train_loss" in first
    always = {"step", "train_loss", "grad_norm", "learning_rate"}
    timing = {"tokens_per_second", "seconds"}
    for row in rows:
        more = timing if row["step"] % 2 == 0 else set()
        assert row.keys() == always | more | ({"val_loss"} if row["step"] % 4 == 0 else set())
    # Of the first step in a process, which is compiled, no speed is known.
    assert [row["step"] for row in rows if row.get("tokens_per_second")] == [2, 4, 6, 8, 10, 12]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_a_validation_loss_is_numpys_over_the_whole_split(tiny):
    tokens = np.asarray(token_files.load(tiny.run_dir.parent / "set").val[:]).astype(int)
    run = gptjax.load(tiny.run_dir, "12")
    total = 0.0
    for at in range(0, len(tokens) - 1, 16):
        window = tokens[None, at : at + 17]
        total += numpy_gpt.nats(run.config, run.params, window).sum()
    found = tiny.recorder.rows[-1]["val_loss"]
    assert found == pytest.approx(total / (len(tokens) - 1), rel=1e-5)


def test_checkpoints_say_what_they_are(tiny):
    with Checkpoints(tiny.run_dir) as checkpoints:
        assert checkpoints.steps == [8, 12] and checkpoints.candidates("best")[0] == 12
        saved = [run_metadata.read(checkpoints, step) for step in checkpoints.steps]
    losses = [row["val_loss"] for row in tiny.recorder.rows if row["step"] in (8, 12)]
    assert [metadata.val_loss for metadata in saved] == losses
    assert [metadata.best_val_loss for metadata in saved] == losses
    trainer = tiny.recorder.trainer
    for metadata in saved:
        assert (metadata.config, metadata.runtime) == (trainer.config, trainer.runtime)
        assert metadata.data_fingerprint == trainer.dataset.fingerprint
        tokens, block = len(trainer.dataset.val) - 1, trainer.config.model.block_size
        assert (metadata.eval_windows, metadata.unfinished) == (-(-tokens // block), None)
    text = json.loads((tiny.run_dir / "config.json").read_text())
    assert config_io.run_settings(text, "config.json") == (trainer.config, trainer.runtime)


def test_a_state_is_held_once(tiny, train_tiny, tmp_path):
    """Not, beside the copies that train, the one that they were made from."""
    width, shapes = 28, []

    class Sizes(tiny_runs.Recorder):
        def on_step(self, trainer, row):
            shapes.append([x.shape for x in jax.live_arrays() if width in x.shape])

    config = tiny.config.replace({"model.n_embd": width, "max_steps": 3})
    train_tiny(config, tmp_path / "run", Sizes())
    devices = jax.device_count()
    assert all(shape[0] == devices for shape in shapes[2]) and len(shapes[2]) > 30


def test_a_complete_run_takes_no_step(tiny, train_tiny, tmp_path):
    run_dir = shutil.copytree(tiny.run_dir, tmp_path / "run")
    recorder = train_tiny(tiny.config, run_dir)
    assert recorder.events == ["start", "end"] and recorder.trainer.stopped_by == 0
    assert logged(run_dir) == logged(tiny.run_dir)


def test_save_and_eval_intervals_are_independent(tiny, train_tiny, tmp_path):
    more = {"eval_interval": 8, "save_interval": 3, "keep_checkpoints": 9, "eval_batches": 1}
    recorder = train_tiny(tiny.config, tmp_path / "run", **more, eval_full_split=False)
    saved = [event[1] for event in recorder.events if event[0] == "save"]
    evaluated = [event[1] for event in recorder.events if event[0] == "evaluate"]
    assert (saved, evaluated) == ([3, 6, 8, 9, 12], [0, 8, 12])
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.steps == saved
        losses = [run_metadata.read(checkpoints, step).val_loss for step in saved]
    assert [loss is not None for loss in losses] == [False, False, True, False, True]
    # The training is the same, whatever is saved and evaluated.
    ours, expected = ([row["train_loss"] for row in r.rows[1:]] for r in (recorder, tiny.recorder))
    assert ours == expected


def test_documents_kept_apart_are_so_in_training_evaluation_and_resuming(
    tiny, train_tiny, tmp_path
):
    lines = helpers.TEXT.split("\n")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))
    data = DataConfig(
        source=str(tmp_path / "t.jsonl"), tokenizer="bpe", bpe_vocab_size=280, pack="documents",
        dir=str(tmp_path / "set"),
    )  # fmt: skip
    prepare.prepare(data, tmp_path / "set", Console(quiet=True))
    config = tiny.config.replace(data=data)
    recorder = train_tiny(config, tmp_path / "run")
    dataset, run = token_files.load(tmp_path / "set"), gptjax.load(tmp_path / "run", "12")
    tokens, nats = np.asarray(dataset.val[:]).astype(int), 0.0
    for at in range(0, len(tokens) - 1, 16):
        window = tokens[at : at + 17]
        begins = [0, *(np.flatnonzero(window[1:-1] == dataset.tokenizer.eot) + 1)]
        for begin, end in zip(begins, [*(np.array(begins[1:]) + 1), 17], strict=True):
            nats += numpy_gpt.nats(run.config, run.params, window[None, begin:end]).sum()
    loss = nats / (len(tokens) - 1)
    assert recorder.rows[-1]["val_loss"] == pytest.approx(loss, rel=1e-5)
    stopped = train_tiny(config, tmp_path / "stopped", tiny_runs.Recorder(stop_after=6))
    assert stopped.trainer.stopped_by
    train_tiny(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "run", 12)
    with pytest.raises(UserError, match=r"data\.pack: 'documents' in the run, 'blocks' now"):
        train_tiny(config.replace({"data.pack": "blocks"}), tmp_path / "run")


def test_documents_cannot_be_kept_apart_where_nothing_separates_them(tiny, train_tiny, tmp_path):
    config = tiny.config.replace({"data.pack": "documents"})
    with pytest.raises(UserError, match="end-of-text token, such as gpt2 or bpe; char has none"):
        train_tiny(config, tmp_path / "run")


def test_without_validation_a_run_trains_saves_and_resumes_the_same(tiny, train_tiny, tmp_path):
    """Its batches and its steps are those of another run, only nothing is evaluated."""
    data = tiny.config.data.replace(dir=None, val_fraction=0.0)
    prepare.prepare(data, tmp_path / "set", Console(quiet=True))
    config = tiny.config.replace(data=data.replace(dir=str(tmp_path / "set")))
    recorder = train_tiny(config, tmp_path / "run")
    assert [row["step"] for row in recorder.rows] == [*range(1, 13)]
    assert not any("val_loss" in row for row in recorder.rows)
    assert [e for e in recorder.events if "evaluate" in e] == [
        ("evaluate", n, False) for n in (4, 8, 12)
    ]
    assert gptjax.load(tmp_path / "run").step == 12  # the newest, as there is no best
    stopped = train_tiny(config, tmp_path / "stopped", tiny_runs.Recorder(stop_after=6))
    assert stopped.trainer.stopped_by
    train_tiny(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "run", 12)


class Poison(gptjax.Callback):
    """Makes a weight infinite once step 5 is done, and the step after it is under way."""

    def on_step(self, trainer, row):
        if row["step"] == 5:
            params = trainer.state.params
            infinite = params["wpe"] * np.float32(np.inf)
            trainer.state = trainer.state._replace(params=params | {"wpe": infinite})


def test_a_non_finite_loss_names_the_last_saved_step(tiny, train_tiny, tmp_path):
    recorder = tiny_runs.Recorder()
    with pytest.raises(RunError) as caught:
        train_tiny(tiny.config, tmp_path / "run", recorder, callbacks=[Poison()])
    assert str(caught.value) == (
        "train_loss became nan at step 7; step 4 is saved; lower --learning-rate or raise"
        " --warmup-steps, in another --run-dir; --debug-nans names the operation that did it"
    )
    assert recorder.events[-1] == ("step", 6)
    train_tiny(tiny.config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tiny.run_dir, 12)


def test_a_stop_before_the_first_step_leaves_no_checkpoint(tiny, train_tiny, tmp_path):
    recorder = tiny_runs.Recorder(stop_after=0)
    with pytest.raises(UserError, match="stopped before the first step"):
        train_tiny(tiny.config, tmp_path / "run", recorder)
    assert recorder.events == ["start", "end"] and recorder.trainer.stopped_by == 15
    recorder = train_tiny(tiny.config, tmp_path / "run")
    assert recorder.trainer.start.origin == "new"
    assert logged(tmp_path / "run") == logged(tiny.run_dir)


def test_a_sample_is_text_of_the_asked_length(tiny):
    trainer = tiny.recorder.trainer
    text = trainer.sample(12)
    assert len(text) == trainer.runtime.sample_tokens and trainer.sample(12) == text
    assert re.search("[a-z]", text)


# --------------------------------------------------------------------------------- patience

LOSSES = [3.0, 2.0, 2.5, 2.2, 1.9, 2.1, 1.9, 2.4, 2.0, 2.0, 1.95, 1.7, 1.8]
"""By step: the best, for a while, is that of step 4."""


class Heard(tiny_runs.Recorder):
    def on_note(self, trainer, text):
        self.events.append(text)


@pytest.fixture
def patient(tiny, train_tiny, monkeypatch):
    """Trains with these losses, evaluating after each step."""
    monkeypatch.setattr(Trainer, "evaluate", lambda self, _: LOSSES[self.step])

    def train(run_dir, stop_after=None, **runtime):
        recorder = Heard(stop_after)
        return train_tiny(tiny.config, run_dir, recorder, eval_interval=1, **runtime)

    return train


def test_training_ends_where_the_loss_no_longer_falls(patient, tmp_path):
    run_dir = tmp_path / "run"
    recorder = patient(run_dir, patience=3, save_interval=5)
    said = (
        "stopped early at step 7: no better validation loss than 1.9000 in 3 evaluations"
        " (--patience 3); the best checkpoint is that of step 4; a larger --patience goes on"
    )
    assert recorder.events[-4:] == [("save", 7), ("evaluate", 7, False), said, "end"]
    assert recorder.trainer.stopped_early and not recorder.trainer.stopped_by
    with Checkpoints(run_dir) as checkpoints:
        assert checkpoints.steps == [4, 5, 7]
    assert gptjax.load(run_dir).step == 4
    assert patient(run_dir, patience=3).events == ["start", said, "end"]
    more = patient(run_dir, patience=5)
    assert [row["step"] for row in more.rows] == [8, 9] and more.trainer.stopped_early
    last = patient(run_dir)
    assert [row["step"] for row in last.rows] == [10, 11, 12] and not last.trainer.stopped_early


def test_it_is_said_where_no_checkpoint_is_better_than_the_first_weights(
    patient, tmp_path, monkeypatch
):
    for patience, losses in ((2, [2.0, 3.0, 2.5]), (None, [2.0, 3.0, 2.5, *[2.6] * 10])):
        monkeypatch.setattr(Trainer, "evaluate", lambda self, _, of=losses: of[self.step])
        *_, said, end = patient(tmp_path / f"run{patience}", patience=patience).events
        assert end == "end" and said == (
            "note: the best validation loss, 2.0000, is that of no checkpoint (the weights that"
            " training began with are not saved); the best checkpoint is that of step 2, with"
            " 2.5000"
        )


@pytest.mark.slow
def test_patience_survives_a_stop(patient, tmp_path):
    patient(tmp_path / "whole", patience=3)
    patient(tmp_path / "parts", patience=3, stop_after=5)
    assert patient(tmp_path / "parts", patience=3).trainer.stopped_early
    assert_same_run(tmp_path / "parts", tmp_path / "whole", 7)


def test_patience_takes_a_text_for_validation(tiny, train_tiny, tmp_path):
    data = tiny.config.data.replace(val_fraction=0.0, dir=str(tmp_path / "set"))
    prepare.prepare(data, tmp_path / "set", Console(quiet=True))
    config = tiny.config.replace(data=data)
    with pytest.raises(UserError, match="--patience takes a text for validation"):
        train_tiny(config, tmp_path / "run", patience=1)
