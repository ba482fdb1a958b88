"""The program `gptjax`: its commands, and how its process ends."""

import os
import re
import signal
import subprocess
import sys

import helpers
import pytest

from gptjax.commands import main
from gptjax.errors import RunError, UserError


def raising(error):
    def command(argv, prog):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("bad"), 2, "error: bad"),
        (RunError("broke\nhere"), 1, r"error: broke\nhere"),
        (MemoryError(), 1, "error: out of memory; lower batch_size"),
        (RuntimeError("RESOURCE_EXHAUSTED: 3 GB"), 1, "error: out of memory; lower batch_size"),
        (RuntimeError("INTERNAL: Out of memory"), 1, "error: out of memory; lower batch_size"),
        (OSError(28, "No space left on device", "a/b"), 1, "error: a/b: No space left on device"),
        (KeyboardInterrupt(), 130, "stopped; nothing is left half done"),
        (main.Terminated(15), 143, "stopped; nothing is left half done"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(capsys, monkeypatch, error, code, line):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert main.run(raising(error), "gptjax") == code
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("too"), OSError("from JAX")])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(type(error)):
        main.run(raising(error), "gptjax")


def test_help_and_version_need_no_jax(command):
    script = (
        "import sys; from gptjax.commands import main; sys.argv = ['gptjax', *sys.argv[1:]]\n"
        "try: main.main()\nfinally: assert 'jax' not in sys.modules, 'JAX was imported'"
    )
    helped = command("-c", script, "--help")
    assert helped.returncode == 0 and not helped.stderr
    assert re.findall(r"^  (\w+)  ", helped.stdout, re.M) == list(main.COMMANDS)
    version = command("-c", script, "--version")
    assert re.fullmatch(r"gptjax 0\.\S+ \(JAX \S+, Python \S+\)\n", version.stdout)
    listed = command("-c", script, "--tyro-print-completion", "bash")
    assert listed.returncode == 0 and not listed.stderr
    for words in ("evaluate", "--model.n-layer", "--max-new-tokens", "--hellaswag"):
        assert words in listed.stdout


@pytest.mark.parametrize("name", [name for name in main.COMMANDS if name != "bench"])
def test_every_command_explains_itself(gptjax, name):
    assert f"usage: gptjax {name}" in gptjax(name, "--help")


def test_no_command_or_a_wrong_one_is_answered(gptjax):
    assert gptjax().startswith("usage: gptjax COMMAND")
    with pytest.raises(UserError, match="no command 'trian'; did you mean train"):
        gptjax("trian")
    with pytest.raises(UserError, match="no command 'x'; expected train, generate, "):
        gptjax("x")


def test_a_reader_that_goes_away_ends_the_command_quietly(command, cache_dir, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen(
        [sys.executable, "-m", "gptjax", "--help"], stdout=writing, stderr=subprocess.PIPE,
        env=helpers.command_environment(cache_dir), cwd=tmp_path,
    )  # fmt: skip
    os.close(writing)
    assert (process.communicate()[1], process.returncode) == (b"", 141)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "convert", "evaluate", "compare", "report"])
def test_module_commands_of_the_first_edition_still_work(command, name):
    result = command("-m", f"gptjax.{name}")
    assert result.returncode == 2
    first, last = result.stderr.splitlines()
    assert first == f"note: python -m gptjax.{name} is called python -m gptjax {name} now"
    assert last.startswith("error: ")


@pytest.mark.slow
def test_closed_streams_are_no_failure(command, tmp_path, cache_dir):
    shell = f"{sys.executable} -m gptjax --version >&- 2>&- <&-"
    result = subprocess.run(shell, shell=True, env=helpers.command_environment(cache_dir))
    assert result.returncode == 0
