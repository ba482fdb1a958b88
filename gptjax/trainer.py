"""The training loop: one step after the other, and what happens between them. Callbacks are the one
way to listen to it: the progress line, metrics.jsonl and the samples are callbacks."""

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import nonfinite, resume, sampling, train_step
from gptjax.checkpoint import Checkpoints
from gptjax.clock import Clock
from gptjax.config import TrainConfig
from gptjax.data import tokenizers
from gptjax.data.batches import batch_at, check_ids, windows_over
from gptjax.data.prefetch import Prefetch
from gptjax.data.token_files import Dataset
from gptjax.decode_layout import unstack
from gptjax.devices import cpu, hosts, memory, setup
from gptjax.devices.strategy import get_strategy
from gptjax.errors import Diverged, UserError
from gptjax.evaluation import window_loss
from gptjax.generation import prompt_ids
from gptjax.run_metadata import CheckpointMetadata
from gptjax.runtime_config import RuntimeConfig

Row = dict[str, Any]
"""One step's numbers: `step` (how many are done), `train_loss` (before the update), `grad_norm` and
`learning_rate`; `val_loss` after an evaluation; at log intervals and evaluations also
`tokens_per_second` and `seconds` (of training in this process, without evaluating and saving)."""


def slower(config: TrainConfig) -> str:
    """What helps against numbers that are no longer finite."""
    rates = "--learning-rate" if config.optimizer.kind == "adamw" else "--muon-learning-rate"
    return f"lower {rates} or raise --warmup-steps, in another --run-dir"


