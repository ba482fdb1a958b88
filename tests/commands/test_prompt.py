"""gptjax prompt: turns of one text, settings in between, and Ctrl-C for the model only."""

import io
import os
import pty
import signal
import subprocess
import sys

import helpers
import pytest

from gptjax import run


@pytest.fixture
def converse(trained, gptjax, monkeypatch):
    """What the model writes after each of these lines that is a turn."""

    def said(*lines, flags=()):
        typed = io.TextIOWrapper(io.BytesIO("".join(f"{x}\n" for x in lines).encode()))
        monkeypatch.setattr(sys, "stdin", typed)
        return gptjax("prompt", trained[0], "--max-new-tokens", 5, *flags)

    return said


def test_turns_are_one_text(trained, converse):
    model = run.load(trained[0])
    first = model.generate("now", max_new_tokens=5)
    both = model.generate("now", max_new_tokens=10)
    assert converse("now", "") == f"{first}\n{both[5:]}\n"
    text = f"now{both}\nRICH"
    third = model.generate(text, max_new_tokens=5, overflow="half")
    assert converse("now", "", "RICH") == f"{first}\n{both[5:]}\n{third}\n"
    assert converse("now", "", "/reset", "now") == f"{first}\n{both[5:]}\n{first}\n"


def test_settings_change_between_turns(trained, converse, capsys):
    model = run.load(trained[0])
    lines = "/temperature 0", "/seed x", "/max_new_tokens 3", "/num_samples 2", "/helo", "now"
    assert converse(*lines) == model.generate("now", max_new_tokens=3, temperature=0) + "\n"
    errors = capsys.readouterr().err.splitlines()
    words = "--seed 'x': expected", "num_samples is 1 here", "unknown flag --helo"
    assert len(errors) == 3
    for word, error in zip(words, errors, strict=True):
        assert word in error


def test_a_wrong_line_changes_nothing(converse, capsys):
    assert converse("now", "Ω", "//", "") == converse("now", "")
    assert "'Ω'" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_stops_the_model_and_ctrl_d_ends(trained, cache_dir):
    ours, theirs = pty.openpty()
    argv = ["-m", "gptjax", "prompt", trained[0], "--max-new-tokens", "0"]
    process = subprocess.Popen(
        [sys.executable, *argv], stdin=theirs, stdout=theirs, stderr=theirs,
        env=helpers.command_environment(cache_dir),
    )  # fmt: skip
    os.close(theirs)
    said = b""

    def until(word):
        nonlocal said
        while word not in said:
            said += os.read(ours, 1000)
        said = said.partition(word)[2]

    try:
        until(b"> ")
        os.write(ours, b"now\n")
        until(b"now\r\n")
        while len(said) < 300:  # it writes without end
            said += os.read(ours, 1000)
        process.send_signal(signal.SIGINT)
        until(b"\r\n> ")
        os.write(ours, b"/max_new_tokens 4\n\n")
        until(b"> ")
        until(b"> ")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(ours)
