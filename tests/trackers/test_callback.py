"""Trackers get what the run reports, and cost it nothing: no number changes, none can stop it."""

import importlib.util
import threading
import time
import types
from pathlib import Path

import helpers
import numpy as np
import pytest
import tracker_records as records

import gptjax
from gptjax.config import TrainConfig
from gptjax.errors import ConfigError
from gptjax.runtime_config import RuntimeConfig
from gptjax.trackers import base, callback, tensorboard, trackio, wandb
from gptjax.trackers.base import Entry, Tracker


class Memory(Tracker):
    """Keeps what it gets."""

    package = "memory"

    def open(self, run_dir, step, settings):
        type(self).last = self
        self.opened, self.entries, self.failed = (run_dir, step, settings), [], None
        self.where = "here"

    def log(self, entry):
        self.entries.append(entry)

    def close(self, failed):
        self.failed = failed


class Fails(Memory):
    def log(self, entry):
        if entry.step == 4:
            raise OSError(28, "No space left on device")


class Hangs(Tracker):
    def open(self, *args):
        pass

    def log(self, entry):
        threading.Event().wait()

    def close(self, failed):
        pass


class Notes(gptjax.Callback):
    def __init__(self):
        self.said = []

    def on_note(self, trainer, text):
        self.said.append(text)


def start(trackers, tracker=None, monkeypatch=None, step=0, **runtime):
    """A trainer that starts at `step`, and its notes; TensorBoard is `tracker`."""
    if tracker:
        monkeypatch.setattr(tensorboard, "TensorBoard", tracker)
    notes = Notes()
    trainer = types.SimpleNamespace(
        config=TrainConfig(max_steps=12), runtime=RuntimeConfig(track=("tensorboard",), **runtime),
        start=types.SimpleNamespace(step=step, unfinished=None), callbacks=[notes],
        checkpoints=types.SimpleNamespace(run_dir=Path("run")),
    )  # fmt: skip
    trackers.on_start(trainer)
    return trainer, notes


@pytest.fixture(scope="module")
def tracked(tiny, train_tiny, tmp_path_factory):
    """The tiny run with samples, a tracker that keeps everything, one that fails and one that
    hangs: (run_dir, what the first one got, what the user was told, the callback, seconds)."""
    run_dir, notes = tmp_path_factory.mktemp("tracked") / "run", Notes()
    display, trackers = gptjax.ProgressDisplay(), gptjax.Trackers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorboard, "TensorBoard", Memory)
        patch.setattr(wandb, "Wandb", Fails)
        patch.setattr(trackio, "Trackio", Hangs)
        patch.setattr(callback, "CLOSE_SECONDS", 0.3)
        train_tiny(
            tiny.config, run_dir, callbacks=[display, gptjax.Samples(display), notes, trackers],
            track=("tensorboard", "wandb", "trackio"), sample_tokens=5, watch=5,
        )  # fmt: skip
    return run_dir, Memory.last, notes.said, trackers


def test_no_number_of_the_training_changes(tracked, tiny):
    helpers.assert_same_run(tracked[0], tiny.run_dir, 12)


def test_a_tracker_gets_the_numbers_of_metrics_jsonl(tracked):
    run_dir, ours, *_ = tracked
    rows = [
        {name: value for name, value in row.items() if value is not None}
        for row in helpers.logged(run_dir)
    ]
    found, timed = [], []
    for entry in ours.entries:
        own = {n: v for n, v in entry.numbers.items() if "/" not in n}
        if own.pop("tokens_per_second", None):
            timed.append(entry.step)
        found += [{"step": entry.step} | own] * bool(own)
    assert found == rows and timed == [2, 4, 6, 8, 10, 12]
    assert ours.opened[:2] == (run_dir, 0) and ours.failed is False
    settings = ours.opened[2]
    assert (settings["model.n_embd"], settings["eval_interval"]) == (16, 4)


