"""Command lines into dataclasses.

Which flag is meant is decided here; tyro reads each value by its type, and writes the help. So it
is known what was given (not only what came of it), and all mistakes are reported at once.
"""

import contextlib
import dataclasses
import inspect
import os
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin

import tyro

from gptjax import config_io, files, first_edition, other_names, settings
from gptjax.errors import ConfigError, UserError

F = TypeVar("F")

FLAG = re.compile("--[a-zA-Z]")
"""What a flag begins with; "-", "-3" and "--- a line" are values."""

BOOLEAN_WORDS = {"true", "false", "none", "yes", "no", "on", "off", "y", "n", "1", "0", "maybe"}
"""After a boolean flag these are its value, though some are refused then; another word is not."""

EXPLICIT = (tyro.conf.FlagConversionOff,)
"""For tyro: --flag True rather than --flag and --no-flag."""


def parse(default: F, argv: Sequence[str], prog: str, positional: str = "") -> tuple[list[str], F]:
    """(the arguments that are no flags, `default` overridden by the flags); see `read`.
    --help prints and exits.

    Raises:
        UserError: unknown flags, ill-typed values, values out of range; it names all of them.
    """
    named, given, problems = read([default], argv, prog, positional)
    if given.pop("help", False):
        show_help([default], prog, positional)
    (flags,) = apply([default], given, problems, prog)
    return named, flags


def read(
    defaults: Sequence[Any],
    argv: Sequence[str],
    prog: str,
    positional: str = "",
    renamed: Mapping[str, str] | None = None,
) -> tuple[list[str], dict[str, Any], list[str]]:
    """(the arguments that are no flags, {setting: value} of the flags, what is wrong with them).

    A flag is a setting's full name (--model.n-layer) or its last part (--n_layer), with hyphens or
    underscores; its value follows, or stands after =. A boolean flag may stand alone; a tuple takes
    all values that follow. Of a flag that is given twice the last one counts. `positional` names
    the other arguments: "SOURCE [FOLDER]", or "RUN ..." for one or more; RUN may be given as
    --run-dir too. `renamed`: {old setting: new one}. --help or -h is {"help": True}.
    """
    words = positional.replace("...", "").split()
    kinds = {"run_dir": str} if "RUN" in positional else {}
    for default in defaults:
        kinds |= config_io.setting_types(type(default))
    last_parts = [name.rpartition(".")[2] for name in kinds]
    named: list[str] = []
    given: dict[str, Any] = {}
    problems: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            given["help"] = True
            continue
        if not FLAG.match(argument):
            named.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        name = flag[2:].replace("-", "_")
        old = name
        if renamed and name in renamed:
            name = renamed[name]
            first_edition.notice(f"{flag} is called --{name.replace('_', '-')} now")
        for main in ("kind", "source"):  # --optimizer muon, --data my.txt
            if f"{name}.{main}" in kinds:
                name += f".{main}"
        if name not in kinds and name.replace(".", "_") in last_parts:  # --lora.rank
            name = name.replace(".", "_")
        if name not in kinds and last_parts.count(name) == 1:
            name = list(kinds)[last_parts.index(name)]
        values = [value] if equals else _following(kinds.get(name), rest)
        if old.endswith("gelu") and name == "model.activation":
            values = [first_edition.ACTIVATIONS.get(form, form) for form in values]
        if name not in kinds:
            near = config_io.near_miss(name, [*kinds, *last_parts]).replace("_", "-")
            hint = other_names.hint(name, {*kinds, *last_parts})
            problems.append(f"unknown flag {flag}{hint or near.replace('mean ', 'mean --')}")
        else:
            try:
                given[name] = _value(kinds[name], values)
            except ValueError:
                what = " ".join(map(repr, values)) or "without a value"
                problems.append(f"{flag} {what}: expected {settings.expected(kinds[name])}")
                if not values and rest:
                    problems[-1] += f" (one that begins with -- as {flag}={rest[0]})"
    if "RUN" in positional and "run_dir" in given:
        named.insert([word.strip("[]") for word in words].index("RUN"), given.pop("run_dir"))
    if missing := [word for word in words[len(named) :] if word[0] != "["]:
        problems.insert(0, f"{' and '.join(missing)} missing: {prog} {positional}")
    if (extra := named[len(words) :]) and "..." not in positional:
        wanted = f"; expected {positional} and flags" if positional else ""
        problems.append(f"unexpected argument {' '.join(map(repr, extra))}{wanted}")
    return named, given, problems


def apply(
    defaults: Sequence[Any], given: Mapping[str, Any], problems: Sequence[str], prog: str
) -> list[Any]:
    """Each of `defaults` with those of its settings that are `given`.

    Raises:
        UserError: `problems`, and values out of range.
    """
    out, problems = [], list(problems)
    for default in defaults:
        names = config_io.setting_types(type(default))
        try:
            changes = {name: value for name, value in given.items() if name in names}
            out.append(default.replace(changes))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise UserError(f"{'; '.join(problems)} (all flags: {prog} --help)")
    return out


def text(flag: str, value: str) -> str:
    """A flag's value as text: where the locale is not UTF-8, or the bytes are not, Python has made
    other characters of them. Raises UserError if they are no UTF-8."""
    return files.decode(os.fsencode(value), flag)


def unescape(text: str) -> str:
    """A shell passes \\n on as two characters; \\\\ is a backslash."""
    spelled = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda found: spelled[found[1]], text)


def show_help(defaults: Sequence[Any], prog: str, positional: str = "") -> None:
    """Print what the flags are, and end (SystemExit)."""
    width = min(100, shutil.get_terminal_size().columns)
    for paragraph in (inspect.getdoc(type(defaults[0])) or "").split("\n\n"):
        print(textwrap.fill(paragraph, width) + "\n")
    usage = f"{prog} {positional.replace('RUN', 'RUN|--run-dir=RUN', 1)}".rstrip()
    tyro.cli(combined(defaults), prog=usage, args=["--help"], config=EXPLICIT)


def combined(defaults: Sequence[Any]) -> Any:
    """For tyro: one class with the settings of all of them."""
    fields = [
        (f"_{i}", Annotated[type(part), tyro.conf.arg(name="")], dataclasses.field(default=part))
        for i, part in enumerate(defaults)
    ]
    return dataclasses.make_dataclass("Flags", fields)


def _following(kind: Any, rest: list[str]) -> list[str]:
    """Takes from `rest` the values of a flag; `kind` None: it is not known."""
    count = next((n for n, argument in enumerate(rest) if FLAG.match(argument)), len(rest))
    words = BOOLEAN_WORDS | {word for arg in get_args(kind) for word in get_args(arg)}
    alone = not count or rest[0].lower() not in words
    if alone and bool in (kind, *get_args(kind)):
        return ["True"]
    if get_origin(kind) is not tuple:
        count = min(count, 1)
    taken, rest[:] = rest[:count], rest[count:]
    return taken


def _value(kind: Any, values: Sequence[str]) -> Any:
    """Raises ValueError if the values are not of this type."""
    if bool in (kind, *get_args(kind)):
        words = {"true": "True", "false": "False"}
        words |= {"none": "None"} if type(None) in get_args(kind) else {}
        words |= {word: word for arg in get_args(kind) for word in get_args(arg)}
        values = [words.get(value.lower(), value) for value in values]
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            # What follows -- are values, also where they begin with a hyphen.
            return tyro.cli(kind, args=["--", *values], console_outputs=False)
        except SystemExit:
            raise ValueError from None
