"""What a training run shows: a live line on a terminal, plain lines elsewhere, nothing on other
hosts than the main one."""

import os
import threading
import time
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.containers import Lines
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gptjax import console, finetune, program, remat
from gptjax.devices import setup
from gptjax.trainer import Callback, Row, Trainer

SCROLLBACK_SECONDS = 10.0
"""On a terminal a line stays so often, beside the evaluations; elsewhere at each log interval."""
SILENCE_SECONDS = 10.0
"""Outside a terminal, what takes longer is named."""
LEAST_BAR = 10
"""Columns. Where fewer are left there is no bar."""
INDENT = " " * 11
"""Of what `describe` says."""

Field = tuple[str, str]
"""A number in full, and abbreviated for narrow terminals; "" where it is left out there."""


class _LiveLine:
    """The terminal's last line, laid out anew at each refresh: the terminal may have been resized,
    and time goes on."""

    def __init__(self, step: int, last: int):
        self.step, self._last = step, last
        self.fields: list[Field] = []
        self.phase = ""
        self._began = time.monotonic()

    def begin(self, phase: str) -> None:
        """What is done from now on, until the next `begin`; "": steps are taken."""
        self.phase, self._began = phase, time.monotonic()

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        fields = self.fields or [step_field(self.step, self._last)]
        if self.phase:
            seconds = time.monotonic() - self._began
            waited = f" ({duration(seconds)})" if seconds >= 1 else ""
            fields = [fields[0], (f"{self.phase}{waited}", self.phase)]
        text = fit(fields, options.max_width)
        grid = Table.grid()
        rest = options.max_width - len(text) - 1
        if rest < LEAST_BAR:
            grid.add_row(text)
        else:
            grid.add_row(f"{text} ", ProgressBar(self._last, self.step, width=rest))
        yield grid


