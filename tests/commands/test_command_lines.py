"""Command lines that nobody would write, as real processes: whatever is asked, there is a result or
one clear line, and Ctrl-C is heard. More of them: pytest -m slow --command-lines 2000"""

import collections
import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import helpers
import hypothesis
import pytest
from hypothesis import strategies as st

from gptjax import config_io
from gptjax.commands import (
    compare,
    convert,
    data,
    evaluate,
    generate,
    main,
    process,
    report,
    runs,
    suggest,
    sweep,
    train,
)  # fmt: skip

pytestmark = pytest.mark.slow

LONGEST = 20
"""Seconds until a command that is still at work gets a Ctrl-C (a run may well be asked for)."""
TO_STOP = 20

MODEL = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --sample-tokens 3".split()
SHORT = "--batch-size 4 --max-steps 4 --eval-interval 2 --eval-batches 2".split()
DATA = ["--data.source", "text.txt"]

COMMANDS = {
    ("train", *MODEL, *SHORT, *DATA, "--run-dir", "new"): train.DEFAULTS,
    ("train", "run", "--max-steps", "40"): train.DEFAULTS,
    ("train", "--init-from", "run", *SHORT, *DATA): train.DEFAULTS,
    ("generate", "run", "--max-new-tokens", "4"): generate.DEFAULTS,
    ("data", "text.txt"): data.DEFAULTS,
    ("evaluate", "run", "--text", "text.txt"): evaluate.DEFAULTS,
    ("evaluate", "run", "--split", "val"): evaluate.DEFAULTS,
    ("evaluate", "run", "--wikitext", "text.txt"): evaluate.DEFAULTS,
    ("evaluate", "run", "--lambada", "text.txt"): evaluate.DEFAULTS,
    ("compare", "run", "--steps", "1", "--greedy-tokens", "2"): compare.DEFAULTS,
    ("convert", "export", "run", "out"): convert.DEFAULTS[1:],
    ("convert", "import", "exported", "imported"): convert.DEFAULTS[:1],
    ("report", "run"): report.DEFAULTS,
    ("runs", "."): runs.DEFAULTS,
    ("suggest", "--data", "text.txt", "--hours", "0.01"): suggest.DEFAULTS,
    ("sweep", *MODEL, *SHORT, *DATA, "--learning-rate", "1e-3,1e-2"): sweep.DEFAULTS,
}
"""What works, and the flags that it has. (bench starts these with the same flags.)"""

PATHS = [
    "text.txt", "run", "exported", "empty.txt", "latin1.txt", "binary.bin", "lines.jsonl",
    "bad.jsonl", "table.csv", "a folder", "locked", "broken", "gone", "run[1]", "a b", "a\nb", "ü",
    "\udcff", "*", "~", "~nobody/x", "-", ".", "/", "..", "/dev/null", "/dev/zero", "/dev/full",
    "/proc/self/mem", "s3://bucket/x", "gs://", "gs:///x", "file:///x", "n" * 300, "n/" * 3000,
    "\\", "'", "$HOME", "quickstart", "gpt2", "builtin", "shakespeare",
]  # fmt: skip
NUMBERS = [
    "0", "1", "2", "3", "7", "16", "-1", "1.5", "0.1", "-0.0", "1e-30", "1e30", "1e400", "nan",
    "inf", "0x10", "1_000", "1e3", str(2**31), str(2**63), "9" * 5000, "٣",
]  # fmt: skip
WORDS = [
    "", " ", "None", "none", "true", "False", "yes", "auto", "best", "latest", "cpu", "gpu", "fsdp",
    "dense", "banded", "--", "-h", "--x", "\t", "\x1b[2J", "☃", "\U0001f600", "\udce4",
    "hi\\n", "%s", "{}", "[red]x[/]",
]  # fmt: skip
ENVIRONMENT = {
    "HOME": ["", "/nonexistent", "."], "TMPDIR": ["/nonexistent"], "COLUMNS": ["0", "1", "x"],
    "TERM": ["dumb", "", "xterm"], "FORCE_COLOR": ["1"], "LC_ALL": ["POSIX", "nonsense"],
    "PYTHONUTF8": ["0"], "PYTHONIOENCODING": ["ascii", "latin-1"], "PYTHONWARNINGS": ["error"],
    "GPTJAX_CACHE_DIR": ["/dev/null", "/proc/x", "ü", ""], "GPTJAX_TRICKS": ["", "-malloc", "x"],
    "JAX_PLATFORMS": ["", "cpu", "cuda", "nonsense"], "JAX_ENABLE_X64": ["1", "x"],
    "JAX_DEBUG_NANS": ["1"], "JAX_DISABLE_JIT": ["1"], "JAX_NUM_CPU_DEVICES": ["2", "0", "x"],
    "JAX_NUMPY_DTYPE_PROMOTION": ["strict"], "XLA_FLAGS": ["", "--xla_nonsense=1"],
    "TIKTOKEN_CACHE_DIR": ["/nonexistent"], "SLURM_JOB_ID": ["1"], "CUDA_VISIBLE_DEVICES": ["9"],
}  # fmt: skip


