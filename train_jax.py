"""Train a GPT: python train_jax.py [CONFIG.py] [--flags]

Without a config file: configs/quickstart.py, or the run's own settings where --run-dir names a run
that exists. A run that exists is resumed.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from gptjax import (
    beginnings,
    checkpoint,
    cli,
    corpus,
    data,
    devices,
    evaluate,
    generate,
    memory,
    metrics,
    parallel,
    places,
    tokenizers,
    train,
)
from gptjax import config as config_lib
from gptjax.checkpoint import Checkpoints, Facts
from gptjax.config import TrainConfig
from gptjax.data import Dataset
from gptjax.errors import RunError, UserError
from gptjax.model import attention_kernel, compute_dtype, unstack
from gptjax.places import RunLock, place
from gptjax.tokenizers import Tokenizer

# ------------------------------------------------------------------------------ settings


def read_settings(argv: list[str]) -> tuple[TrainConfig, Tokenizer | None]:
    """(the settings, the tokenizer of the weights that the run starts from or resumes).

    The config file, or the existing run's settings, or those for fine-tuning (--init-from), or the
    quickstart; with the architecture of the weights to start from; then the flags.
    """

    def asked(flag: str) -> str | None:
        found = re.findall(rf"(?:^|\0)--{flag}[=\0]([^\0]+)", "\0".join(argv))
        return found[-1] if found else None  # the last of a flag counts, as everywhere

    folder, origin = asked("run[-_]dir"), asked("init[-_]from")
    if argv and not argv[0].startswith("-"):
        name, default = Path(argv[0]).stem, config_lib.load(Path(argv[0]))
    elif folder and (saved := saved_settings(place(folder))):
        name, default = Path(folder).name, saved
    elif origin:
        name, default = f"{Path(origin).name}-finetuned", config_lib.FINETUNE
    else:
        name, default = "quickstart", config_lib.load(config_lib.CONFIGS / "quickstart.py")
    origin = origin or default.init_from
    facts = checkpoint.newest_facts(place(folder or default.run_dir or f"runs/{name}"))
    if origin:
        facts = facts or checkpoint.newest_facts(place(origin))
        if not facts:
            raise UserError(
                f"no run in {origin} (--init-from); to make one from GPT-2's weights:"
                f" python -m gptjax.convert import gpt2 {shlex.quote(origin)}"
            )
        model = config_lib.adopt(default.model, facts.config.model)
        default = dataclasses.replace(default, model=model)
    _, config = cli.parse(default, argv, "python train_jax.py", "[CONFIG.py]")
    config = dataclasses.replace(config, run_dir=config.run_dir or f"runs/{name}")
    if facts is None:
        return config, None
    if origin:
        config = dataclasses.replace(
            config,
            init_from=origin if places.is_remote(place(origin)) else str(Path(origin).absolute()),
            model=config_lib.adopt(config.model, facts.config.model, unset=None),
        )
    tokenizer = tokenizers.from_json(facts.tokenizer, str(origin or config.run_dir))
    if origin or facts.data_fingerprint is None:
        kind = dataclasses.replace(config.data, tokenizer=tokenizer.kind)
        config = dataclasses.replace(config, data=kind)
    return config, tokenizer


def saved_settings(run_dir: Path) -> TrainConfig | None:
    """Those of a run that exists, from config.json or else from its newest checkpoint; without
    the place of its data if they are no longer there: then they are made again."""
    path = run_dir / "config.json"
    try:
        config = config_lib.from_json(path.read_text(encoding="utf-8"), str(path))
    except (FileNotFoundError, NotADirectoryError):
        facts = checkpoint.newest_facts(run_dir)
        if facts is None:
            return None
        config = facts.config
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise UserError(
            f"{error}; mend it, or delete {path} to go on with its newest checkpoint's settings"
        ) from None
    folder = config.data.dir
    # A set that was made from the source can be made again.
    if folder and not Path(folder).exists():
        made, _, _ = Path(folder).name.rpartition("-")
        if made == data.default_name(config.data):
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=None))
    return config


def vocabulary(config: TrainConfig, tokenizer: Tokenizer | None) -> int | None:
    """How many ids there will be; None where only the text can tell."""
    known = {"gpt2": 50257, "sentencepiece": config.data.sentencepiece_vocab_size}
    if tokenizer:
        return tokenizer.n_vocab
    return config.model.vocab_size or known.get(config.data.tokenizer)


def open_data(
    config: TrainConfig, tokenizer: Tokenizer | None, console: Console
) -> tuple[TrainConfig, Dataset]:
    """The prepared set, made first if it is missing; and the config with `data.dir` and the
    model's vocabulary filled in. `tokenizer`: that of the weights that the run starts from."""
    folder = Path(config.data.dir or data.default_dir(config.data))
    if tokenizer and not config.data.dir and not data.is_made_with(folder, tokenizer):
        folder = data.default_dir(config.data, tokenizer)
    if not folder.exists():
        if config.data.dir:
            raise UserError(f"no folder {folder} (--data.dir); python -m gptjax.data makes one")
        try:
            data.prepare(config.data, folder, console, tokenizer)
        except UserError:
            if not folder.exists():  # else another process of this run was faster
                raise
    dataset = data.load(folder)
    if tokenizer and tokenizer.state() != dataset.tokenizer.state():
        raise UserError(
            f"{folder} was made with another {dataset.tokenizer.kind} tokenizer than the"
            f" {tokenizer.kind} one of the weights; leave out --data.dir and name the text"
            " with --data.source"
        )
    ids = dataset.tokenizer.n_vocab
    if config.model.vocab_size not in (None, ids):
        raise UserError(
            f"model.vocab_size {config.model.vocab_size} is not the {ids} ids of the"
            f" {dataset.tokenizer.kind} tokenizer of {folder}; leave it out"
            " (--model.vocab-multiple 64 pads the embedding)"
        )
    need = config.model.block_size + 1
    if len(dataset.train) < need:
        raise UserError(
            f"the training split of {folder} has {len(dataset.train)} tokens, but one block needs"
            f" {need}: use more text or --model.block-size {max(1, len(dataset.train) - 1)} or less"
        )
    return (
        dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, vocab_size=ids),
            data=dataclasses.replace(config.data, dir=str(folder.absolute())),
        ),
        dataset,
    )


