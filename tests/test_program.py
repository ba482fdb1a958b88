"""Printed commands run as printed, however the program was called."""

import os
import subprocess
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


@pytest.mark.parametrize("name", ["a\nb", "x\udcff", "it's \x1b", "\\\t", "ü", "☃ $HOME", "*"])
def test_a_command_is_what_bash_reads(monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["gptjax"])
    printed = program.command("train", "--run-dir", name)
    assert printed.isprintable()
    shell = f"gptjax() {{ printf '%s\\0' \"$@\"; }}; {printed}"
    result = subprocess.run(["bash", "-c", shell], capture_output=True, check=True)
    assert result.stdout.split(b"\0")[:-1] == [b"train", b"--run-dir", os.fsencode(name)]
