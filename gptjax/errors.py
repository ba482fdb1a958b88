"""The one kind of failure a user sees: a single line, no traceback, a non-zero exit code."""

import re
from typing import Any

LONGEST_MESSAGE = 3000
"""Characters. A longer message loses its middle: what comes last says what to do."""


class UserError(Exception):
    """Bad input. The message says what was wrong, what was expected and what to do."""

    exit_code = 2

    def __str__(self) -> str:
        """One line, whatever names and values of a file the message quotes."""
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())
        half = LONGEST_MESSAGE // 2
        return text if len(text) <= LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"


class ConfigError(UserError, ValueError):
    """Settings that are out of range or do not fit together; `problems` lists each."""

    def __init__(self, problems: list[str]):
        super().__init__("; ".join(problems))
        self.problems = problems


class RunError(UserError):
    """Work that began and could not be finished (a full disk, a non-finite loss)."""

    exit_code = 1


class Diverged(RunError):
    """Training came to numbers that are not finite."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; XLA and its runtimes say so in several ways."""
    words = r"RESOURCE_EXHAUSTED|out of memory|bad_alloc|failed to allocate"
    said = isinstance(error, RuntimeError) and re.search(words, str(error), re.IGNORECASE)
    return isinstance(error, MemoryError) or bool(said)


def quoted(value: Any) -> str:
    """A value from a file, to quote it in a message."""
    try:
        return repr(value)
    except (ValueError, RecursionError):  # more digits, or deeper, than Python spells
        return f"a {type(value).__name__} too large to show"


def first_line(error: BaseException) -> str:
    """The gist of another library's message."""
    try:
        return str(error).strip().split("\n")[0] or type(error).__name__
    except (ValueError, RecursionError):  # a KeyError spells its key: see `quoted`
        return type(error).__name__