# ------------------------------------------------------------------------------- the run


class Run:
    """One training run in progress: what its parts share."""

    def __init__(
        self, config: TrainConfig, dataset: Dataset, checkpoints: Checkpoints, stop: cli.StopSignal
    ):
        self.config = config
        self.dataset = dataset
        self.checkpoints = checkpoints
        self.run_dir = place(config.run_dir or "")
        self.strategy = parallel.strategy(config.parallel.strategy)
        self.train_step = self.strategy.map_train_step(
            functools.partial(train.train_step, config=config), config.gradient_accumulation_steps
        )
        self.eval_step = self.strategy.map_eval_step(
            functools.partial(train.eval_step, config=config.model)
        )
        self.stop = stop
        """What this host has been told."""
        self.stopped_by = 0
        """The signal on which all hosts stopped."""
        self.beginning = beginning = beginnings.begin(
            config, dataset.fingerprint, checkpoints, self.strategy
        )
        self.first_step, self.best_val_loss = beginning.step, beginning.best_val_loss
        self.state = self.strategy.place(beginning.state)

    def batch(self, step: int) -> np.ndarray:
        """int32 [R, block_size + 1]: this host's share of the batch of one step."""
        model = self.config.model
        rows = data.batch_at(
            self.dataset.train,
            self.config.seed,
            step,
            batch_size=self.config.batch_size,
            block_size=model.block_size,
            rows=parallel.host_rows(self.config.batch_size),
        )
        data.check_ids(rows, model.vocab_size)
        return rows

    def evaluate(self, batches: int | None) -> float | None:
        """Mean validation loss in nats per token, over so many batches of fixed windows, or over
        the whole split (None); None where a stop signal cuts it short.

        Raises:
            RunError: it is not finite.
        """
        model, rows = self.config.model, self.config.micro_batch_size
        tokens = self.dataset.val
        some = data.spans(len(tokens), model.block_size, at_most=batches and batches * rows)
        total = evaluate.span_loss(
            functools.partial(self.eval_step, self.state.params),
            tokens, some, model, rows, stop=lambda: self.stop.number,
        )  # fmt: skip
        if total is None:
            return None
        loss, count = total
        if not math.isfinite(loss):
            raise RunError(f"the validation loss became {loss}; {self.checkpoints.safe()}")
        return loss / count

    def _facts(self, val_loss: float | None, unfinished: dict[str, Any] | None = None) -> Facts:
        return Facts(
            self.config,
            tokenizers.to_json(self.dataset.tokenizer),
            self.dataset.fingerprint,
            self.best_val_loss,
            val_loss,
            unfinished,
        )

    def save(self, step: int, facts: Facts, log: metrics.Log) -> None:
        """Start a checkpoint of the state after `step` steps."""
        log.flush()
        self.checkpoints.wait()  # for the copy that is still being written
        one = self.strategy.unplace(self.state)
        self.checkpoints.save(step, one.params, one.opt_state, facts)

    def sample(self) -> str:
        """A continuation of a line end (of token 0 where the tokenizer knows none)."""
        tokenizer = self.dataset.tokenizer
        prompt = tokenizer.encode("\n", skip_unknown=True)
        prompt = prompt if len(prompt) else np.zeros(1, np.int32)
        pieces = generate.generate(
            unstack(self.strategy.for_sampling(self.state.params), self.config.model),
            prompt,
            self.config.sample_tokens,
            self.config.model,
            generate.Sampling(0.8, 200),
            seed=self.config.seed,
            overflow="half",
        )
        # Together: where the hosts share out the model, none can make a token alone.
        wanted = itertools.takewhile(lambda _: not any(parallel.every(self.stop.number)), pieces)
        return tokenizer.decode(np.concatenate([[], *(piece[0] for piece in wanted)]).astype(int))

    def take_step(self, step: int) -> train.Metrics:
        """Train on the batch of `step`; its metrics come when the devices are done."""
        self.state, step_metrics = self.train_step(self.state, self.batch(step), self.stop.number)
        return step_metrics

    def train(self, display: metrics.Display, log: metrics.Log) -> None:
        """The loop, from `first_step` to `max_steps` or a stop signal.

        Raises:
            RunError: a non-finite loss, a failed save, a bad token.
        """
        config = self.config
        save_interval = config.save_interval or config.eval_interval
        tokens_per_step = config.batch_size * config.model.block_size
        eval_batches = None if config.eval_full_split else config.eval_batches
        peak = devices.peak_flops()
        # The first step compiles: it is timed and reported apart from the speed.
        clock = metrics.StepClock(log.seconds, self.first_step + 1)

        def finish(step: int, pending: train.Metrics) -> dict[str, Any]:
            row = {"step": step} | parallel.fetch(pending)
            bad = [n for n in ("train_loss", "grad_norm") if not math.isfinite(row[n])]
            if bad:
                raise RunError(
                    f"{bad[0]} became {row[bad[0]]} at step {step}; {self.checkpoints.safe()};"
                    " lower --learning-rate or raise --warmup-steps, in another --run-dir"
                )
            return row

        def report(row: dict[str, Any]) -> None:
            # Of a step that an earlier process has taken nobody knows.
            pace = clock.steps_per_second(row["step"]) if row["step"] > self.first_step else None
            rate = pace and pace * tokens_per_step
            row |= {"tokens_per_second": rate, "seconds": clock.seconds()}
            log.append(row)
            mfu = rate * config.model.flops_per_token() / peak if rate and peak else None
            display.progress(row, mfu, pace and (config.max_steps - row["step"]) / pace)

        def settle(row: dict[str, Any], *, again: bool = False) -> bool:
            """All that follows the step of `row`: evaluation, report, checkpoint, sample; whether
            to go on. `again`: the checkpoint is there, from before a stop."""
            done, stop = row["step"], row.pop("stop", 0)
            last = done == config.max_steps
            evaluates = again or done % config.eval_interval == 0 or last
            val_loss, best = None, False
            if evaluates and not stop:
                with clock.paused():
                    val_loss = self.evaluate(eval_batches)
            if val_loss is not None:
                row["val_loss"] = val_loss
                best = self.best_val_loss is None or val_loss < self.best_val_loss
                self.best_val_loss = val_loss if best else self.best_val_loss
            cut = evaluates and val_loss is None
            if (evaluates or done % config.log_interval == 0) and not cut:
                report(row)
            facts = self._facts(val_loss, row if cut else None)
            with clock.paused():
                if again:
                    log.flush()
                    self.checkpoints.amend(done, facts, writes=devices.is_main_host())
                elif done % save_interval == 0 or last or best or stop or cut:
                    if val_loss is None and not (stop or cut):
                        # The step's loss was that of the parameters before it.
                        cut = self.evaluate(batches=1) is None
                    self.save(done, facts, log)
                if val_loss is not None:
                    mark = " (best)" if best else ""
                    display.say(f"step {done}: validation loss {val_loss:.4f}{mark}")
                    if config.sample_tokens and not last:
                        display.say(self.sample())
            if stop or cut:
                self.stopped_by = stop or max(parallel.every(self.stop.number))
            return not self.stopped_by

        if self.first_step == 0:
            with clock.paused():
                first_loss = self.best_val_loss = self.evaluate(eval_batches)
            if first_loss is None:
                self.stopped_by = max(parallel.every(self.stop.number))
                return
            log.append({"step": 0, "val_loss": first_loss, "seconds": 0.0})
            display.say(f"step 0: validation loss {first_loss:.4f}")
        unfinished = self.beginning.unfinished
        if unfinished and not settle(unfinished, again=True):
            return

        alone = devices.host_count() == 1
        pending: tuple[int, train.Metrics] | None = None
        for done in range(self.first_step + 1, config.max_steps + 1):
            if done == self.first_step + 1:
                with clock.paused():
                    began = time.perf_counter()
                    step_metrics = self.take_step(done - 1)
                    parallel.fetch(step_metrics)
                    took = time.perf_counter() - began
                    display.say(f"compiled and took the first step in {took:.1f} s")
            else:
                step_metrics = self.take_step(done - 1)
            # Read the metrics of the step before while this one runs.
            stop = self.stop.number if alone else 0
            if pending:
                row = finish(*pending)
                stop = stop or row["stop"]
                if row["step"] % config.log_interval == 0:
                    report(row)
            pending = (done, step_metrics)
            intervals = config.eval_interval, save_interval
            if stop or done == config.max_steps or any(done % n == 0 for n in intervals):
                row, pending = finish(done, step_metrics), None
                row["stop"] = row["stop"] or stop
                if not settle(row):
                    return


