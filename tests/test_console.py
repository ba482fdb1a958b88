"""What is printed of long work: as it is, and no reason to end."""

import errno
import sys

import pytest
import rich.console

from gptjax import console


class Broken:
    """An output that fails."""

    encoding = "utf-8"

    def __init__(self, error):
        self.error = error

    def write(self, _):
        raise self.error

    def flush(self):
        raise self.error

    def isatty(self):
        return False


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), ""),
        (OSError(errno.ENOSPC, "No space left"), "note: cannot print (No space left); going on\n"),
    ],
)
def test_an_output_that_fails_is_told_once_and_ends_nothing(monkeypatch, capsys, error, note):
    monkeypatch.setattr(sys, "stdout", Broken(error))
    monkeypatch.setattr(console._StandardOutput, "told", False)
    output = console.make()
    for _ in range(3):
        output.print("a line")
        with output.status("work"):
            pass
    assert capsys.readouterr().err == note


def test_a_text_is_printed_as_it_is(capsys):
    text = "[red]a[/x] :x: :smile: 'b' 12 " + "long " * 99
    console.make().print(text)
    assert capsys.readouterr().out == f"{text}\n"


@pytest.mark.parametrize("where", ["a terminal", "a notebook", "a log in colour"])
def test_only_a_terminal_is_one(monkeypatch, where):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: where != "a log in colour")
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: where == "a notebook")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert console.make().is_terminal == (where == "a terminal")
