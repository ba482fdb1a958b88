"""The program `gptjax`: its commands."""

import re

import pytest

from gptjax.commands import main
from gptjax.errors import UserError


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "convert", "evaluate", "compare", "report"])
def test_module_commands_of_the_first_edition_still_work(command, name):
    result = command("-m", f"gptjax.{name}")
    assert result.returncode == 2
    first, last = result.stderr.splitlines()
    assert first == f"note: python -m gptjax.{name} is called python -m gptjax {name} now"
    assert last.startswith("error: ")