def main(argv: list[str]) -> None:
    config, tokenizer = read_settings(argv)
    # What can be refused before a long text is tokenised is refused here.
    run_dir = place(config.run_dir or "")
    for folder in (run_dir, run_dir / "checkpoints"):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; expected a folder (--run-dir)")
    size = config.model.num_parameters(embeddings=False)
    devices.start(config.device, config.num_devices, size, config.distributed)
    # The others will find each other anew when the run is resumed.
    config = dataclasses.replace(config, distributed=config_lib.DistributedConfig())
    devices.use_compilation_cache(corpus.cache_dir() / "xla")
    parallel.meet()
    config.divide_batch(devices.device_count())
    kernel, why = attention_kernel(config.model, train=True)
    if config.model.attention == "cudnn" != kernel:
        raise UserError(f"--model.attention cudnn does not fit here: {why}")
    ids = vocabulary(config, tokenizer)
    if config.dry_run and ids:
        model = dataclasses.replace(config.model, vocab_size=ids)
        memory.dry_run(dataclasses.replace(config, model=model))
        return
    config, dataset = open_data(config, tokenizer, Console())
    if config.dry_run:
        memory.dry_run(config)
    else:
        train_in(run_dir, config, dataset)


def seen_by_all(lock: RunLock) -> bool:
    """Whether all hosts read there what the first one has written; a network disk may take some
    seconds."""
    for _ in range(10):
        if parallel.same(lock.holder()):
            return True
        time.sleep(1)
    return False


