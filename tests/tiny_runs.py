"""Training runs of a dozen steps, within the tests' own process."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import helpers
from rich.console import Console

import gptjax
from gptjax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.data import prepare
from gptjax.runtime_config import RuntimeConfig

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, dropout=0.1)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, min_lr=1e-3, warmup_steps=2)
RUNTIME = RuntimeConfig(eval_interval=4, log_interval=2, eval_full_split=True)


class Recorder(gptjax.Callback):
    """What a callback is told, in order; and a stop signal that a test may give."""

    def __init__(self, stop_after: int | None = None, ask_again: int = 0):
        """Stop when step `stop_after` is known to be done and `stop` was asked so often since."""
        self.events: list[Any] = []
        self.rows: list[dict] = []
        self._stop_after, self._left = stop_after, ask_again
        self._counts = False

    def on_start(self, trainer):
        self.trainer = trainer
        self.events.append("start")
        self._counts = self._stop_after == trainer.start.step

    def on_step(self, trainer, row):
        self.events.append(("step", row["step"]))
        self.rows.append(dict(row))
        self._counts = self._counts or row["step"] == self._stop_after

    def on_evaluate(self, trainer, row, best):
        self.events.append(("evaluate", row["step"], best))

    def on_save(self, trainer, step):
        self.events.append(("save", step))

    def on_end(self, trainer):
        self.events.append("end")

    def stop(self) -> int:
        """15 once it is time."""
        if self._counts:
            self._left -= 1
        return 15 if self._counts and self._left < 0 else 0


class TinyRun(NamedTuple):
    """A finished run."""

    run_dir: Path
    config: TrainConfig
    recorder: Recorder
    run: gptjax.Run


Train = Callable[..., Recorder]


def make_config(folder: Path) -> TrainConfig:
    """For a run of twelve steps of `helpers.TEXT`, prepared in `folder`."""
    (folder / "text.txt").write_text(helpers.TEXT)
    data = DataConfig(source=str(folder / "text.txt"), dir=str(folder / "set"))
    prepare.prepare(data, folder / "set", Console(quiet=True))
    return TrainConfig(MODEL, data, OPTIMIZER, batch_size=16, max_steps=12)


def train(
    cache_dir: Path,
    config: TrainConfig,
    run_dir: Path,
    recorder: Recorder | None = None,
    callbacks: Sequence[gptjax.Callback] = (),
    **runtime: Any,
) -> Recorder:
    """`gptjax.train`, with metrics.jsonl; what it told. Programs come from the tests' cache."""
    recorder = recorder or Recorder()
    with mock.patch.dict(os.environ, {"GPTJAX_CACHE_DIR": str(cache_dir)}):
        gptjax.train(
            config,
            run_dir,
            runtime=dataclasses.replace(RUNTIME, **runtime),
            callbacks=[recorder, gptjax.MetricsLog(), *callbacks],
            stop=recorder.stop,
        )
    return recorder
