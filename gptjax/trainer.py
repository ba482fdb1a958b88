"""The training loop: one step after the other, and what happens between them. Callbacks are the one
way to listen to it: the progress line, metrics.jsonl and the samples are callbacks."""

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax import attention, resume, sampling, train_step
from gptjax.checkpoint import Checkpoints
from gptjax.clock import Clock
from gptjax.config import TrainConfig
from gptjax.data import tokenizers
from gptjax.data.batches import batch_at, check_ids, windows_over
from gptjax.data.token_files import Dataset
from gptjax.decode_layout import unstack
from gptjax.devices import hosts, setup
from gptjax.devices.strategy import get_strategy
from gptjax.errors import RunError
from gptjax.evaluation import window_loss
from gptjax.run_metadata import CheckpointMetadata
from gptjax.runtime_config import ComputeConfig, RuntimeConfig

Row = dict[str, Any]
"""One step's numbers: `step` (of those done), `train_loss` (before the update), `grad_norm`,
`learning_rate`; at an evaluation `val_loss`; and at log intervals and evaluations
`tokens_per_second` and `seconds` (of training in this process, evaluating and saving left out)."""


class Callback:
    """Listens to a Trainer, on every host. Each method does nothing unless it is overridden."""

    def on_start(self, trainer: "Trainer") -> None:
        """The state is there; no step has been taken."""

    def on_step(self, trainer: "Trainer", row: Row) -> None:
        """A step is done. (The devices are at work on the next one already, if there is no
        evaluation or checkpoint in between.)"""

    def on_evaluate(self, trainer: "Trainer", row: Row, best: bool) -> None:
        """`row` has a `val_loss`, and the checkpoint that belongs to it has been started."""

    def on_save(self, trainer: "Trainer", step: int) -> None:
        """A checkpoint is about to be written."""

    def on_end(self, trainer: "Trainer") -> None:
        """The last step is done, or `trainer.stopped_by` a signal."""