def train_in(run_dir: Path, config: TrainConfig, dataset: Dataset) -> None:
    """Train, unless another process does; at the end, how to go on or what to do with it.

    Raises:
        UserError: the run is in use, or another one.
        RunError: what was begun cannot be finished.
    """
    resume = f"python train_jax.py --run-dir {shlex.quote(str(run_dir))}"
    place_free = dataclasses.replace(config.data, dir=None)
    anywhere = dataclasses.replace(config, init_from=None, data=place_free)
    if not parallel.same(config_lib.to_json(anywhere) + dataset.fingerprint):
        raise UserError("the hosts have different settings or data; start the same command on all")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = RunLock(run_dir)
        holder = lock.acquire() if devices.is_main_host() else None
        if any(parallel.every(int(holder is not None))):
            raise UserError(
                f"{run_dir} is in use by {holder or 'a process of the first host'}; wait for it or"
                " stop it, or name another --run-dir"
            )
        if not seen_by_all(lock):
            raise UserError(
                f"{run_dir} is not one folder for all hosts; name one that they share, or gs://..."
            )
        with (
            cli.StopSignal() as stop,
            Checkpoints(run_dir, config.keep_checkpoints) as checkpoints,
        ):
            run = Run(config, dataset, checkpoints, stop)
            if devices.is_main_host():
                places.replace_file(run_dir / "config.json", config_lib.to_json(config) + "\n")
            with metrics.Display(
                total=config.max_steps, done=run.first_step, visible=devices.is_main_host()
            ) as display:
                describe(run, display)
                run_loop(run, display)
                if not run.stopped_by:
                    finale(run, display)
    except OSError as error:
        raise RunError(f"{error.filename or run_dir}: {error.strerror or error}") from error
    if run.stopped_by:
        step = checkpoints.latest_step
        kept = "before the first step" if step is None else f"saved step {step}"
        with contextlib.suppress(OSError):  # whoever reads it, or not
            print(f"stopped; {kept}. Resume: {resume}", flush=True)
        sys.exit(128 + run.stopped_by)


