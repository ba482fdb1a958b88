"""Train a GPT: python train_jax.py [CONFIG.py] [--flags]

Without a config file: configs/quickstart.py, or the run's own settings where --run-dir names a run
that exists. A run that exists is resumed.
"""

import dataclasses
import functools
import math
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from gptjax import (
    checkpoint,
    cli,
    corpus,
    data,
    evaluate,
    generate,
    metrics,
    optim,
    parallel,
    tokenizers,
    train,
)
from gptjax import config as config_lib
from gptjax.checkpoint import Checkpoints, Facts
from gptjax.config import TrainConfig
from gptjax.data import Dataset
from gptjax.errors import RunError, UserError
from gptjax.model import Params, attention_kernel, compute_dtype, unstack
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
    elif folder and (saved := saved_settings(Path(folder))):
        name, default = Path(folder).name, saved
    elif origin:
        name, default = f"{Path(origin).name}-finetuned", config_lib.FINETUNE
    else:
        name, default = "quickstart", config_lib.load(config_lib.CONFIGS / "quickstart.py")
    origin = origin or default.init_from
    facts = checkpoint.newest_facts(Path(folder or default.run_dir or f"runs/{name}"))
    if origin:
        facts = facts or checkpoint.newest_facts(Path(origin))
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
            init_from=str(Path(origin).absolute()),
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
        data.prepare(config.data, folder, console, tokenizer)
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

    def __init__(self, config: TrainConfig, dataset: Dataset, checkpoints: Checkpoints):
        self.config = config
        self.dataset = dataset
        self.checkpoints = checkpoints
        self.run_dir = Path(config.run_dir or "")
        self.train_step = parallel.map_train_step(
            functools.partial(train.train_step, config=config)
        )
        self.eval_step = parallel.map_eval_step(
            functools.partial(train.eval_step, config=config.model)
        )
        self.best_val_loss: float | None = None
        self.stop_signal = 0
        """The signal that this host has received."""
        self.stopped_by = 0
        """The signal on which all hosts stopped."""
        self.origin = "new"
        self.state = self._initial_or_resumed()
        self.first_step = int(parallel.fetch({"step": self.state.step})["step"])

    def _initial_or_resumed(self) -> train.TrainState:
        step = self.checkpoints.latest_step
        if step is None and self.config.init_from:
            self.origin = f"from {self.config.init_from}"
            return parallel.replicate(self._from_weights(Path(self.config.init_from)))
        if step is None:
            return parallel.replicate(jax.jit(lambda: train.init_state(self.config))())
        facts = self.checkpoints.facts(step)
        trained_on = facts.data_fingerprint
        conflicts = config_lib.resume_conflicts(facts.config, self.config, imported=not trained_on)
        if trained_on and trained_on != self.dataset.fingerprint:
            conflicts.append(
                f"the tokens: fingerprint {trained_on[:12]} in the run,"
                f" {self.dataset.fingerprint[:12]} in {self.config.data.dir} now"
            )
        if conflicts:
            raise UserError(
                f"{self.run_dir} holds a run with other settings; " + "; ".join(conflicts)
                + "; resume it without changes, or name another --run-dir"
            )  # fmt: skip
        self.origin = f"resumed at step {step}" if trained_on else f"imported, at step {step}"
        self.best_val_loss = facts.best_val_loss
        shapes = jax.eval_shape(lambda: train.init_state(self.config))
        targets = checkpoint.abstract(shapes, parallel.one_per_host())
        wanted: dict[str, Any] = {"params": targets.params}
        if self.checkpoints.has_optimizer(step):
            wanted["opt_state"] = targets.opt_state
        loaded = self.checkpoints.restore(step, **wanted)
        opt_state = loaded.get("opt_state") or self._fresh_optimizer(loaded["params"])
        return parallel.replicate(train.TrainState(jnp.int32(step), loaded["params"], opt_state))

    def _fresh_optimizer(self, params: Params) -> Any:
        return jax.jit(optim.optimizer(self.config).init)(params)

    def _from_weights(self, run_dir: Path) -> train.TrainState:
        """Step 0 with the best weights of another run, their position table cropped."""
        params = checkpoint.load(run_dir, "best", parallel.one_per_host()).params
        if "wpe" in params:
            crop = jax.jit(lambda table: table[: self.config.model.block_size])
            params = params | {"wpe": crop(params["wpe"])}
        return train.TrainState(jnp.int32(0), params, self._fresh_optimizer(params))

    def batch(self, step: int) -> np.ndarray:
        """This host's share of the batch of one step, laid out for its devices."""
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
        return parallel.split_rows(rows, self.config.gradient_accumulation_steps)

    def _safe(self) -> str:
        step = self.checkpoints.latest_step
        return "there is no checkpoint yet" if step is None else f"step {step} is saved"

    def evaluate(self, batches: int | None) -> float:
        """Mean validation loss in nats per token, over so many batches of fixed windows, or over
        the whole split (None).

        Raises:
            RunError: it is not finite.
        """
        model, rows = self.config.model, self.config.micro_batch_size
        tokens = self.dataset.val
        some = data.spans(len(tokens), model.block_size, at_most=batches and batches * rows)
        params = self.state.params
        loss, count = evaluate.span_loss(self.eval_step, params, tokens, some, model, rows)
        if not math.isfinite(loss):
            raise RunError(f"the validation loss became {loss}; {self._safe()}")
        return loss / count

    def save(self, step: int, val_loss: float | None) -> None:
        """Start a checkpoint of the state after `step` steps, having made sure that it is sound:
        a training loss is that of the parameters before its step."""
        if val_loss is None:
            self.evaluate(batches=1)
        facts = Facts(
            self.config,
            tokenizers.to_json(self.dataset.tokenizer),
            self.dataset.fingerprint,
            self.best_val_loss,
        )
        one = parallel.unreplicate(self.state)
        self.checkpoints.save(step, one.params, one.opt_state, facts, val_loss)

    def sample(self) -> str:
        """A continuation of a line end (of token 0 where the tokenizer knows none)."""
        tokenizer = self.dataset.tokenizer
        prompt = tokenizer.encode("\n", skip_unknown=True)
        prompt = prompt if len(prompt) else np.zeros(1, np.int32)
        pieces = generate.generate(
            unstack(parallel.first_copy(self.state.params), self.config.model),
            prompt,
            self.config.sample_tokens,
            self.config.model,
            generate.Sampling(0.8, 200),
            seed=self.config.seed,
            overflow="half",
        )
        return tokenizer.decode(np.concatenate(list(pieces), axis=1)[0])

    def take_step(self, step: int) -> train.Metrics:
        """Train on the batch of `step`; its metrics come when the devices are done."""
        batch = self.batch(step)
        self.state, step_metrics = self.train_step(self.state, batch, self.stop_signal)
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
        peak = parallel.peak_flops()

        def finish(step: int, pending: train.Metrics) -> dict[str, Any]:
            row = {"step": step} | parallel.fetch(pending)
            bad = [n for n in ("train_loss", "grad_norm") if not math.isfinite(row[n])]
            if bad:
                raise RunError(
                    f"{bad[0]} became {row[bad[0]]} at step {step}; {self._safe()};"
                    " lower --learning-rate or raise --warmup-steps, in another --run-dir"
                )
            return row

        # The first step compiles: it is timed and reported apart from the speed.
        clock = metrics.StepClock(log.seconds, self.first_step + 1)

        def report(row: dict[str, Any]) -> None:
            pace = clock.steps_per_second(row["step"])
            rate = pace and pace * tokens_per_step
            row |= {"tokens_per_second": rate, "seconds": clock.seconds()}
            log.append(row)
            mfu = rate * config.model.flops_per_token() / peak if rate and peak else None
            display.progress(row, mfu, pace and (config.max_steps - row["step"]) / pace)

        if self.first_step == 0:
            with clock.paused():
                first_loss = self.best_val_loss = self.evaluate(eval_batches)
                log.append({"step": 0, "val_loss": first_loss, "seconds": 0.0})
                display.say(f"step 0: validation loss {first_loss:.4f}")

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
            stop = 0
            if pending:
                row = finish(*pending)
                stop = row["stop"]
                if row["step"] % config.log_interval == 0:
                    report(row)
            pending = (done, step_metrics)

            last = done == config.max_steps
            evaluates = done % config.eval_interval == 0 or last
            saves = done % save_interval == 0 or last
            if not (evaluates or saves or stop):
                continue
            row, pending = finish(done, step_metrics), None
            stop = stop or row["stop"]
            val_loss, best = None, False
            if evaluates:
                with clock.paused():
                    val_loss = self.evaluate(eval_batches)
                    row["val_loss"] = val_loss
                    best = self.best_val_loss is None or val_loss < self.best_val_loss
                    self.best_val_loss = val_loss if best else self.best_val_loss
            if evaluates or done % config.log_interval == 0:
                report(row)
            with clock.paused():
                if saves or stop or best:
                    self.save(done, val_loss)
                if val_loss is not None:
                    mark = " (best)" if best else ""
                    display.say(f"step {done}: validation loss {val_loss:.4f}{mark}")
                    if config.sample_tokens and not last:
                        display.say(self.sample())
            if stop:
                self.stopped_by = stop
                return