class Trainer:
    """One training run in progress."""

    def __init__(
        self,
        config: TrainConfig,
        runtime: RuntimeConfig,
        dataset: Dataset,
        checkpoints: Checkpoints,
        callbacks: Sequence[Callback] = (),
        stop: Callable[[], int] = lambda: 0,
    ):
        """Initialise the state or resume it.

        Args:
            config: with nothing left open (`resume.resolve`).
            stop: the signal on which this host shall stop, 0 while there is none.

        Raises:
            UserError: the run is another experiment, or none of its checkpoints is whole.
        """
        self.config, self.runtime, self.dataset = config, runtime, dataset
        self.checkpoints, self.callbacks, self.stop = checkpoints, callbacks, stop
        self.stopped_by = 0
        """The signal on which all hosts stopped."""
        self.strategy = get_strategy(runtime.strategy)
        self.kernels = {train: attention.choose(config.model, runtime.compute, train=train)
                        for train in (True, False)}  # fmt: skip
        """(attention kernel, why) in training and in evaluation."""
        steps = runtime.gradient_accumulation_steps
        self._train_step = self.strategy.map_train_step(
            functools.partial(train_step.train_step, config=config, compute=self._compute(True)),
            steps,
        )
        self._eval_step = self.strategy.map_eval_step(
            functools.partial(
                train_step.eval_step, config=config.model, compute=self._compute(False)
            )
        )
        self._micro_batch = config.batch_size // steps
        self.start = resume.init_or_resume(
            config, runtime, dataset.fingerprint, checkpoints, self.strategy
        )
        self.best_val_loss = self.start.best_val_loss
        self.state = self.strategy.to_devices(self.start.state)
        self.clock = Clock(self.start.step + 1)
        self.first_step_seconds: float | None = None
        """Of the first step in this process, which is compiled."""

    def _compute(self, train: bool) -> ComputeConfig:
        return dataclasses.replace(self.runtime.compute, attention=self.kernels[train][0])

    def batch(self, step: int) -> np.ndarray:
        """int32 [R, block_size + 1]: this host's share of the batch of one step."""
        model = self.config.model
        rows = batch_at(
            self.dataset.train,
            self.config.seed,
            step,
            batch_size=self.config.batch_size,
            block_size=model.block_size,
            rows=hosts.host_rows(self.config.batch_size),
        )
        check_ids(rows, model.vocab_size)
        return rows

    def evaluate(self, windows: int | None) -> float | None:
        """Mean validation loss in nats per token over so many evenly spaced windows, always the
        same (None: over the whole split); None where a stop signal cuts it short.

        Raises:
            RunError: it is not finite.
        """
        tokens, model = self.dataset.val, self.config.model
        total = window_loss(
            functools.partial(self._eval_step, self.state.params),
            tokens,
            windows_over(len(tokens), model.block_size, at_most=windows),
            model,
            self._micro_batch,
            stop=self.stop,
        )
        if total is None:
            return None
        loss, count = total
        if not math.isfinite(loss):
            raise RunError(f"the validation loss became {loss}; {self.checkpoints.last_saved()}")
        return loss / count

    def sample(self) -> str:
        """A continuation of a line end (of token 0 where the tokenizer knows none)."""
        tokenizer, model = self.dataset.tokenizer, self.config.model
        prompt = tokenizer.encode("\n", skip_unknown=True)
        pieces = sampling.generate(
            unstack(self.strategy.for_sampling(self.state.params), model),
            prompt if len(prompt) else np.zeros(1, np.int32),
            self.runtime.sample_tokens,
            model,
            sampling.Sampling(0.8, 200),
            seed=self.config.seed,
            overflow="half",
        )
        # All hosts together: where they share the model out, none can make a token alone.
        until_stop = itertools.takewhile(lambda _: not self._signal(), pieces)
        ids = np.concatenate([np.zeros(0, int), *(piece[0] for piece in until_stop)])
        return tokenizer.decode(ids.tolist())

    def _signal(self) -> int:
        """The largest stop signal of all hosts, which all must ask for."""
        return max(hosts.all_gather(self.stop()))

    def save(self, step: int, val_loss: float | None = None, unfinished: Row | None = None) -> None:
        """Start a checkpoint of the state after `step` steps, in the background."""
        self._call("on_save", step)
        self.checkpoints.wait()  # for the copy that is still being written
        saved = self.strategy.for_saving(self.state)
        arrays = {"params": saved.params, "opt_state": saved.opt_state}
        self.checkpoints.save(step, arrays, self._metadata(val_loss, unfinished))

    def _metadata(self, val_loss: float | None, unfinished: Row | None = None) -> dict[str, Any]:
        return CheckpointMetadata(
            self.config,
            self.runtime,
            tokenizers.to_json(self.dataset.tokenizer),
            self.dataset.fingerprint,
            self.best_val_loss,
            val_loss,
            self.runtime.eval_windows(self.config),
            self.kernels[True][0],
            unfinished,
        ).to_dict()

    def fit(self) -> None:
        """Train until `max_steps` steps are done or a stop signal comes; both end in a checkpoint.

        Raises:
            RunError: a non-finite loss, a failed save, a bad token.
        """
        self._call("on_start")
        first, last = self.start.step, self.config.max_steps
        if first == 0:
            self._evaluate_untrained()
        if self.start.unfinished and not self.stopped_by:
            self._end_of_step(dict(self.start.unfinished), saved=True)
        if first < last and not self.stopped_by:
            self._take_steps(first, last)
        self._call("on_end")

    def _evaluate_untrained(self) -> None:
        with self.clock.paused():
            loss = self.evaluate(self.runtime.eval_windows(self.config))
        if loss is None:
            self.stopped_by = self._signal()
            return
        self.best_val_loss = loss
        row = {"step": 0, "val_loss": loss, "seconds": 0.0}
        self._call("on_step", row)
        self._call("on_evaluate", row, False)

    def _take_steps(self, first: int, last: int) -> None:
        runtime = self.runtime
        intervals = runtime.eval_interval, runtime.save_interval or runtime.eval_interval
        alone = setup.host_count() == 1
        pending: tuple[int, train_step.Metrics] | None = None
        for done in range(first + 1, last + 1):
            with self.clock.paused() if done == first + 1 else contextlib.nullcontext():
                began = time.perf_counter()
                batch = self.batch(done - 1)
                self.state, metrics = self._train_step(self.state, batch, self.stop())
                if done == first + 1:
                    hosts.fetch(metrics)
                    self.first_step_seconds = time.perf_counter() - began
            # The metrics of the step before are read while this one runs.
            stop = self.stop() if alone else 0
            if pending:
                row = self._row(*pending)
                signal = row.pop("stop")
                stop = stop or signal
                if row["step"] % runtime.log_interval == 0:
                    self._add_speed(row)
                self._call("on_step", row)
            pending = done, metrics
            if stop or done == last or any(done % n == 0 for n in intervals):
                row, pending = self._row(done, metrics), None
                self._end_of_step(row | {"stop": row["stop"] or stop})
                if self.stopped_by:
                    return

    def _row(self, step: int, metrics: train_step.Metrics) -> Row:
        """Waits for the step. Raises RunError where its numbers are not finite."""
        row = {"step": step} | hosts.fetch(metrics)
        for name in ("train_loss", "grad_norm"):
            if not math.isfinite(row[name]):
                raise RunError(
                    f"{name} became {row[name]} at step {step}; {self.checkpoints.last_saved()};"
                    " lower --learning-rate or raise --warmup-steps, in another --run-dir"
                )
        return row

    def _end_of_step(self, row: Row, *, saved: bool = False) -> None:
        """All that follows a step with an evaluation or a checkpoint. `saved`: the checkpoint is
        there, from before a stop, and only its evaluation is missing."""
        runtime, done, stop = self.runtime, row["step"], row.pop("stop", 0)
        last = done == self.config.max_steps
        evaluates = saved or done % runtime.eval_interval == 0 or last
        loss, best = None, False
        if evaluates and not stop:
            with self.clock.paused():
                loss = self.evaluate(runtime.eval_windows(self.config))
        if loss is not None:
            row["val_loss"] = loss
            best = self.best_val_loss is None or loss < self.best_val_loss
            self.best_val_loss = loss if best else self.best_val_loss
        cut_short = evaluates and loss is None
        unfinished = dict(row) if cut_short else None
        if not cut_short:
            if evaluates or done % runtime.log_interval == 0:
                self._add_speed(row)
            self._call("on_step", row)
        with self.clock.paused():
            if saved:
                self._call("on_save", done)
                metadata = self._metadata(loss, unfinished)
                self.checkpoints.update_metadata(done, metadata, writes=setup.is_main_host())
            elif stop or cut_short or last or best or self._saves_at(done):
                if loss is None and not (stop or cut_short):
                    # The step's loss was that of the parameters before it: check these.
                    cut_short = self.evaluate(self._micro_batch) is None
                self.save(done, loss, unfinished)
            if loss is not None:
                self._call("on_evaluate", row, best)
        if stop or cut_short:
            self.stopped_by = stop or self._signal()

    def _saves_at(self, step: int) -> bool:
        return step % (self.runtime.save_interval or self.runtime.eval_interval) == 0

    def _add_speed(self, row: Row) -> None:
        # Of a step that an earlier process has taken nobody knows.
        timed = row["step"] > self.start.step
        rate = self.clock.steps_per_second(row["step"]) if timed else None
        tokens = self.config.batch_size * self.config.model.block_size
        row |= {"tokens_per_second": rate and rate * tokens, "seconds": self.clock.seconds()}

    def _call(self, event: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *args)