class Callback:
    """Listens to a Trainer, on every host. Each method does nothing unless it is overridden."""

    def on_start(self, trainer: "Trainer") -> None:
        """The state is initialised or restored; no step has been taken yet."""

    def on_phase(self, trainer: "Trainer", phase: str) -> None:
        """Something other than a step begins that may take a while: "compiling the training step",
        "evaluating", ..."""

    def on_note(self, trainer: "Trainer", text: str) -> None:
        """Something that the user should know."""

    def before_step(self, trainer: "Trainer", step: int) -> None:
        """Step number `step` is about to be taken, from `trainer.state`."""

    def on_step(self, trainer: "Trainer", row: Row) -> None:
        """A step is done, and evaluated if that was due. (Unless it was, accelerators are working
        on the next step already.) Before the first step, called once with `step` 0, `val_loss` and
        no other numbers (None)."""

    def on_evaluate(self, trainer: "Trainer", row: Row, best: bool) -> None:
        """`row` has a `val_loss`, if there is a text for validation; a checkpoint, if one is due,
        has been started."""

    def on_sample(self, trainer: "Trainer", step: int, text: str) -> None:
        """The model of `step` steps has continued a line end so."""

    def on_save(self, trainer: "Trainer", step: int) -> None:
        """A checkpoint is about to be written."""

    def on_end(self, trainer: "Trainer") -> None:
        """The last step is done, or `trainer.stopped_by` is the signal that ended training, or
        `trainer.stopped_early`."""


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
            stop: returns the signal that asks this host to stop, or 0.

        Raises:
            UserError: the run is another experiment, or none of its checkpoints is whole.
        """
        self.config, self.runtime, self.dataset = config, runtime, dataset
        self.checkpoints, self.callbacks, self.stop = checkpoints, callbacks, stop
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise UserError(f"{callback!r} among the callbacks is no gptjax.Callback object")
        self.stopped_by = 0
        """The signal on which all hosts stopped; 0: none."""
        self.strategy = get_strategy(runtime.strategy)
        self.eot = dataset.tokenizer.eot if config.data.packed else None
        """The end-of-text token, where attention keeps the documents apart that it separates."""
        packed = config.data.packed
        self.train_compute = setup.resolve_compute(config.model, runtime, train=True, packed=packed)
        """(how a step is computed, why attention is computed so)."""
        self.eval_compute = setup.resolve_compute(config.model, runtime, train=False, packed=packed)
        # The strategy makes Batches of the windows it is given, names the axis that gradients are
        # averaged over, and adds `stop`, the largest signal of all hosts, to a step's metrics.
        accumulation = runtime.gradient_accumulation_steps
        self._train_step = self.strategy.map_train_step(
            functools.partial(
                train_step.train_step, config=config, compute=self.train_compute[0], eot=self.eot
            ),
            accumulation,
        )
        self._eval_step = self.strategy.map_eval_step(
            functools.partial(
                train_step.eval_step,
                config=config.model,
                compute=self.eval_compute[0],
                eot=self.eot,
            )
        )
        mixed = zip(dataset.parts, config.data.weights, strict=True) if config.data.mix else ()
        self._parts = [(size, weight) for (_, size), weight in mixed]
        self._eval_batch_size = config.batch_size // accumulation  # what fits in training fits
        state, self.start = resume.init_or_resume(
            config, runtime, dataset, checkpoints, self.strategy
        )
        self.best_val_loss = self.start.best_val_loss
        self.evaluations_since_best = self.start.evaluations_since_best
        self.step = self.start.step
        """Steps done, all their numbers read."""
        self.state = self.strategy.to_devices(state)
        del state  # it may be another copy
        cpu.give_back_memory()
        self.clock = Clock(self.start.step + 1)
        self._before: dict[int, Any] = {}
        """With `debug_nans`: step -> a copy of the parameters that it starts from; of two steps,
        because one is under way while the numbers of the one before are read."""
        self.first_step_seconds: float | None = None
        """Of the first step in this process, compilation included."""

    def batch(self, step: int) -> np.ndarray:
        """int32 [batch_size / hosts, block_size + 1]: this host's share of one step's batch."""
        model = self.config.model
        share = batch_at(
            self.dataset.train,
            self.config.seed,
            step,
            batch_size=self.config.batch_size,
            block_size=model.block_size,
            rows=hosts.host_rows(self.config.batch_size),
            parts=self._parts,
        )
        check_ids(share, model.vocab_size)
        return share

    def evaluate(self, n_windows: int) -> float | None:
        """Mean validation loss in nats per token, over `n_windows` evenly spaced windows, always
        the same ones. None if a stop signal interrupts it.

        Raises:
            RunError: it is not finite.
        """
        tokens, model = self.dataset.val, self.config.model
        if not self.start.eval_windows:  # only asked whether it is finite
            tokens = self.dataset.train
        total = window_loss(
            functools.partial(self._eval_step, self.state.params),
            tokens,
            windows_over(len(tokens), model.block_size, at_most=n_windows),
            model,
            self._eval_batch_size,
            stop=self.stop,
        )
        if total is None:
            return None
        nats, count = total
        if not math.isfinite(nats):
            params = jax.tree.map(hosts.whole, self.strategy.for_sampling(self.state.params))
            name = nonfinite.leaf(params)
            why = f": the last update made {name} so" if name else ""
            raise Diverged(
                f"the validation loss became {nats}{why}; {self.checkpoints.last_saved()};"
                f" {slower(self.config)}"
            )
        return nats / count

    def sample(self, step: int) -> str:
        """Text that continues a line end, for the callbacks too."""
        tokenizer, model = self.dataset.tokenizer, self.config.model
        pieces = sampling.generate(
            unstack(self.strategy.for_sampling(self.state.params), model),
            prompt_ids(tokenizer, None),
            self.runtime.sample_tokens,
            model,
            sampling.Sampling(0.8, 200),
            seed=self.config.seed,
            overflow="half",
        )
        # All hosts take part: where the model is sharded, none can compute a token alone.
        until_stop = itertools.takewhile(lambda _: not self._signal(), pieces)
        ids = np.concatenate([np.zeros(0, int), *(piece[0] for piece in until_stop)])
        text = tokenizer.decode(ids.tolist())
        self._call("on_sample", step, text)
        return text

    def _signal(self) -> int:
        """The largest stop signal of all hosts. A collective: all must call it."""
        return max(hosts.all_gather(self.stop()))

    def save(self, step: int, val_loss: float | None = None, unfinished: Row | None = None) -> None:
        """Start a checkpoint of the state after `step` steps, in the background."""
        self._call("on_save", step)
        self._call("on_phase", "saving")
        self.checkpoints.wait()  # for the copy that is still being written
        saved = self.strategy.for_saving(self.state)
        arrays = {"params": saved.params, "opt_state": saved.opt_state}
        self.checkpoints.save(step, arrays, self._metadata(val_loss, unfinished))

    def _metadata(self, val_loss: float | None, unfinished: Row | None = None) -> dict[str, Any]:
        return CheckpointMetadata(
            self.config,
            self.runtime,
            tokenizer=tokenizers.to_json(self.dataset.tokenizer),
            data_fingerprint=self.dataset.fingerprint,
            best_val_loss=self.best_val_loss,
            val_loss=val_loss,
            eval_windows=self.start.eval_windows,
            evaluations_since_best=self.evaluations_since_best,
            attention=self.train_compute[0].attention,
            unfinished=unfinished,
        ).to_dict()

    def fit(self) -> None:
        """Train until `max_steps` steps are done, a stop signal comes or `patience` is over, and
        save.

        Raises:
            RunError: a non-finite loss, a failed save, a bad token.
        """
        self._call("on_start")
        first, last = self.start.step, self.config.max_steps
        if first == 0:
            self._evaluate_untrained()
        if self.start.unfinished and not self.stopped_by:
            self._end_of_step(dict(self.start.unfinished), saved=True)
        if first < last and not self.stopped_by and not self.stopped_early:
            with Prefetch(self.batch, last) as batches:
                self._take_steps(first, last, batches)
        if self.evaluations_since_best and not self.stopped_by:
            self._note_how_it_ended()
        self._call("on_end")

    def _note_how_it_ended(self) -> None:
        """Where it was before the last step, or all was in vain: the last evaluation was not the
        best one. (Else there is nothing to wait for.)"""
        self.checkpoints.wait()
        best = self.checkpoints.candidates("best")[0]
        if self.stopped_early:
            count = self.evaluations_since_best
            self._call(
                "on_note",
                f"stopped early at step {self.step}: no better validation loss than"
                f" {self.best_val_loss:.4f} in {count} evaluation{'s' * (count > 1)} (--patience"
                f" {self.runtime.patience}); the best checkpoint is that of step {best};"
                " a larger --patience goes on",
            )
        loss = self.checkpoints.read_metadata(best)["val_loss"]
        if loss is not None and loss > self.best_val_loss:
            self._call(
                "on_note",
                f"note: the best validation loss, {self.best_val_loss:.4f}, is that of no"
                " checkpoint (the weights that training began with are not saved); the best"
                f" checkpoint is that of step {best}, with {loss:.4f}",
            )

    @property
    def stopped_early(self) -> bool:
        """Whether `patience` is over before the last step."""
        patience, early = self.runtime.patience, self.step < self.config.max_steps
        return early and patience is not None and self.evaluations_since_best >= patience

    def _evaluate_untrained(self) -> None:
        if not self.start.eval_windows:
            return
        with self.clock.paused():
            self._call("on_phase", "evaluating the untrained model")
            loss = self.evaluate(self.start.eval_windows)
        if loss is None:
            self.stopped_by = self._signal()
            return
        self.best_val_loss = loss
        row: Row = dict.fromkeys(("train_loss", "grad_norm", "learning_rate"))
        row |= {"step": 0, "val_loss": loss, "seconds": 0.0}
        self._call("on_step", row)
        self._call("on_evaluate", row, False)

    def _take_steps(self, first: int, last: int, batches: Prefetch[np.ndarray]) -> None:
        """Steps `first` + 1 to `last`. While an accelerator works on one, the numbers of the one
        before are read. (A CPU may have done it when it is started: `cpu.keep_freed_memory`.)"""
        alone = setup.host_count() == 1
        running: tuple[int, train_step.Metrics] | None = None
        self.stopped_by = self._signal()
        if self.stopped_by:
            return
        for step in range(first + 1, last + 1):
            metrics = self._start_step(step, batches)
            stop = self.stop() if alone else 0
            if running:
                row, signal = self._fetch_row(*running)
                stop = stop or signal
                self._report(row)
            running = step, metrics
            if stop or self._evaluates_at(step) or self._saves_at(step):
                (row, signal), running = self._fetch_row(step, metrics), None
                self._end_of_step(row, signal or stop)
                if self.stopped_by or self.stopped_early:
                    return

    def _start_step(self, step: int, batches: Prefetch[np.ndarray]) -> train_step.Metrics:
        """Give the devices the step that makes `step` steps done. Waits only for the first one in
        this process, which is compiled."""
        first = step == self.start.step + 1
        with self.clock.paused() if first else contextlib.nullcontext():
            began, batch = time.perf_counter(), batches(step - 1)
            if first:
                self._call("on_phase", "compiling the training step")
                program = self._train_step.compile(self.state, batch)
                if warning := memory.shortage(program, self.runtime):
                    self._call("on_note", warning)
                cpu.give_back_memory()
            if self.runtime.debug_nans:
                self._before.pop(step - 2, None)
                params = self.strategy.for_sampling(self.state.params)
                self._before[step] = jax.tree.map(jnp.copy, params)
            self._call("before_step", step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):  # for `profile`
                self.state, metrics = self._train_step(self.state, batch, self.stop())
            if first:
                hosts.fetch(metrics)
                self.first_step_seconds = time.perf_counter() - began
        return metrics

    def _fetch_row(self, step: int, metrics: train_step.Metrics) -> tuple[Row, int]:
        """(a step's numbers, the largest stop signal of all hosts), once the step is done. Raises
        RunError if they are not finite."""
        row: Row = {"step": step} | hosts.fetch(metrics)
        self.step = step
        for name in ("train_loss", "grad_norm"):
            if not math.isfinite(row[name]):
                why = f": {self._why_not_finite(step)}" if step in self._before else ""
                more = "" if why else "; --debug-nans names the operation that did it"
                raise Diverged(
                    f"{name} became {row[name]} at step {step}{why};"
                    f" {self.checkpoints.last_saved()}; {slower(self.config)}{more}"
                )
        return row, row.pop("stop")

    def _why_not_finite(self, step: int) -> str:
        """In words; of this host's rows. A collective: all hosts wait for the slowest."""
        self._call("on_phase", "looking for what is not finite")
        params = jax.tree.map(hosts.whole, self._before[step])
        windows = self.batch(step - 1)
        rows = hosts.row_numbers(len(windows))
        size = self.runtime.divide_batch(self.config, setup.device_count())
        try:
            return nonfinite.explain(
                params, windows, rows, size, step - 1, self.config, self.train_compute[0], self.eot
            )
        finally:
            hosts.barrier()

    def _evaluates_at(self, step: int) -> bool:
        return step % self.runtime.eval_interval == 0 or step == self.config.max_steps

    def _saves_at(self, step: int) -> bool:
        interval = self.runtime.save_interval or self.runtime.eval_interval
        return step % interval == 0 or step == self.config.max_steps

    def _end_of_step(self, row: Row, stop: int = 0, *, saved: bool = False) -> None:
        """Evaluate, report, save and stop, whatever of it is due after a step. `saved`: the
        checkpoint was written before an earlier stop, and only its evaluation is missing."""
        step, loss, best, unfinished = row["step"], None, False, None
        due = saved or self._evaluates_at(step)
        if due and self.start.eval_windows:
            if not stop:
                with self.clock.paused():
                    self._call("on_phase", "evaluating")
                    loss = self.evaluate(self.start.eval_windows)
            if loss is None:  # the evaluation is made up for when the run is resumed
                unfinished, stop = dict(row), stop or self._signal()
            else:
                best = self.best_val_loss is None or loss < self.best_val_loss
                self.best_val_loss = loss if best else self.best_val_loss
                self.evaluations_since_best = 0 if best else self.evaluations_since_best + 1
                row["val_loss"] = loss
        if not unfinished:
            self._report(row)
        with self.clock.paused():
            if saved:
                self._call("on_save", step)
                metadata = self._metadata(loss, unfinished)
                self.checkpoints.update_metadata(step, metadata, writes=setup.is_main_host())
            elif stop or best or self.stopped_early or self._saves_at(step):
                # The training loss was that of the parameters before the update: check the new
                # ones by one batch, if they have not been evaluated.
                if loss is None and not stop and self.evaluate(self._eval_batch_size) is None:
                    stop = self._signal()
                self.save(step, loss, unfinished)
            if due and not unfinished and (loss is not None or not stop):
                self._call("on_evaluate", row, best)
        self.stopped_by = stop

    def _report(self, row: Row) -> None:
        if "val_loss" in row or row["step"] % self.runtime.log_interval == 0:
            self._add_speed(row)
        self._call("on_step", row)

    def _add_speed(self, row: Row) -> None:
        # Not known of a step that an earlier process took.
        timed = row["step"] > self.start.step
        rate = self.clock.steps_per_second(row["step"]) if timed else None
        tokens = self.config.batch_size * self.config.model.block_size
        row |= {"tokens_per_second": rate and rate * tokens, "seconds": self.clock.seconds()}

    def _call(self, event: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *args)