@st.composite
def command_lines(draw):
    """(arguments, {environment variable: value}, seconds until a Ctrl-C)."""
    base = draw(st.sampled_from(list(COMMANDS)))
    kinds = {}
    for default in COMMANDS[base]:
        kinds |= config_io.setting_types(type(default))
    argv = list(base)
    for _ in range(draw(st.integers(0, 3))):
        if not draw(st.integers(0, 5)):  # another positional one, or a mistake
            argv.insert(
                draw(st.integers(1, len(argv))), draw(st.sampled_from(PATHS + WORDS + NUMBERS))
            )
            continue
        name = draw(st.sampled_from([*kinds, *kinds, "nonsense", "lr", "n_layers", "batch"]))
        kind = kinds.get(name, str)
        literals = [str(value) for value in get_args(kind) if isinstance(value, str)]
        likely = NUMBERS if {int, float} & {kind, *get_args(kind)} else PATHS + literals * 9
        values = draw(
            st.lists(
                st.sampled_from(likely * 3 + PATHS + WORDS + NUMBERS)
                | st.text(
                    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5
                ),
                max_size=2,
                min_size=draw(st.integers(0, 1)),
            )
        )
        flag = "--" + draw(st.sampled_from([name, name.replace("_", "-"), name.split(".")[-1]]))
        if values and not draw(st.integers(0, 3)):
            flag, values = f"{flag}={values[0]}", values[1:]
        argv += [flag, *values]
    names = draw(st.lists(st.sampled_from(list(ENVIRONMENT)), max_size=2, unique=True))
    environment = {name: draw(st.sampled_from(ENVIRONMENT[name])) for name in names}
    soon = draw(st.sampled_from([False, False, True])) and draw(st.floats(0.2, 3.0))
    return argv, environment, soon or LONGEST


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cache_dir) -> Path:
    """What the paths above name."""
    folder = tmp_path_factory.mktemp("lines")
    (folder / "text.txt").write_text(helpers.TEXT)
    for name, content in {
        "empty.txt": b"", "latin1.txt": b"caf\xe9\n" * 99, "binary.bin": bytes(range(256)) * 9,
        "lines.jsonl": b'{"text": "one"}\n{"text": "two"}\n' * 99, "bad.jsonl": b'{"text": 1}\n',
        "table.csv": b"a,b\n1,2\n", "run[1]": b"a text in an odd place\n" * 99,
        "m[/x].txt": b"a text\n" * 99, ":x:": b"a text\n" * 99,
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "a folder").mkdir()
    (folder / "broken").symlink_to("nowhere")
    for argv in (
        ["train", *MODEL, *SHORT, *DATA, "--run-dir", "run"],
        ["convert", "export", "run", "exported"],
    ):
        result = call(folder, cache_dir, argv, {}, ends=300)
        assert result.returncode == 0, result.stderr
    return folder


def _child(argv: list[str], environment: dict[str, str], folder: str) -> None:
    """The command, in a process that has imported everything before."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as `program.end_on_interrupt`
    os.chdir(folder)
    Path("begun").touch()
    for descriptor, name in enumerate(("/dev/null", "out", "err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "r" if n == 0 else "w") for n in range(3))
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["gptjax", *argv]
    process.start(main.dispatch, "gptjax")


def call(
    folder: Path, cache_dir: Path, argv, environment, ends=LONGEST
) -> subprocess.CompletedProcess:
    """The command as a process of its own: a new Python where it or JAX reads the environment when
    it starts, else a fork of one that has imported JAX."""
    whole = helpers.command_environment(cache_dir, JAX_PLATFORMS="cpu") | environment
    if any(name.startswith(("JAX", "XLA", "PYTHON", "LC")) for name in environment):
        command = [sys.executable, "-m", "gptjax", *argv]
        with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
            child = subprocess.Popen(
                command, cwd=folder, env=whole, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )
        wait = lambda seconds: child.wait(seconds)  # noqa: E731
    else:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["gptjax.commands.train", "gptjax.launch", "gptjax.run"])
        child = server.Process(target=_child, args=(argv, whole, str(folder)), daemon=True)
        (folder / "begun").unlink(missing_ok=True)
        child.start()
        while not (folder / "begun").exists():  # not yet a command, which a signal could reach
            time.sleep(0.01)

        def wait(seconds):
            child.join(seconds)
            if child.exitcode is None:
                raise subprocess.TimeoutExpired(argv, seconds)

    code = None
    for seconds in (ends, TO_STOP):
        with contextlib.suppress(subprocess.TimeoutExpired):
            wait(seconds)
            code = child.exitcode if hasattr(child, "exitcode") else child.returncode
            break
        os.kill(child.pid, signal.SIGINT if seconds == ends else signal.SIGKILL)
    outputs = ((folder / name).read_text(errors="replace") for name in ("out", "err"))
    return subprocess.CompletedProcess(argv, code, *outputs)


def test_any_command_line_has_a_result_or_one_clear_line(folder, cache_dir, pytestconfig):
    count = pytestconfig.getoption("command_lines")
    ends = collections.Counter[tuple[str, int | None]]()
    failures = list[str]()  # all of them: a minute's search for one would be a pity
    keep = {path.name for path in folder.iterdir()} | {"out", "err", "data", "begun"}

    @hypothesis.settings(
        max_examples=count, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],  # each example takes seconds: no shrinking
    )  # fmt: skip
    @hypothesis.given(command_lines())
    def check(drawn):
        result = call(folder, cache_dir, *drawn)
        for path in folder.iterdir():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        ends[drawn[0][0], result.returncode] += 1
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        # -2: it was still importing what answers Ctrl-C.
        fine = result.returncode in (0, 130, -2) and not errors
        if "Unknown flag in XLA_FLAGS" in result.stderr:
            fine = True  # XLA ends the process itself, with this line
        elif result.returncode in (1, 2):
            fine = len(errors) == 1 and len(errors[0]) < 3100
        if not fine or "Traceback" in result.stderr + result.stdout:
            failures.append(f"{drawn}: {result.returncode}\n{result.stderr[-3000:]}")

    check()
    print("how they ended:", dict(sorted(ends.items(), key=str)))
    assert not failures, "\n\n".join(failures)
