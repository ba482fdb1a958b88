"""What a training run shows: a live line with a bar on a terminal, plain lines elsewhere, nothing
on other hosts than the main one."""

import contextlib
import os

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from gptjax import program
from gptjax.devices import setup
from gptjax.trainer import Callback, Row, Trainer


class _Console(Console):
    """Rich ends the process when a reader goes away; a training run must not end for that."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class ProgressDisplay(Callback):
    """Prints what is about to happen, each log interval's numbers, and each evaluation."""

    def on_start(self, trainer: Trainer) -> None:
        visible = setup.is_main_host()
        self._console = _Console(quiet=not visible, highlight=False, soft_wrap=True)
        self._live = self._console.is_terminal and visible
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(None), console=self._console,
            disable=not self._live, refresh_per_second=4,
        )  # fmt: skip
        first, last = trainer.start.step, trainer.config.max_steps
        self._task = self._bar.add_task("", total=last, completed=first)
        self._bar.start()
        self.say("\n".join([*trainer.start.notes, describe(trainer)]))
        if first >= last and not trainer.start.unfinished:
            self.say(f"this run is complete at step {first}")

    def say(self, text: str) -> None:
        """A line that stays. Where nobody can read it any more, the work goes on."""
        with contextlib.suppress(OSError):
            self._console.print(text, markup=False)

    def on_step(self, trainer: Trainer, row: Row) -> None:
        first, last = trainer.start.step, trainer.config.max_steps
        if row["step"] == first + 1 and trainer.first_step_seconds is not None:
            self.say(f"compiled and took the first step in {trainer.first_step_seconds:.1f} s")
        if "seconds" not in row or row.get("train_loss") is None:
            return
        rate, peak = row["tokens_per_second"], setup.peak_flops()
        model = trainer.config.model
        mfu = rate * model.flops_per_token() / peak if rate and peak else None
        tokens_left = (last - row["step"]) * trainer.config.batch_size * model.block_size
        line = (
            f"step {row['step']}/{last} | loss {row['train_loss']:.4f}"
            f" | lr {row['learning_rate']:.2e} | grad norm {row['grad_norm']:.2f}"
            f" | {f'{rate:,.0f}' if rate else '-'} tokens/s"
            f" | MFU {'unknown' if mfu is None else f'{mfu:.1%}'}"
            f" | {duration(tokens_left / rate) if rate else '-'} left"
        )
        self._bar.update(self._task, completed=row["step"], description=line)
        if not self._live:
            self.say(line)

    def on_evaluate(self, trainer: Trainer, row: Row, best: bool) -> None:
        mark = " (best)" if best else ""
        self.say(f"step {row['step']}: validation loss {row['val_loss']:.4f}{mark}")

    def on_end(self, trainer: Trainer) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, also after an error."""
        if hasattr(self, "_bar"):
            self._bar.stop()


class Samples(Callback):
    """Prints a sample after each evaluation and at the end."""

    def __init__(self, display: ProgressDisplay):
        self._display = display

    def on_evaluate(self, trainer: Trainer, row: Row, best: bool) -> None:
        if 0 < row["step"] < trainer.config.max_steps and trainer.runtime.sample_tokens:
            self._display.say(trainer.sample())

    def on_end(self, trainer: Trainer) -> None:
        if trainer.stopped_by:
            return
        if trainer.runtime.sample_tokens:
            self._display.say(f"\na sample:\n{trainer.sample()}\n")
        run_dir = trainer.checkpoints.run_dir
        more = program.command("generate", "--run-dir", run_dir, "--num-samples", 3)
        self._display.say(f"more samples: {more}")


def describe(trainer: Trainer) -> str:
    """The run, in a few lines: what is about to happen, before it takes its time."""
    config, model, dataset = trainer.config, trainer.config.model, trainer.dataset
    steps = trainer.runtime.gradient_accumulation_steps
    rows = trainer.runtime.divide_batch(config, setup.device_count())
    attention = "{} ({})".format(*trainer.train_kernel)
    if trainer.train_kernel[0] != trainer.eval_kernel[0]:
        attention += "; in evaluation {} ({})".format(*trainer.eval_kernel)
    return (
        f"run        {trainer.checkpoints.run_dir} ({trainer.start.origin})\n"
        f"data       {os.path.relpath(config.data.dir or '.')}:"
        f" {len(dataset.train):,} training and {len(dataset.val):,} validation tokens,"
        f" {dataset.tokenizer.kind} tokenizer\n"
        f"model      {model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, block"
        f" {model.block_size}, {model.vocab_size:,} ids: {model.num_parameters():,} parameters\n"
        f"devices    {setup.describe()}, computing in {model.dtype}\n"
        f"attention  {attention}\n"
        f"batch      {config.batch_size} x {model.block_size} ="
        f" {config.batch_size * model.block_size:,} tokens per step (devices {setup.device_count()}"
        f" x accumulation steps {steps} x sequences {rows})"
    )


def duration(seconds: float) -> str:
    """ "1h02m", "3m20s" or "12s"."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