def test_a_tracker_gets_the_samples(tracked, tiny):
    texts = {entry.step: entry.texts["sample"] for entry in tracked[1].entries if entry.texts}
    assert [*texts] == [4, 8, 12] and all(len(text) == 5 for text in texts.values())
    assert texts[12] == tiny.recorder.trainer.sample(12)[:5]


def test_watching_adds_norms(tracked):
    watched = {entry.step: entry for entry in tracked[1].entries if entry.histograms}
    assert [*watched] == [5, 10]
    for entry in watched.values():
        for kind in ("parameters", "gradients"):
            norms = [v for n, v in entry.numbers.items() if n.startswith(f"{kind}/")]
            np.testing.assert_array_equal(entry.histograms[f"{kind}/all"], norms)
            assert len(norms) == 12 + 4
    total = np.sqrt((watched[10].histograms["gradients/all"] ** 2).sum())
    assert total == pytest.approx(watched[10].numbers["grad_norm"], rel=1e-5)


def test_one_that_fails_or_hangs_costs_one_line_each(tracked):
    _, _, said, trackers = tracked
    assert sorted(said) == [
        "tensorboard here",
        "wandb      here",
        "warning: tracking by wandb has ended: [Errno 28] No space left on device",
        "warning: trackio does not answer; its record may be incomplete",
    ]
    assert trackers.hangs


@pytest.mark.parametrize(
    ("error", "warning", "hangs"),
    [
        (SystemExit("log in first"), "tracking by tensorboard has ended: log in first", True),
        (
            ModuleNotFoundError("no module", name="thing"),
            "no tracking by tensorboard: thing is not installed (pip install memory)",
            False,
        ),
    ],
)
def test_one_that_cannot_be_opened_costs_one_line(monkeypatch, error, warning, hangs):
    class Never(Memory):
        def open(self, *args):
            raise error

    trackers = gptjax.Trackers()
    trainer, notes = start(trackers, Never, monkeypatch)
    trackers.on_step(trainer, {"step": 1, "train_loss": 1.0, "seconds": 1.0})
    trackers.on_end(trainer)
    assert notes.said == [f"warning: {warning}"] and trackers.hangs == hangs


def test_a_run_that_fails_is_recorded_as_failed_and_with_its_earlier_rows(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 5, "train_loss": 2.0, "time": 3.0}\n')
    trackers = gptjax.Trackers()
    trainer, _ = start(trackers, Memory, monkeypatch, step=7)
    trackers.on_step(trainer, {"step": 8, "train_loss": 1.0, "seconds": 1.0})
    trackers.close()
    assert Memory.last.failed is True and Memory.last.opened[1] == 7
    found = [(entry.step, entry.numbers) for entry in Memory.last.entries]
    assert found == [(5, {"train_loss": 2.0}), (8, {"train_loss": 1.0})]


def test_without_track_or_a_step_to_take_there_is_no_thread(monkeypatch):
    threads, trackers = threading.active_count(), gptjax.Trackers()
    trainer, _ = start(trackers, Memory, monkeypatch, step=12)
    trainer.runtime = RuntimeConfig()
    trainer.start.step = 0
    trackers.on_start(trainer)
    assert threading.active_count() == threads
    with pytest.raises(ConfigError, match="watch is for a tracker; add --track"):
        RuntimeConfig(watch=5)
    with pytest.raises(ConfigError, match=r"track is .*'mlflow'"):
        RuntimeConfig(track=("mlflow",))


def test_what_a_slow_tracker_cannot_take_is_left_out_and_counted(monkeypatch):
    monkeypatch.setattr(base, "QUEUE_SIZE", 3)
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Memory):
        def log(self, entry):
            begun.set()
            go_on.wait()
            super().log(entry)

    worker = base.Worker("slow", Slow(), [], None, 0, {})
    worker.put(Entry(1))
    begun.wait()
    began = time.monotonic()
    for step in range(2, 10):
        worker.put(Entry(step))
    assert time.monotonic() - began < 1
    go_on.set()
    worker.end(failed=False)
    worker.wait(time.monotonic() + 30)
    assert [entry.step for entry in Slow.last.entries] == [1, 2, 3, 4] and worker.is_over
    said = [worker.notes.get() for _ in range(worker.notes.qsize())]
    assert said == ["slow       here", "warning: slow is too slow: 5 entries are missing"]


