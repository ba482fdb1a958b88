"""Commands run within the tests' own process, and one run for all of them."""

import contextlib
import io
import os
import sys
from pathlib import Path
from unittest import mock

import helpers
import pytest

from gptjax.commands import main

SMALL = (
    "--data.source text.txt --n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 8"
    " --max-steps 30 --eval-interval 20 --log-interval 10 --learning-rate 1e-2 --sample-tokens 0"
    " --eval-full-split"
).split()


def call(folder: Path, cache_dir: Path, *argv: object) -> str:
    """What `gptjax ARGV` prints, in `folder`."""
    environment = {"GPTJAX_CACHE_DIR": str(cache_dir)}
    with (
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "argv", ["gptjax"]),
        contextlib.redirect_stdout(io.StringIO()) as out,
    ):
        try:
            main.dispatch([str(argument) for argument in argv], "gptjax")
        except SystemExit as end:  # --help
            assert not end.code
    return out.getvalue()


@pytest.fixture
def small_flags():
    """Of `trained`, a run of 30 steps, in a folder with text.txt."""
    return SMALL


@pytest.fixture(scope="session")
def gptjax_in(cache_dir):
    """Run a command in a folder: (folder, *argv) -> what it prints."""
    return lambda folder, *argv: call(folder, cache_dir, *argv)


@pytest.fixture
def gptjax(tmp_path, gptjax_in):
    """Run a command in `tmp_path`."""
    return lambda *argv: gptjax_in(tmp_path, *argv)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, cache_dir):
    """The run, and what `gptjax train` printed; its text lies beside it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(helpers.TEXT)
    return folder / "run", call(folder, cache_dir, "train", *SMALL, "--run-dir", "run")