class ProgressDisplay(Callback):
    """Prints what is about to happen, each log interval's numbers, and each evaluation."""

    def on_start(self, trainer: Trainer) -> None:
        visible = setup.is_main_host()
        self._console = console.make(quiet=not visible)
        self._is_live = visible and self._console.is_terminal
        first, last = trainer.start.step, trainer.config.max_steps
        self._line = _LiveLine(first, last)
        self._live = Live(self._line, console=self._console) if self._is_live else None
        self._stayed, self._val_loss = -SCROLLBACK_SECONDS, list[Field]()
        self._timer: threading.Timer | None = None
        if self._live:
            self._live.start()
        for note in trainer.start.notes:
            self.say(note)
        self.say(describe(trainer), indent=INDENT)
        if first >= last and not trainer.start.unfinished:
            self.say(f"this run is complete at step {first}")

    def say(self, text: str, *, indent: str = "", copied: bool = False) -> None:
        """Lines that stay. On a terminal they are cut between words, with `indent` before the rest
        of a line, unless they are to be `copied`."""
        if self._is_live and not copied:
            width = self._console.width
            indent = indent[: width // 4]
            text = "\n".join(
                f"\n{indent}".join(part.plain for part in self._wrap(line, width - len(indent)))
                for line in text.split("\n")
            )
        self._console.print(text)

    def _wrap(self, line: str, width: int) -> Lines:
        return Text(line).wrap(self._console, width, overflow="fold", tab_size=8)

    def begin(self, phase: str) -> None:
        """What is done from now on, until something else is; "": steps are taken."""
        self._line.begin(phase)
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if phase and not self._is_live:
            self._timer = threading.Timer(SILENCE_SECONDS, self.say, [f"{phase} ..."])
            self._timer.daemon = True
            self._timer.start()

    def on_phase(self, trainer: Trainer, phase: str) -> None:
        self.begin(phase)

    def on_note(self, trainer: Trainer, text: str) -> None:
        self.say(text)

    def on_step(self, trainer: Trainer, row: Row) -> None:
        self.begin("")
        self._line.step = row["step"]
        if row["step"] == trainer.start.step + 1 and trainer.first_step_seconds is not None:
            self.say(f"compiled and took the first step in {trainer.first_step_seconds:.1f} s")
        if row.get("train_loss") is None:
            return
        step = step_field(row["step"], trainer.config.max_steps)
        if "seconds" not in row:  # the step is new, the rest stays for a moment
            self._line.fields[:1] = [step]
            return
        numbers = fields(trainer, row)
        self._line.fields = [step, numbers[0], *self._val_loss, *numbers[1:]]
        now = time.monotonic()
        if not self._is_live:
            self.say(" | ".join(full for full, _ in (step, *numbers)))
        elif now - self._stayed >= SCROLLBACK_SECONDS:
            self._stayed = now
            self.say(fit([step, *numbers], self._console.width))

    def on_evaluate(self, trainer: Trainer, row: Row, best: bool) -> None:
        self.begin("")
        if "val_loss" not in row:
            return
        loss = f"{row['val_loss']:.4f}"
        before, self._val_loss = len(self._val_loss), [(f"val loss {loss}", f"val {loss}")]
        self._line.fields[2 : 2 + before] = self._val_loss * bool(self._line.fields)
        mark = " (best)" if best else ""
        self.say(f"step {row['step']}: validation loss {loss}{mark}")

    def on_end(self, trainer: Trainer) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, also after an error."""
        if hasattr(self, "_line"):
            self.begin("")
            if self._live:
                self._live.stop()


class Samples(Callback):
    """Prints a sample after each evaluation and at the end."""

    def __init__(self, display: ProgressDisplay):
        self._display = display

    def on_evaluate(self, trainer: Trainer, row: Row, best: bool) -> None:
        if 0 < row["step"] < trainer.config.max_steps and not trainer.stopped_early:
            self._say_sample(trainer, row["step"])

    def on_end(self, trainer: Trainer) -> None:
        if trainer.stopped_by:
            return
        self._say_sample(trainer, trainer.step)
        run_dir = trainer.checkpoints.run_dir
        more = program.command("generate", "--run-dir", run_dir, "--num-samples", 3)
        self._display.say(f"more samples: {more}", copied=True)

    def _say_sample(self, trainer: Trainer, step: int) -> None:
        if trainer.runtime.sample_tokens:
            self._display.begin("sampling")
            sample = trainer.sample(step)
            self._display.begin("")
            self._display.say(f"\nsample after step {step}:\n{sample}\n")


def step_field(step: int, last: int) -> Field:
    return f"step {step}/{last}", f"{step}/{last}"


def fields(trainer: Trainer, row: Row) -> list[Field]:
    """A step's numbers, what matters most first; those that are not known are left out."""
    last, model = trainer.config.max_steps, trainer.config.model
    found = [(f"loss {row['train_loss']:.4f}",) * 2]
    rate, peak = row.get("tokens_per_second"), setup.peak_flops()
    if rate:
        left = (last - row["step"]) * trainer.config.batch_size * model.block_size / rate
        found.append((f"{rate:,.0f} tokens/s", f"{short(rate)} tok/s"))
        found.append((f"{duration(left)} left",) * 2)
    found.append((f"lr {row['learning_rate']:.2e}", ""))
    found.append((f"grad norm {row['grad_norm']:.2f}", ""))
    if rate and peak:
        found.append((f"MFU {rate * model.flops_per_token() / peak:.1%}", ""))
    return found


def fit(fields: Sequence[Field], width: int) -> str:
    """The first of them that fit `width` columns: in full, if so all fit that have a short form;
    else those forms."""
    words: list[str] = []
    for separator, form, least in (
        (" | ", 0, sum(bool(short) for _, short in fields)),
        (" ", 1, 1),
    ):
        words = [field[form] for field in fields if field[form]]
        for count in range(len(words), least - 1, -1):
            line = separator.join(words[:count])
            if len(line) <= width:
                return line
    return words[0][:width]


def describe(trainer: Trainer) -> str:
    """The run, in a few lines: what is about to happen, before it takes its time."""
    config, model, dataset = trainer.config, trainer.config.model, trainer.dataset
    steps = trainer.runtime.gradient_accumulation_steps
    rows = trainer.runtime.divide_batch(config, setup.device_count())
    (compute, why), (evaluating, why_there) = trainer.train_compute, trainer.eval_compute
    attention = f"{compute.attention} ({why})"
    if evaluating.attention != compute.attention:
        attention += f"; in evaluation {evaluating.attention} ({why_there})"
    layers = ""
    if compute.scan_unroll < model.n_layer:
        again = remat.AGAIN[str(compute.remat)]
        layers = f"layers     a loop; the backward pass computes again {again}\n"
    trained = ""
    if finetune.is_partial(config):
        trained = f"trained    {finetune.describe(config)} parameters\n"
    folder = config.data.dir or "."
    return (
        f"run        {trainer.checkpoints.run_dir} ({trainer.start.origin})\n"
        f"data       {folder if '://' in folder else os.path.relpath(folder)}:"
        f" {len(dataset.train):,} training and {len(dataset.val):,} validation tokens,"
        f" {dataset.tokenizer.kind} tokenizer\n"
        f"model      {model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, block"
        f" {model.block_size}, {model.vocab_size:,} ids: {model.num_parameters():,} parameters\n"
        f"{trained}"
        f"devices    {setup.describe()}, computing in {model.dtype}\n"
        f"attention  {attention}\n"
        f"{layers}"
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


def short(number: float) -> str:
    """Three digits: "987", "38.0k", "1.20M"."""
    for unit in ("", "k", "M", "G"):
        if number < 999.5 or unit == "G":
            break
        number /= 1000
    digits = 0 if not unit or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f}{unit}"
