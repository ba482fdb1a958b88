"""How this program was called, for the commands that it prints (each must run as printed), and the
signals that stop it."""

import shlex
import signal
import sys
from pathlib import Path

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C, a request to end, a lost terminal, and what SLURM sends before a job's time is over."""


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
    return shlex.join([*start, *map(str, arguments)])
