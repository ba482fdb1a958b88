"""The program `gptjax`: its commands, and how a process ends."""

import contextlib
import importlib
import io
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from tyro import extras

import gptjax
from gptjax import config_io, first_edition
from gptjax.commands import flags
from gptjax.devices import peer_failure
from gptjax.errors import UserError, is_out_of_memory

COMMANDS = {
    "train": "train a model, or resume a run",
    "generate": "continue a prompt with a trained model",
    "data": "tokenise a text into a data set",
    "convert": "import GPT-2 or nanoGPT weights; export a run",
    "evaluate": "loss and perplexity on a text, or accuracy on HellaSwag",
    "compare": "compare a run's numbers with PyTorch's",
    "report": "draw loss curves",
    "bench": "measure speed and memory beside PyTorch's",
    "runs": "list the runs in a folder",
}
"""Each is a module here: `main(argv, prog)` runs it, `DEFAULTS` are the objects of its flags."""

USAGE = """\
usage: {prog} COMMAND ...

GPT-2 and GPT-3 style models in JAX: train them, sample from them, compare them with PyTorch.

{commands}

{prog} COMMAND --help explains a command's flags. {prog} --version names the versions.
{prog} --tyro-print-completion bash (or zsh, tcsh, fish) prints a completion script."""

ENVIRONMENT = {
    "JAX_ENABLE_X64": "0",
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    "JAX_NUMPY_RANK_PROMOTION": "allow",
    "JAX_THREEFRY_PARTITIONABLE": "1",
    "JAX_RANDOM_SEED_OFFSET": "0",
    "JAX_TRANSFER_GUARD": "allow",
}
"""For the whole process what `numerics.standard` is for a function: others change our numbers."""

OUT_OF_MEMORY = (
    "out of memory; lower batch_size or num_samples, raise gradient_accumulation_steps, or turn on"
    " compute.remat"
)


def main() -> None:
    """The console script `gptjax`, and `python -m gptjax`."""
    called = Path(sys.argv[0]).name
    sys.exit(run(dispatch, "python -m gptjax" if called == "__main__.py" else called))


def moved(name: str) -> None:
    """`python -m gptjax.NAME` of gptjax 0.1."""

    def command(argv: list[str], prog: str) -> None:
        first_edition.notice(f"python -m gptjax.{name} is called {prog} {name} now")
        dispatch([name, *argv], prog)

    sys.exit(run(command, "python -m gptjax"))


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


def run(command: Callable[[list[str], str], None], prog: str) -> int:
    """Call `command` with the command line; the process's exit code."""
    # Streams that the caller closed (>&-): nobody reads them, and no file must take their place.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for number in (signal.SIGTERM, signal.SIGUSR1):  # a hangup before training just ends it
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for terminals that are not UTF-8
    if "jax" not in sys.modules:
        os.environ.update(ENVIRONMENT)
    try:
        command(sys.argv[1:], prog)
        sys.stdout.flush()
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)  # it has been heard
        with contextlib.suppress(OSError):
            print("stopped; nothing is left half done", file=sys.stderr)
        return _end(128 + (stop.number if isinstance(stop, Terminated) else signal.SIGINT))
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _end(141)
    except Exception as error:
        if isinstance(error, RuntimeError) and peer_failure.is_peer_failure(error):
            return _fail(peer_failure.MESSAGE, 1)
        if is_out_of_memory(error):
            return _fail(OUT_OF_MEMORY, 1)
        if isinstance(error, OSError) and error.strerror is not None:
            where = f"{error.filename}: " if error.filename else ""
            return _fail(f"{where}{error.strerror}", 1)
        _show_bug()  # ours, or a library's
        raise
    return 0


class Terminated(KeyboardInterrupt):
    """SIGTERM unwinds the stack as Ctrl-C does: unfinished files are removed on the way."""

    def __init__(self, number: int):
        self.number = number


def _terminate(number: int, _: object) -> None:
    raise Terminated(number)


def _show_bug() -> None:
    """Python prints the traceback, except where there are other hosts: there we end here."""
    if peer_failure.PeerMonitor.active:
        traceback.print_exc()
        _end(1)


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"error: {message}", file=sys.stderr)
    return _end(code)


def _end(code: int) -> int:
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    peer_failure.exit_if_distributed(code)
    return code
