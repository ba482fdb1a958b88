"""What tests share: a small text, real processes of the commands, and how two runs are compared."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from gptjax import run_metadata, train_step
from gptjax.checkpoint import Checkpoints, on_one_device

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "train_jax.py"
GENERATE = ROOT / "generate_jax.py"
SHAKESPEARE = Path(os.environ.get("GPTJAX_CACHE_DIR", "")) / "tinyshakespeare.txt"

TIMED = "seconds", "tokens_per_second", "time", "goodput"
"""What two equal runs have different in metrics.jsonl."""

_WORDS = """now is the winter of our discontent made glorious summer by this sun and all clouds
that loured upon house in deep bosom ocean buried brows bound with victorious wreaths bruised arms
hung up for monuments stern alarums changed to merry meetings dreadful marches delightful""".split()
_draw = random.Random(0)
TEXT = "".join(
    f"{_draw.choice(['RICHARD', 'CLARENCE', 'HASTINGS'])}:\n"
    f"{' '.join(_draw.choices(_WORDS, k=_draw.randint(4, 12))).capitalize()}.\n\n"
    for _ in range(400)
)

TINY = (
    "--data.source text.txt --model.n-layer 2 --model.n-head 2 --model.n-embd 16"
    " --model.block-size 16 --model.dropout 0.1 --batch-size 8 --max-steps 40 --eval-interval 10"
    " --log-interval 5 --sample-tokens 20 --eval-full-split --num-devices 2"
).split()
"""Flags of a run of 40 steps that takes seconds, in a folder with text.txt."""


def command_environment(cache_dir: Path, **more: str) -> dict[str, str]:
    """Of a process that a test starts: on the CPU, with its own cache."""
    # JAX sets the last one, in the tests' own process.
    ours = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "TF_CPP_MIN_LOG_LEVEL")
    keep = {k: v for k, v in os.environ.items() if k not in ours}
    where = {"GPTJAX_CACHE_DIR": str(cache_dir), "PYTHONPATH": str(ROOT)}
    return keep | where | {"JAX_PLATFORMS": "cpu"} | more


def assert_one_clear_line(result: subprocess.CompletedProcess, *words: str, code: int = 2) -> None:
    """What every user error looks like."""
    assert result.returncode == code, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"


def start(folder: Path, cache_dir: Path, *flags: str, **environment: str) -> subprocess.Popen:
    """train_jax.py with these flags, in a folder that has text.txt."""
    return subprocess.Popen(
        [sys.executable, "-u", TRAIN, *flags],
        cwd=folder, env=command_environment(cache_dir, **environment), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_hosts(
    count: int, folder: Path, cache_dir: Path, *flags: str, each: list[list[str]] | None = None
) -> list[subprocess.Popen]:
    """So many processes with one CPU device each, which find each other by JAX's variables; with
    `each` one's own flags."""
    port = free_port()
    return [
        start(
            folder, cache_dir, *flags, *(each[rank] if each else []), "--num-devices", "1",
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES=str(count),
            JAX_PROCESS_ID=str(rank),
        )
        for rank in range(count)
    ]  # fmt: skip


def finish(process: subprocess.Popen, timeout: float = 300) -> subprocess.CompletedProcess:
    """Wait for it; its output."""
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(process: subprocess.Popen, words: str) -> str:
    """Read its output until a line has these words."""
    seen = ""
    for line in process.stdout:
        seen += line
        if words in line:
            return seen
    raise AssertionError(f"{words!r} never came: {seen} {process.stderr.read()}")


def final_state(run_dir: Path, step: int = 40) -> list[np.ndarray]:
    """Every array of the checkpoint, in order."""
    with Checkpoints(run_dir) as checkpoints:
        config = run_metadata.read(checkpoints, step).config
        target = on_one_device(jax.eval_shape(lambda: train_step.init_state(config)))
        loaded = checkpoints.restore(step, params=target.params, opt_state=target.opt_state)
    return [np.asarray(x) for x in jax.tree.leaves(loaded)]


def logged(run_dir: Path) -> list[dict]:
    """metrics.jsonl without its timing fields."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: r[k] for k in r if k not in TIMED} for r in rows]


def assert_same_run(a: Path, b: Path, step: int = 40) -> None:
    """Bitwise the same state after the same log, and the same best step."""
    for x, y in zip(final_state(a, step), final_state(b, step), strict=True):
        assert np.array_equal(x, y)
    assert logged(a) == logged(b)
    best = [Checkpoints(run_dir).candidates("best")[0] for run_dir in (a, b)]
    assert best[0] == best[1]


def largest_gap(a: Path, b: Path) -> float:
    """How far the losses of two runs with the same log fields are apart, in nats at most."""
    ours, theirs = logged(a), logged(b)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    return max(
        abs(x[name] - y[name])
        for x, y in zip(ours, theirs, strict=True)
        for name in ("train_loss", "val_loss")
        if x[name] is not None
    )
