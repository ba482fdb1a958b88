"""The one kind of failure a user sees: a single line, no traceback, a non-zero exit code."""


class UserError(Exception):
    """Bad input. The message says what was wrong, what was expected and what to do."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """The gist of another library's message."""
    return str(error).strip().split("\n")[0] or type(error).__name__


class RunError(UserError):
    """Work that began and could not be finished (full disk, non-finite loss)."""

    exit_code = 1
