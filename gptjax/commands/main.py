"""The program `gptjax`: its commands."""

import importlib
import platform
import sys
from pathlib import Path

from tyro import extras

import gptjax
from gptjax import config_io, first_edition
from gptjax.commands import flags, process
from gptjax.errors import UserError

COMMANDS = {
    "train": "train a model, or resume a run",
    "generate": "continue a prompt with a trained model",
    "prompt": "write a text in turns with a trained model, at a terminal",
    "serve": "a playground in the browser, and an HTTP interface like OpenAI's",
    "data": "tokenise a text into a data set",
    "convert": "import GPT-2 or nanoGPT weights; export a run",
    "evaluate": "loss and perplexity on a text, or accuracy on HellaSwag",
    "score": "the log-probability of texts, and of each of their tokens",
    "compare": "compare a run's numbers with PyTorch's",
    "explain": "follow a text through a model, step by step",
    "report": "show how runs went",
    "bench": "measure speed and memory beside PyTorch's",
    "runs": "list the runs in a folder",
    "suggest": "suggest a model and settings for a text, this machine and some time",
    "sweep": "train with several values of one setting, and compare",
}
"""Each is a module here: `main(argv, prog)` runs it, `DEFAULTS` are the objects of its flags."""

USAGE = """\
usage: {prog} COMMAND ...

GPT-2 and GPT-3 style models in JAX: train them, sample from them, compare them with PyTorch.

{commands}

{prog} COMMAND --help explains a command's flags. {prog} --version names the versions.
{prog} --tyro-print-completion bash (or zsh, tcsh, fish) prints a completion script."""


def main() -> None:
    """The console script `gptjax`, and `python -m gptjax`."""
    called = Path(sys.argv[0]).name
    process.start(dispatch, "python -m gptjax" if called == "__main__.py" else called)


def moved(name: str) -> None:
    """`python -m gptjax.NAME` of gptjax 0.1."""

    def command(argv: list[str], prog: str) -> None:
        first_edition.notice(f"python -m gptjax.{name} is called {prog} {name} now")
        dispatch([name, *argv], prog)

    process.start(command, "python -m gptjax")


def dispatch(argv: list[str], prog: str) -> None:
    """Run the command that the first argument names.

    Raises:
        UserError: there is no such command, and what the command raises.
    """
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in COMMANDS:
        importlib.import_module(f"gptjax.commands.{name}").main(rest, f"{prog} {name}")
    elif name in ("--help", "-h"):
        commands = "\n".join(f"  {command:10}{does}" for command, does in COMMANDS.items())
        print(USAGE.format(prog=prog, commands=commands))
    elif name == "--version":
        from importlib import metadata  # slow, and only needed here

        jax, python = metadata.version("jax"), platform.python_version()
        print(f"gptjax {gptjax.__version__} (JAX {jax}, Python {python})")
    elif name.startswith("--tyro-"):
        modules = {each: importlib.import_module(f"gptjax.commands.{each}") for each in COMMANDS}
        parsers = {each: flags.combined(module.DEFAULTS) for each, module in modules.items()}
        # Not `prog`, which may be "python -m gptjax": no shell completes that.
        extras.subcommand_cli_from_dict(parsers, prog="gptjax", args=argv, config=flags.EXPLICIT)
    else:
        near = config_io.near_miss(name, COMMANDS)
        raise UserError(f"no command {name!r}{near or '; expected ' + ', '.join(COMMANDS)}")
