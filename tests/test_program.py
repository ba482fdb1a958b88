"""Printed commands run as printed, however the program was called."""

import sys

import helpers
import pytest

from gptjax import program


@pytest.mark.parametrize(
    ("called", "name", "expected"),
    [
        ("/usr/bin/gptjax", "train", "gptjax train --run-dir 'a b'"),
        ("/x/gptjax/__main__.py", "train", "python -m gptjax train --run-dir 'a b'"),
        (helpers.TRAIN, "generate", f"python {helpers.GENERATE} --run-dir 'a b'"),
        (helpers.TRAIN, "convert", "python -m gptjax convert --run-dir 'a b'"),
        ("a notebook", "generate", "python -m gptjax generate --run-dir 'a b'"),
    ],
)
def test_a_command_starts_as_this_process_did(monkeypatch, called, name, expected):
    monkeypatch.setattr(sys, "argv", [str(called)])
    assert program.command(name, "--run-dir", "a b") == expected
