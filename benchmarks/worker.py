"""What the processes that do the work share: their job, and the turns they take."""

import dataclasses
import importlib
import itertools
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Literal

from gptjax.config import TrainConfig
from gptjax.errors import UserError, first_line
from gptjax.runtime_config import RuntimeConfig

Mode = Literal["train", "generate", "startup", "scaling"]

FIRST_STEP = "compiled and took the first step"
"""Both sides of `startup` print a line with these words as soon as they are true."""


@dataclasses.dataclass(frozen=True)
class Job:
    """The work of one process. All sides get the same but for their name."""

    side: str
    mode: Mode | Literal["ceilings"]
    config: TrainConfig
    """With a `data.dir` of random tokens."""
    runtime: RuntimeConfig
    folder: str
    """The process may write here."""
    num_samples: int = 1
    new_tokens: int = 1
    compared: bool = False
    """Whether there is another side."""


class Turns(Iterator[int]):
    """The turns that the parent process asks for: each value is how many units of work to do.
    Asking for the next one ends a turn and reports what it took. When the parent is done, that
    ends this process."""

    def __init__(self, pipe: Connection, facts: Callable[[], dict[str, Any]]):
        """`facts`: what to report besides."""
        self.facts, self._pipe = facts, pipe
        self._began = used()

    def __next__(self) -> int:
        now = used()
        cost = {name: now[name] - before for name, before in self._began.items()}
        self._pipe.send(self.facts() | cost | {"resident": now["resident"]})
        try:
            units = self._pipe.recv()
        except EOFError:
            sys.exit()
        self._began = used()
        return units


def used(usage: resource.struct_rusage | None = None) -> dict[str, float]:
    """What a process (None: this one) has used so far: seconds on the clock, CPU seconds outside
    and inside the kernel, minor page faults; and its peak resident memory in bytes."""
    usage = usage or resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": time.perf_counter(),
        "user": usage.ru_utime,
        "system": usage.ru_stime,
        "page_faults": usage.ru_minflt,
        "resident": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def work(job: Job, environment: dict[str, str], pipe: Connection, log: str) -> None:
    """The main function of a side's process. Its output goes to the file `log`, an error that can
    be caught to the parent, as {"error": ...}."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    os.environ.update(environment)  # before JAX or PyTorch is imported
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    try:
        name = "ours" if job.side.startswith("gptjax") else "pytorch"
        side = importlib.import_module(f"benchmarks.{name}")
        side.MODES[job.mode](job, Turns(pipe, side.facts))
    except Exception as error:  # whatever it is, the process that waits must hear of it
        text = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, ModuleNotFoundError):
            text += "; pip install -r requirements-torch.txt, or --against none"
        pipe.send({"error": str(error) if isinstance(error, UserError) else text})


def ceilings(
    width: int, multiply: Callable[[], object], nbytes: int, copy: Callable[[], object]
) -> dict[str, float]:
    """What a library reaches in one large product of square matrices (FLOP/s) and in one large copy
    (bytes/s, read and written). Both functions wait until it is done."""

    def seconds(work: Callable[[], object]) -> float:
        times = [time.perf_counter()]
        for _ in range(8):
            work()
            times.append(time.perf_counter())
        return min(b - a for a, b in itertools.pairwise(times))

    return {
        "matmul_flops": 2 * width**3 / seconds(multiply),
        "copy_bytes_per_second": 2 * nbytes / seconds(copy),
    }
