"""Real training runs: processes, what they leave behind, and how two runs are compared."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from conftest import ROOT, command_environment

from gptjax import checkpoint, train
from gptjax.checkpoint import Checkpoints

TRAIN = ROOT / "train_jax.py"
TINY = (
    "--data.source text.txt --model.n-layer 2 --model.n-head 2 --model.n-embd 16"
    " --model.block-size 16 --model.dropout 0.1 --batch-size 8 --max-steps 40 --eval-interval 10"
    " --log-interval 5 --sample-tokens 20 --eval-full-split --num-devices 2"
).split()


def start(folder: Path, cache_dir: Path, *flags: str, **environment: str) -> subprocess.Popen:
    """train_jax.py with these flags, in a folder that has text.txt."""
    return subprocess.Popen(
        [sys.executable, "-u", TRAIN, *flags],
        cwd=folder, env=command_environment(cache_dir, **environment), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def free_port() -> int:
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
        config = checkpoints.facts(step).config
        shapes = jax.eval_shape(lambda: train.init_state(config))
        target = checkpoint.on_one_device(shapes)
        loaded = checkpoints.restore(step, params=target.params, opt_state=target.opt_state)
    return [np.asarray(x) for x in jax.tree.leaves(loaded)]


def logged(run_dir: Path) -> list[dict]:
    """metrics.jsonl without its timing fields."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: r[k] for k in r if k not in ("seconds", "tokens_per_second")} for r in rows]


def assert_same_run(a: Path, b: Path, step: int = 40) -> None:
    """Bitwise the same state after the same log, and the same best step."""
    for x, y in zip(final_state(a, step), final_state(b, step), strict=True):
        assert np.array_equal(x, y)
    assert logged(a) == logged(b)
    best = [Checkpoints(run_dir).candidates("best")[0] for run_dir in (a, b)]
    assert best[0] == best[1]


def close_to(a: Path, b: Path, step: int = 40) -> float:
    """How far two runs with the same log fields are apart: their largest difference of a loss,
    in nats."""
    ours, theirs = logged(a), logged(b)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    gaps = [
        abs(x[name] - y[name])
        for x, y in zip(ours, theirs, strict=True)
        for name in ("train_loss", "val_loss")
        if x[name] is not None
    ]
    return max(gaps)
