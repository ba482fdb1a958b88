"""What is printed of long work. It is no reason to end that nobody can read it any more."""

import sys
from typing import Any

from rich.console import Console


class _StandardOutput:
    """`sys.stdout`, whatever that is at the moment. What cannot be written is dropped."""

    told = False
    """Whether the user knows that something could not be written."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)

    def write(self, text: str) -> int:
        return self._try("write", text) or len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *arguments: str) -> Any:
        try:
            return getattr(sys.stdout, method)(*arguments)
        except BrokenPipeError:  # a reader that has gone, as `head` does
            return None
        except OSError as error:
            if not _StandardOutput.told:
                _StandardOutput.told = True
                print(f"note: cannot print ({error.strerror}); going on", file=sys.stderr)
            return None


def make(*, quiet: bool = False) -> Console:
    """For standard output: as it is, without markup; lines are cut by the terminal.

    A terminal is what says so, but no notebook; not, as for rich alone, any output where
    FORCE_COLOR is set.
    """
    live = sys.stdout.isatty() and not Console().is_jupyter
    return Console(
        file=_StandardOutput(),  # type: ignore[arg-type]
        quiet=quiet, force_terminal=live, force_jupyter=False, markup=False, emoji=False,
        highlight=False, soft_wrap=True,
    )  # fmt: skip