def test_a_record_gets_the_steps_that_it_does_not_have(monkeypatch):
    class Ahead(Memory):
        def open(self, *args):
            super().open(*args)
            self.next_step = 3

    worker = base.Worker("ahead", Ahead(), [Entry(step) for step in (1, 2, 3)], None, 3, {})
    worker.put(Entry(4))
    worker.end(failed=False)
    worker.wait(time.monotonic() + 30)
    assert [entry.step for entry in Ahead.last.entries] == [3, 4]


HANGING = """
import sys, threading
from gptjax.commands import main
from gptjax.trackers import callback, tensorboard
class Hangs(tensorboard.TensorBoard):
    def open(self, *args):
        threading.Thread(target=threading.Event().wait).start()  # which Python would wait for
        threading.Event().wait()
callback.CLOSE_SECONDS = 1
tensorboard.TensorBoard = Hangs
sys.argv[0] = "gptjax"
main.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "run_dir"),
    [
        ("train", "run"),
        ("sweep --optimizer adamw --learning-rate 1e-3,1e37", "run/learning_rate=1e-3"),
    ],
    ids=["train", "sweep"],
)
def test_a_process_ends_though_a_tracker_hangs(command, text_file, tmp_path, argv, run_dir):
    flags = "--max-steps 4 --run-dir run --track tensorboard".split()
    result = command("-c", HANGING, *argv.split(), *helpers.TINY, *flags)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "warning: tensorboard does not answer" in result.stdout
    assert ("diverged: " in result.stdout) == (argv != "train")
    assert helpers.logged(tmp_path / run_dir)[-1]["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "library"),
    [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio")],
)
def test_a_library_that_is_not_there_is_one_line(command, text_file, name, library):
    script = (
        f"import sys; sys.modules[{library!r}] = None; sys.argv[0] = 'gptjax'\n"
        "from gptjax.commands import main; main.main()"
    )
    flags = ["--max-steps", "4", "--run-dir", "run", "--track", name]
    result = command("-c", script, "train", *helpers.TINY, *flags)
    assert result.returncode == 0 and not result.stderr, result.stderr
    line = f"warning: no tracking by {name}: {library} is not installed (pip install {library})"
    assert result.stdout.count(line) == 1


@pytest.mark.slow
def test_after_a_kill_every_record_has_every_step_once(tmp_path, cache_dir, text_file):
    libraries = "tensorboardX", "tensorboard", "wandb", "trackio"
    if not all(map(importlib.util.find_spec, libraries)):
        pytest.skip("they are extras")
    flags = [*helpers.TINY, "--max-steps", "300", "--log-interval", "1", "--run-dir", "run"]
    flags += ["--sample-tokens", "3", "--track", "tensorboard", "wandb", "trackio"]
    environment = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    process = helpers.start(tmp_path, cache_dir, *flags, **environment)
    helpers.wait_for(process, "step 155/300")
    process.kill()
    process.communicate()
    result = helpers.finish(helpers.start(tmp_path, cache_dir, "--run-dir", "run", **environment))
    assert result.returncode == 0 and "resumed at step" in result.stdout, result.stderr
    run_dir = tmp_path / "run"
    logged = [(row["step"], row["train_loss"]) for row in helpers.logged(run_dir) if row["step"]]
    rows = [row for row in records.read_wandb(run_dir)[0] if "train_loss" in row]
    found = [(row["_step"], row["train_loss"]) for row in rows]
    assert found == logged
    (rows,) = records.read_trackio(tmp_path / "trackio", "gptjax")[0].values()
    assert records.column(rows, "train_loss") == logged
    numbers = records.read_tensorboard(run_dir)[0]["train_loss"]
    assert numbers == [(step, np.float32(loss)) for step, loss in logged]
