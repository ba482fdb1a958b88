"""How this program was called, for the commands that it prints: each must run as printed."""

import os
import shlex
import signal
import sys
from pathlib import Path


def command(name: str, *arguments: object) -> str:
    """A command line for the user to copy: `command("train", "--run-dir", "a b")` is "gptjax train
    --run-dir 'a b'", or what this process was started with instead of `gptjax`."""
    called = Path(sys.argv[0])
    script = called.with_name(f"{name}_jax.py")
    start = ["python", "-m", "gptjax", name]
    if called.name == "gptjax":
        start = ["gptjax", name]
    elif called.name in ("train_jax.py", "generate_jax.py") and script.is_file():
        start = ["python", str(script)]
    return " ".join(map(_quoted, [*start, *map(str, arguments)]))


def _quoted(argument: str) -> str:
    """For a shell; what cannot be printed as bash spells it."""
    if argument.isprintable():  # lone surrogates, which stand for bytes that are no text, are not
        return shlex.quote(argument)
    spelled = (
        chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}"
        for byte in os.fsencode(argument)
    )
    return f"$'{''.join(spelled)}'"


def end_on_interrupt() -> None:
    """Ctrl-C just ends the process, while it imports what answers it."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
