"""What a run shows, to a terminal and to a file."""

import io
import re
import sys
import types

import pytest
from rich.console import Console

from gptjax import progress
from gptjax.config import DataConfig, ModelConfig, TrainConfig
from gptjax.devices import setup
from gptjax.progress import ProgressDisplay, Samples
from gptjax.runtime_config import ComputeConfig, RuntimeConfig


def trainer_at(step=0, notes=(), **more):
    """As a Trainer, for what is shown."""
    model = ModelConfig(2, 2, 16, 10, vocab_size=1234, dtype="float32")
    return types.SimpleNamespace(
        config=TrainConfig(model, DataConfig(dir="data/set"), batch_size=16, max_steps=100),
        runtime=RuntimeConfig(gradient_accumulation_steps=2, sample_tokens=5),
        dataset=types.SimpleNamespace(
            train=range(12345), val=range(678), tokenizer=types.SimpleNamespace(kind="char")
        ),
        checkpoints=types.SimpleNamespace(run_dir="a run"),
        train_compute=(ComputeConfig("xla", "mlp", 1), "attention dropout"),
        eval_compute=(ComputeConfig("cudnn"), "flash attention"),
        start=types.SimpleNamespace(step=step, notes=list(notes), unfinished=None, origin="new"),
        first_step_seconds=None,
        stopped_by=0,
        stopped_early=False,
        step=100,
        sample=lambda step: "[red]hello",
        **more,
    )


def row(step, **other):
    numbers = {"train_loss": 1.5, "learning_rate": 1e-3, "grad_norm": 0.25}
    return {"step": step, "tokens_per_second": 1000.0, "seconds": 1.0} | numbers | other


@pytest.fixture
def display(monkeypatch):
    monkeypatch.setattr(setup, "peak_flops", lambda: None)
    display = ProgressDisplay()
    yield display
    display.close()


def test_a_run_begins_with_what_is_about_to_happen(display, capsys):
    display.on_start(trainer_at(notes=["note: [not markup]"]))
    out = capsys.readouterr().out
    assert out.startswith("note: [not markup]\nrun        a run (new)\n")
    for words in (
        "data       data/set: 12,345 training and 678 validation tokens, char tokenizer",
        "2 layers, 2 heads, 16 wide, block 10, 1,234 ids: 26,496 parameters",
        "8 x cpu, computing in float32",
        "attention  xla (attention dropout); in evaluation cudnn (flash attention)",
        "layers     a loop; the backward pass computes again the MLP, and all else but matrix",
        "batch      16 x 10 = 160 tokens per step (devices 8 x accumulation steps 2 x sequences 1)",
    ):
        assert words in out
    assert "complete" not in out


def test_outside_a_terminal_progress_is_plain_lines(display, capsys, monkeypatch):
    trainer = trainer_at()
    display.on_start(trainer)
    capsys.readouterr()
    trainer.first_step_seconds = 2.34
    display.on_step(trainer, row(1))
    trainer.first_step_seconds = 9.0  # told once
    monkeypatch.setattr(setup, "peak_flops", lambda: 1e9)
    # 6 x (parameters that multiply) + 12 C T a layer, by hand.
    flops = 6 * (26_496 - 160) + 12 * 16 * 10 * 2
    display.on_step(trainer, row(50, tokens_per_second=100.0))
    display.on_step(trainer, row(51, tokens_per_second=None))
    display.on_step(trainer, {"step": 52, "train_loss": 1.0})  # no log interval
    display.on_evaluate(trainer, {"step": 60, "val_loss": 1.23456}, True)
    display.on_evaluate(trainer, {"step": 70, "val_loss": 2.0}, False)
    assert capsys.readouterr().out.splitlines() == [
        "compiled and took the first step in 2.3 s",
        "step 1/100 | loss 1.5000 | 1,000 tokens/s | 16s left | lr 1.00e-03 | grad norm 0.25",
        "step 50/100 | loss 1.5000 | 100 tokens/s | 1m20s left | lr 1.00e-03 | grad norm 0.25"
        f" | MFU {100 * flops / 1e9:.1%}",
        "step 51/100 | loss 1.5000 | lr 1.00e-03 | grad norm 0.25",
        "step 60: validation loss 1.2346 (best)",
        "step 70: validation loss 2.0000",
    ]


def test_a_complete_run_says_so(display, capsys):
    display.on_start(trainer_at(step=100))
    assert "this run is complete at step 100" in capsys.readouterr().out


def test_other_hosts_show_nothing(display, capsys, monkeypatch):
    monkeypatch.setattr(setup, "is_main_host", lambda: False)
    trainer = trainer_at()
    display.on_start(trainer)
    display.on_step(trainer, row(10))
    display.on_evaluate(trainer, {"step": 10, "val_loss": 1.0}, True)
    assert not capsys.readouterr().out


@pytest.fixture
def terminal(monkeypatch):
    """Of a width."""

    def of(columns):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(columns))

    return of


def live_line(display, columns):
    """As it would be drawn now."""
    console = Console(width=columns, file=io.StringIO(), color_system=None)
    console.print(display._line)
    return console.file.getvalue().rstrip("\n")


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (120, "step 10/100 | loss 1.5000 | val loss 2.3457 | 1,000 tokens/s | 14s left"
         " | lr 1.00e-03 | grad norm 0.25"),
        (80, "step 10/100 | loss 1.5000 | val loss 2.3457 | 1,000 tokens/s | 14s left"),
        (50, "10/100 loss 1.5000 val 2.3457 1.00k tok/s 14s left"),
        (49, "10/100 loss 1.5000 val 2.3457 1.00k tok/s"),
        (30, "10/100 loss 1.5000 val 2.3457"),
        (3, "10/"),
    ],
)  # fmt: skip
def test_the_live_line_keeps_what_matters_most(display, terminal, columns, text):
    terminal(columns)
    trainer = trainer_at()
    display.on_start(trainer)
    display.on_step(trainer, row(5))
    display.on_evaluate(trainer, {"step": 5, "val_loss": 2.34567}, True)
    display.on_step(trainer, row(10))
    line = live_line(display, columns)
    assert len(line) <= columns and line.rstrip("━╸╺ ") == text
    assert ("━" in line) == (columns - len(text) > progress.LEAST_BAR)