def describe(run: Run, display: metrics.Display) -> None:
    """What is about to happen, before it takes its time."""
    config, model = run.config, run.config.model
    steps = config.gradient_accumulation_steps
    rows = config.divide_batch(devices.device_count())
    kernels = [attention_kernel(model, train=train) for train in (True, False)]
    attention = "{} ({})".format(*kernels[0])
    if kernels[0][0] != kernels[1][0]:
        attention += "; in evaluation {} ({})".format(*kernels[1])
    for note in run.beginning.notes:
        display.say(note)
    display.say(
        f"run        {run.run_dir} ({run.beginning.origin})\n"
        f"data       {os.path.relpath(config.data.dir or '')}:"
        f" {len(run.dataset.train):,} training and {len(run.dataset.val):,} validation tokens,"
        f" {run.dataset.tokenizer.kind} tokenizer\n"
        f"model      {model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, block"
        f" {model.block_size}, {model.vocab_size:,} ids: {model.num_parameters():,} parameters\n"
        f"devices    {devices.describe()}, computing in {compute_dtype(model).name}\n"
        f"attention  {attention}\n"
        f"batch      {config.batch_size} x {model.block_size} ="
        f" {config.batch_size * model.block_size:,} tokens per step ({devices.device_count()}"
        f" devices x {steps} accumulation steps x {rows} sequences)"
    )


def run_loop(run: Run, display: metrics.Display) -> None:
    """Train, unless nothing is left to do."""
    # The row of a step that is to be evaluated again is not there yet, or will be replaced.
    kept_until = run.first_step - (1 if run.beginning.unfinished else 0)
    path = run.run_dir / "metrics.jsonl"
    resumes = run.first_step > 0
    log = metrics.Log(path, kept_until if resumes else None, writes=devices.is_main_host())
    if run.first_step >= run.config.max_steps and not run.beginning.unfinished:
        display.say(f"this run is complete at step {run.first_step}")
        return
    try:
        run.train(display, log)
    finally:
        log.flush()


def finale(run: Run, display: metrics.Display) -> None:
    """A sample, and how to get more."""
    if run.config.sample_tokens:
        display.say(f"\na sample:\n{run.sample()}\n")
    command = f"python generate_jax.py --run-dir {shlex.quote(str(run.run_dir))}"
    display.say(f"more samples: {command} --num-samples 3")


if __name__ == "__main__":
    sys.exit(cli.run(main))
