"""Command lines: typed flags out of dataclasses, and failures as one line."""

import contextlib
import io
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import tyro

from gptjax import watch
from gptjax.config import flatten
from gptjax.errors import UserError

OUT_OF_MEMORY = (
    "out of memory; lower batch_size or num_samples, raise gradient_accumulation_steps, or turn on"
    " model.remat"
)


class Checked(Protocol):
    """A dataclass of settings that knows what is wrong with them."""

    def problems(self) -> list[str]:
        """Each setting that is out of range, in words."""
        ...


Flags = TypeVar("Flags", bound=Checked)


def parse(
    default: Flags, argv: Sequence[str], prog: str, positional: str = ""
) -> tuple[list[str], Flags]:
    """(the leading arguments that are no flags, `default` overridden by --flags).

    `positional` names the leading arguments that there may be ("SOURCE DIR"; "RUN ..." is any
    number).

    Underscores and hyphens are the same; a boolean flag stands alone, or before True or False.
    `--help` prints and exits.

    Raises:
        UserError: every unknown flag (with its near misses), every ill-typed value, and what the
            settings' own `problems` name.
    """
    arguments = _spell_out(argv, default)
    leading: list[str] = []
    most = len(arguments) if positional.endswith("...") else len(positional.split())
    while arguments and len(leading) < most and arguments[0][:1] != "-":
        leading.append(arguments.pop(0))
    problems: list[str] = []
    while True:
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                flags = tyro.cli(
                    type(default),
                    default=default,
                    args=arguments,
                    prog=f"{prog} {positional}".rstrip(),
                    config=(tyro.conf.FlagConversionOff,),
                )
        except SystemExit as stop:
            if not stop.code:
                raise
            message = _one_line(errors.getvalue())
            if positional and "--" not in message.split(" (")[0]:
                message += f" ({positional} comes first, flags after it)"
            # tyro reports one kind of mistake at a time: leave those flags out and look again.
            problems.append(message)
            rest = _without(arguments, re.findall(r"--[\w.-]+", message.split(";")[0]))
            if rest == arguments:
                break
            arguments = rest
        else:
            problems += flags.problems()
            break
    if problems:
        raise UserError(f"{'; '.join(problems)} (all flags: {prog} --help)")
    return leading, flags


def _spell_out(argv: Sequence[str], default: object) -> list[str]:
    """`argv` with True after each boolean flag that stands alone, and any case of true."""
    switches = {name for name, value in flatten(default).items() if isinstance(value, bool)}

    def is_switch(flag: str) -> bool:
        return flag.startswith("--") and flag[2:].replace("-", "_") in switches

    out: list[str] = []
    for argument in argv:
        flag, _, value = argument.partition("=")
        if is_switch(flag):
            out += [flag, value.capitalize() or "True"]
        elif argument.lower() in ("true", "false") and is_switch("".join(out[-2:-1])):
            out[-1] = argument.capitalize()
        else:
            out.append(argument)
    return out


def _one_line(box: str) -> str:
    """tyro's framed error as a sentence."""
    rows = [line.strip("│╭╮╰╯─ \n") for line in box.splitlines()[1:]]
    text = " ".join(row for row in rows if row and not row.startswith("For full helptext"))
    text = re.sub(r"\s*Argument helptext:.*", "", text)
    text = re.sub(r"\s*\(default: [^)]*\)", "", text)
    text = text.replace("Unrecognized options:", "unrecognized:").replace("Error parsing ", "")
    text = re.sub(r"Arguments similar to (\S+):", r"; for \1 perhaps", text)
    text = re.sub(r"Perhaps you meant:", "; perhaps", text)
    # Keep the suggested flag's name and type, drop its long description.
    text = re.sub(r"(perhaps --\S+ \S+).*?(?=; for --|$)", r"\1", text)
    return text.replace(" ;", ";").strip(" .")


def _without(arguments: list[str], flags: list[str]) -> list[str]:
    """`arguments` less `flags` and their values."""
    names = {flag.replace("_", "-") for flag in flags}
    out, dropping = [], False
    for argument in arguments:
        if argument.startswith("--"):
            dropping = argument.split("=")[0].replace("_", "-") in names
        if not dropping:
            out.append(argument)
    return out


def status(text: str) -> None:
    """What is being done, on a terminal's last line, which "" clears; nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


class StopSignal:
    """While it is entered, Ctrl-C, SIGTERM and SIGHUP are a wish: `number` is the last of them, 0
    before. A second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, number: int, _: Any) -> None:
        self.number = number
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not through Python's streams, which may be in the middle of a line. The last characters
        # show the cursor again, should a second signal leave no time to.
        text = f"\n{signal.Signals(number).name}: finishing what is in hand, then saving"
        text += "; Ctrl-C leaves at once\n" + ("\033[?25h" if sys.stderr.isatty() else "")
        with contextlib.suppress(OSError):
            if select.select([], [2], [], 0)[1]:  # a full pipe must not hold us up
                os.write(2, text.encode())


def run(main: Callable[[list[str]], None]) -> int:
    """Call `main` with the command line; the process's exit code."""
    # Closed by the caller (>&-): nobody listens, and no file must take the stream's place.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:
        signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        return _failed(str(error), error.exit_code)
    except KeyboardInterrupt as stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # it has been heard
        with contextlib.suppress(OSError):
            print("stopped; nothing is left half done", file=sys.stderr)
        return _ended(128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT))
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _ended(141)
    except MemoryError:
        return _failed(OUT_OF_MEMORY, 1)
    except OSError as error:
        if error.strerror is None:  # not the system's: a bug, or a library's
            _show_bug()
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _failed(f"{where}{error.strerror}", 1)
    except RuntimeError as error:
        if watch.is_loss(error):
            return _failed(watch.GONE, 1)
        if "RESOURCE_EXHAUSTED" in str(error):
            return _failed(OUT_OF_MEMORY, 1)
        _show_bug()
        raise
    except Exception:
        _show_bug()
        raise
    return 0


def _show_bug() -> None:
    """Where there are other hosts this is the last word, else Python prints it."""
    if watch.Watch.active:
        traceback.print_exc()
        _ended(1)


class Terminated(KeyboardInterrupt):
    """SIGTERM unwinds as Ctrl-C does: what is half done gets cleaned up."""


def _terminate(*_: object) -> None:
    raise Terminated


def _failed(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"error: {message}", file=sys.stderr)
    return _ended(code)


def _ended(code: int) -> int:
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    watch.failed(code)
    return code