def test_the_live_line_says_what_is_being_done(display, terminal):
    terminal(80)
    trainer = trainer_at()
    display.on_start(trainer)
    display.on_phase(trainer, "compiling the training step")
    assert live_line(display, 80).startswith("step 0/100 | compiling the training step ")
    display._line._began -= 75
    assert live_line(display, 80).startswith("step 0/100 | compiling the training step (1m15s) ")
    display.on_step(trainer, {"step": 1, "train_loss": 1.0})
    assert live_line(display, 80).startswith("step 1/100 ╸ ")
    display.on_step(trainer, row(2))
    display.on_step(trainer, {"step": 3, "train_loss": 1.0})  # the numbers are those of step 2
    assert live_line(display, 80).startswith("step 3/100 | loss 1.5000 | 1,000 tokens/s")


def test_what_takes_long_is_named_outside_a_terminal(display, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SILENCE_SECONDS", 0.01)
    trainer = trainer_at()
    display.on_start(trainer)
    capsys.readouterr()
    display.on_phase(trainer, "evaluating")
    display._timer.join(10)
    assert capsys.readouterr().out == "evaluating ...\n"
    monkeypatch.setattr(progress, "SILENCE_SECONDS", 60)
    display.on_phase(trainer, "evaluating")
    timer = display._timer
    display.on_step(trainer, row(1))
    assert timer.finished.is_set() and display._timer is None  # called off


@pytest.mark.parametrize("columns", [50, 80, 120])
def test_what_stays_on_a_terminal_fits_it(display, terminal, capsys, monkeypatch, columns):
    terminal(columns)
    monkeypatch.setattr(progress, "SCROLLBACK_SECONDS", 0.0)
    trainer = trainer_at(notes=["note: " + "some words " * 30])
    trainer.sample = lambda step: "a line of the sample, " * 9 + "\n  indented"
    display.on_start(trainer)
    display.on_step(trainer, row(10))
    Samples(display).on_evaluate(trainer, {"step": 50}, False)
    display.on_end(trainer)
    out = capsys.readouterr().out
    assert "\x1b[?25h" in out  # the cursor is shown again
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out).replace("\r", "\n").split("\n")
    assert max(map(len, lines)) <= columns
    assert "  indented" in lines  # as it is
    words = "a line of the sample, " * 9
    at = lines.index("sample after step 50:") + 1
    rest = " ".join(lines[at : lines.index("  indented")])
    assert rest.split() == words.split()  # none is broken


def test_losses_stay_on_a_terminal_at_a_readable_pace(display, terminal, capsys, monkeypatch):
    terminal(120)
    clock = iter([0.0, 3.0, 9.9, 10.1, 20.0, 20.2])
    trainer = trainer_at()
    display.on_start(trainer)
    display.close()  # only what stays
    capsys.readouterr()
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)
    stayed = []
    for step in range(1, 7):
        monkeypatch.setattr(progress.time, "monotonic", lambda now=next(clock): now)
        display.on_step(trainer, row(step))
        stayed += [step] * ("loss" in capsys.readouterr().out)
    assert stayed == [1, 4, 6]


def test_a_command_to_copy_is_not_cut(display, terminal, capsys):
    terminal(20)
    trainer = trainer_at()
    display.on_start(trainer)
    display.close()
    capsys.readouterr()
    Samples(display).on_end(trainer)
    assert capsys.readouterr().out.endswith("--run-dir 'a run' --num-samples 3\n")


def test_samples_follow_evaluations_and_the_end(display, capsys):
    trainer, samples = trainer_at(), Samples(display)
    display.on_start(trainer)
    capsys.readouterr()
    for step in (0, 50, 100):  # not of the untrained model, nor twice of the last one
        samples.on_evaluate(trainer, {"step": step, "val_loss": 1.0}, False)
    assert capsys.readouterr().out == "\nsample after step 50:\n[red]hello\n\n"
    samples.on_end(trainer)
    out = capsys.readouterr().out
    assert "sample after step 100:\n[red]hello\n" in out
    assert out.rstrip().endswith("generate --run-dir 'a run' --num-samples 3")


@pytest.mark.parametrize(("stopped_by", "tokens"), [(15, 5), (0, 0)])
def test_no_sample_after_a_stop_or_of_no_tokens(display, capsys, stopped_by, tokens):
    trainer = trainer_at()
    trainer.stopped_by, trainer.runtime = stopped_by, RuntimeConfig(sample_tokens=tokens)
    display.on_start(trainer)
    capsys.readouterr()
    Samples(display).on_evaluate(trainer, {"step": 50}, False) if not tokens else None
    Samples(display).on_end(trainer)
    out = capsys.readouterr().out
    assert "hello" not in out and ("more samples" in out) == (not stopped_by)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (75, "1m15s"), (3599, "59m59s"),
     (3600, "1h00m"), (7322, "2h02m")],
)  # fmt: skip
def test_duration(seconds, text):
    assert progress.duration(seconds) == text