def main(argv: list[str]) -> None:
    config, tokenizer = read_settings(argv)
    # What can be refused before a long text is tokenised is refused here.
    run_dir = Path(config.run_dir or "")
    for folder in (run_dir, run_dir / "checkpoints"):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; expected a folder (--run-dir)")
    size = config.model.num_parameters(embeddings=False)
    parallel.start(config.device, config.num_devices, size)
    parallel.use_compilation_cache(corpus.cache_dir() / "xla")
    config.divide_batch(parallel.device_count())
    kernel, why = attention_kernel(config.model, train=True)
    if config.model.attention == "cudnn" != kernel:
        raise UserError(f"--model.attention cudnn does not fit here: {why}")
    config, dataset = open_data(config, tokenizer, Console())

    resume = f"python train_jax.py --run-dir {shlex.quote(str(run_dir))}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with Checkpoints(run_dir, config.keep_checkpoints) as checkpoints:
            run = Run(config, dataset, checkpoints)
            if parallel.is_main_host():
                config_lib.write(run_dir / "config.json", config)
            with metrics.Display(
                total=config.max_steps, done=run.first_step, visible=parallel.is_main_host()
            ) as display:
                describe(run, display)
                run_loop(run, display)
                if not run.stopped_by:
                    finale(run, display)
    except OSError as error:
        raise RunError(f"{error.filename or run_dir}: {error.strerror or error}") from error
    if run.stopped_by:
        print(f"stopped; saved step {checkpoints.latest_step}. Resume: {resume}")
        sys.exit(128 + run.stopped_by)


