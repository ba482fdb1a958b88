"""Trackers as a callback of training, which they neither stop nor slow."""

import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np

from gptjax import config_io, run_logs
from gptjax.devices import setup
from gptjax.trackers.base import Entry, Worker
from gptjax.trackers.watch import Norms, Watch
from gptjax.trainer import Callback, Row, Trainer

CLASSES = {"tensorboard": "TensorBoard", "wandb": "Wandb", "trackio": "Trackio"}
"""Each in the module of its name."""

NUMBERS = "train_loss", "val_loss", "learning_rate", "grad_norm", "tokens_per_second"
"""What trackers get of a row, under the names that metrics.jsonl has."""

CLOSE_SECONDS = 30.0
"""For all trackers together, to write and send what is left."""


class Trackers(Callback):
    """Gives what a run reports to the trackers that `runtime.track` names, each in a thread of its
    own. One that is missing, fails or hangs costs a line of warning, and nothing else. It stands
    after `MetricsLog` and `History`, from whose files a record gets what it lacks, and after
    `Samples`. Only the main host has trackers."""

    def __init__(self) -> None:
        self._workers, self._closed = list[Worker](), list[Worker]()
        self._watch: Watch | None = None
        self._norms: dict[int, Norms] = {}

    def on_start(self, trainer: Trainer) -> None:
        runtime, start = trainer.runtime, trainer.start
        if start.step >= trainer.config.max_steps and not start.unfinished:
            return  # there will be nothing to say
        if runtime.watch:
            self._watch = Watch(trainer)
        run_dir = trainer.checkpoints.run_dir
        earlier = _read(run_dir, start.step) if start.step else []
        settings = config_io.flatten(trainer.config) | config_io.flatten(runtime)
        for name in dict.fromkeys(runtime.track) if setup.is_main_host() else ():
            tracker = getattr(importlib.import_module(f"gptjax.trackers.{name}"), CLASSES[name])()
            self._workers.append(Worker(name, tracker, earlier, run_dir, start.step, settings))

    def before_step(self, trainer: Trainer, step: int) -> None:
        if self._watch and step % (trainer.runtime.watch or 1) == 0:
            _call(trainer, "on_phase", "watching")
            self._norms[step] = self._watch.norms(trainer, step)

    def on_step(self, trainer: Trainer, row: Row) -> None:
        numbers = _numbers(row) if "seconds" in row else {}
        histograms = {}
        for kind, norms in self._norms.pop(row["step"], {}).items():
            numbers |= {f"{kind}/{name}": norm for name, norm in norms.items()}
            histograms[f"{kind}/all"] = np.array([*norms.values()])
        if numbers:
            self._put(Entry(row["step"], numbers, histograms=histograms))
        self._say_notes(trainer)

    def on_sample(self, trainer: Trainer, step: int, text: str) -> None:
        self._put(Entry(step, texts={"sample": text}))

    def on_end(self, trainer: Trainer) -> None:
        if self._workers:
            _call(trainer, "on_phase", "finishing the trackers' records")
            self.close(failed=False)
            _call(trainer, "on_phase", "")
        self._say_notes(trainer)

    def close(self, failed: bool = True) -> None:
        """Trackers get nothing after it. A run that never reached `on_end` counts as failed."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for worker in self._workers:
            worker.end(failed)
        for worker in self._workers:
            worker.wait(deadline)
        self._closed += self._workers
        self._workers = []

    @property
    def hangs(self) -> bool:
        """Whether a library could keep the process from ending."""
        return not all(worker.is_over for worker in self._closed)

    def _put(self, entry: Entry) -> None:
        for worker in self._workers:
            worker.put(entry)

    def _say_notes(self, trainer: Trainer) -> None:
        for worker in (*self._workers, *self._closed):
            while not worker.notes.empty():
                _call(trainer, "on_note", worker.notes.get())


def _read(run_dir: Path, step: int) -> list[Entry]:
    """What a run that goes on after `step` has told of itself."""
    path = run_dir / "metrics.jsonl"
    rows = run_logs.read_metrics(path) if path.exists() else []
    events = run_logs.read_history(run_dir / "history.jsonl")
    texts = {
        event["step"]: {"sample": event["text"]}
        for event in events if event["event"] == "sample" and event["step"] <= step
    }  # fmt: skip
    return [Entry(row["step"], _numbers(row), texts.get(row["step"], {})) for row in rows]


def _numbers(row: Row) -> dict[str, float]:
    return {name: row[name] for name in NUMBERS if row.get(name) is not None}


def _call(trainer: Trainer, event: str, argument: Any) -> None:
    for callback in trainer.callbacks:
        getattr(callback, event)(trainer, argument)
