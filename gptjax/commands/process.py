"""How a command's process begins and ends: environment, signals, one line for each failure."""

import contextlib
import errno
import io
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from gptjax import interrupts
from gptjax.commands import terminal
from gptjax.devices import chips, peer_failure
from gptjax.errors import UserError, first_line, is_out_of_memory

ENVIRONMENT = {
    "JAX_ENABLE_X64": "0",
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    "JAX_NUMPY_RANK_PROMOTION": "allow",
    "JAX_THREEFRY_PARTITIONABLE": "1",
    "JAX_RANDOM_SEED_OFFSET": "0",
    "JAX_TRANSFER_GUARD": "allow",
    "JAX_DISABLE_JIT": "0",
}
"""For the whole process what `numerics.standard` is for a function: others change our numbers. And
`pmap` over several devices needs the compiler."""

QUIET = "3"
"""For TF_CPP_MIN_LOG_LEVEL, unless the user has set it: XLA writes to stderr that a compilation is
slow, and what went wrong that JAX raises anyway."""

OPEN_FILES = 128
"""A process that may open fewer fails half way: JAX and Orbax have 20 to 60 open at once here."""

STOPPED = "stopped; nothing is left half done"

STOPPED_AT_WORK = "stopped"
"""What it was in the middle of is undone by the next command of its kind."""

IMPORT = "<frozen importlib._bootstrap>"
"""The file of Python's import, in a stack."""

OUT_OF_MEMORY = (
    "out of memory; lower batch_size or num_samples, raise gradient_accumulation_steps, or turn on"
    " compute.remat"
)


def start(command: Callable[[list[str], str], None], prog: str) -> NoReturn:
    """`run`, as the whole process."""
    code = run(command, prog)
    if code or _skips_farewell.is_set():
        if not code and peer_failure.PeerMonitor.active:
            import jax

            jax.distributed.shutdown()  # so that the other hosts need not wait
        # Python's farewell would crash where XLA's threads are still at work.
        interrupts.leave(code, streams=(sys.stdout, sys.stderr))
    sys.exit()


def skip_farewell() -> None:
    """The process shall end as soon as its command has: some library's part of Python's farewell
    may take for ever."""
    _skips_farewell.set()


def run(command: Callable[[list[str], str], None], prog: str) -> int:
    """Call `command` with the command line; the process's exit code."""
    # Streams that the caller closed (>&-): nobody reads them, and no file must take their place.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for terminals that are not UTF-8
    if "jax" not in sys.modules:
        os.environ.update(ENVIRONMENT)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", QUIET)
        chips.prepare_tpu_library()
    _stopped_by.clear()
    _unwound.clear()
    listener, hook = interrupts.listen(_end_if_unheard), sys.unraisablehook
    sys.unraisablehook = _ignore_or_repeat
    code = 0
    try:
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _stop)
        _allow_open_files()
        try:
            command(sys.argv[1:], prog)
        except SystemExit as end:
            code = int(end.code or 0)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if _stopped_by.is_set() or isinstance(error, KeyboardInterrupt):
            return _end_stopped(error)
        if isinstance(error, UserError):
            return _fail(str(error), error.exit_code)
        return _unexpected(error)
    finally:
        interrupts.listen(listener)
        sys.unraisablehook = hook
    return code


def _unexpected(error: Exception) -> int:
    """The exit code after an error that no code of ours has foreseen; raises it if it is a bug."""
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _end(141)
    if isinstance(error, RuntimeError) and peer_failure.is_peer_failure(error):
        return _fail(peer_failure.MESSAGE, 1)
    if is_out_of_memory(error):
        return _fail(OUT_OF_MEMORY, 1)
    if isinstance(error, OSError) and error.strerror is not None:
        where = error.filename or ("standard output" if _output_fails(error) else "")
        return _fail(str(UserError(f"{where}: {error.strerror}".removeprefix(": "))), 1)
    if _is_of_jax_settings(error):
        return _fail(f"an environment variable of JAX is wrong: {first_line(error)}", 2)
    _show_bug()  # ours, or a library's
    raise error


def _is_of_jax_settings(error: Exception) -> bool:
    """Whether JAX has refused what a variable says, while it was imported."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and frames[-1].filename.endswith("jax/_src/config.py")


def _output_fails(error: OSError) -> bool:
    """Whether it is the output whose disk is full: no error says so."""
    if error.errno != errno.ENOSPC:
        return False
    try:
        os.write(1, b"\n")
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would try once more, and complain
        return True
    return False


def _allow_open_files() -> None:
    """Raise the limit as far as this process may. UserError: it is too low."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = most == resource.RLIM_INFINITY
    wanted = 4096 if unlimited else min(most, 4096)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
            soft = wanted
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        raise UserError(
            f"this process may open {soft} files at once, and needs up to {OPEN_FILES}; raise the"
            " limit with ulimit -n"
        )


# A hangup before training just ends it.
_SIGNALS = tuple(number for number in interrupts.STOP_SIGNALS if number != signal.SIGHUP)
_stopped_by, _unwound = threading.Event(), threading.Event()
_skips_farewell = threading.Event()

UNWINDING = 3.0
"""Seconds from a signal's exception to the end of the command. Some code swallows any exception."""


class Stopped(KeyboardInterrupt):
    """A signal unwinds the stack as Ctrl-C does: unfinished files are removed on the way."""

    def __init__(self, number: int):
        self.number = number


def _stop(number: int, frame: Any) -> None:
    _stopped_by.set()
    while (
        frame
    ):  # an import makes errors of its own of any exception; nothing is to be undone there
        if frame.f_code.co_filename == IMPORT:
            interrupts.end(number, STOPPED_AT_WORK)
        frame = frame.f_back
    raise Stopped(number)


def _end_if_unheard(number: int) -> None:
    if number not in _SIGNALS:
        return
    if not (_stopped_by.wait(interrupts.GRACE) and _unwound.wait(UNWINDING)):
        interrupts.end(number, STOPPED_AT_WORK)


def _ignore_or_repeat(unraisable: Any) -> None:
    """Python's hook for exceptions where none can be raised (a callback of its garbage collector,
    say): if a signal's came there, it comes again."""
    if not isinstance(unraisable.exc_value, Stopped):
        sys.__unraisablehook__(unraisable)
        return
    again = threading.Timer(0.1, os.kill, [os.getpid(), unraisable.exc_value.number])
    again.daemon = True
    again.start()


def _end_stopped(stop: BaseException) -> int:
    """Also where a library has made another error of it, in the middle of an import say."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # it has been heard
    while not isinstance(stop, Stopped) and (cause := stop.__cause__ or stop.__context__):
        stop = cause
    with contextlib.suppress(OSError):
        terminal.status("")
        print(STOPPED, file=sys.stderr)
    _unwound.set()
    return _end(128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT))


def _show_bug() -> None:
    """Python prints the traceback, except where there are other hosts: there we end here."""
    if peer_failure.PeerMonitor.active:
        traceback.print_exc()
        _end(1)


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        terminal.status("")
        print(f"error: {message}", file=sys.stderr)
    return _end(code)


def _end(code: int) -> int:
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    peer_failure.exit_if_distributed(code)
    return code