def describe(run: Run, display: metrics.Display) -> None:
    """What is about to happen, before it takes its time."""
    config, model = run.config, run.config.model
    steps = config.gradient_accumulation_steps
    rows = config.divide_batch(parallel.device_count())
    kernels = [attention_kernel(model, train=train) for train in (True, False)]
    attention = "{} ({})".format(*kernels[0])
    if kernels[0][0] != kernels[1][0]:
        attention += "; in evaluation {} ({})".format(*kernels[1])
    display.say(
        f"run        {run.run_dir} ({run.origin})\n"
        f"data       {os.path.relpath(config.data.dir or '')}:"
        f" {len(run.dataset.train):,} training and {len(run.dataset.val):,} validation tokens,"
        f" {run.dataset.tokenizer.kind} tokenizer\n"
        f"model      {model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, block"
        f" {model.block_size}, {model.vocab_size:,} ids: {model.num_parameters():,} parameters\n"
        f"devices    {parallel.describe()}, computing in {compute_dtype(model).name}\n"
        f"attention  {attention}\n"
        f"batch      {config.batch_size} x {model.block_size} ="
        f" {config.batch_size * model.block_size:,} tokens per step ({parallel.device_count()}"
        f" devices x {steps} accumulation steps x {rows} sequences)"
    )


def run_loop(run: Run, display: metrics.Display) -> None:
    """Train, with Ctrl-C and SIGTERM turned into a saved stop; a second one ends at once."""
    path = run.run_dir / "metrics.jsonl"
    log = metrics.Log(path, run.first_step, writes=parallel.is_main_host())
    if run.first_step >= run.config.max_steps:
        display.say(f"this run is complete at step {run.first_step}")
        return

    def stop(number: int, _: Any) -> None:
        run.stop_signal = number
        signal.signal(number, signal.SIG_DFL)

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        run.train(display, log)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finale(run: Run, display: metrics.Display) -> None:
    """A sample, and how to get more."""
    if run.config.sample_tokens:
        display.say(f"\na sample:\n{run.sample()}\n")
    command = f"python generate_jax.py --run-dir {shlex.quote(str(run.run_dir))}"
    display.say(f"more samples: {command} --num-samples 3")


if __name__ == "__main__":
    sys.exit(cli.run(main))
