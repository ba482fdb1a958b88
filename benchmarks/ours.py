"""gptjax's side of the benchmark, in a process of its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import worker
from benchmarks.worker import Job, Turns
from gptjax import launch, model, sampling, train_step
from gptjax.decode_layout import unstack
from gptjax.devices import setup
from gptjax.layers import compute_dtype
from gptjax.metrics import MetricsLog
from gptjax.progress import ProgressDisplay
from gptjax.runtime_config import RuntimeConfig
from gptjax.settings import INT_LIMIT
from gptjax.trainer import Callback, Row, Trainer

FOREVER = INT_LIMIT - 1
"""Steps: more than are taken here."""


class TakeTurns(Callback):
    """Holds the training loop between two turns. A unit of work is a step."""

    def __init__(self, turns: Turns):
        self._turns, self._left = turns, 0

    def on_step(self, trainer: Trainer, row: Row) -> None:
        self._left -= 1
        if self._left > 0:
            return
        # The loop has begun one step more than it reports: a turn ends when that one is done, and
        # begins after it. Only the first turn is the first step alone, which compiles.
        if row["step"] > 1:
            jax.block_until_ready(trainer.state)
        self._left = next(self._turns)


def train(job: Job, turns: Turns) -> None:
    """Steps of training, by all that train_jax.py runs: data from a file, metrics.jsonl, progress
    lines; but one evaluation, before the first turn, and no checkpoint."""
    optimizer = job.config.optimizer.replace(lr_decay_steps=job.config.lr_decay_steps)
    config = job.config.replace(optimizer=optimizer, max_steps=FOREVER)
    runtime = job.runtime.replace(
        run_dir=f"{job.folder}/{job.side}", eval_interval=FOREVER, eval_batches=1,
        save_interval=None, eval_full_split=False, sample_tokens=0, dry_run=False,
    )  # fmt: skip
    callbacks = [MetricsLog(), ProgressDisplay(), TakeTurns(turns)]
    launch.train(config, runtime, callbacks=callbacks)


def generate(job: Job, turns: Turns) -> None:
    """Continuations of a prompt of one token, as generate_jax.py makes them."""
    setup.select_platform(job.runtime.device)
    config = setup.resolve_dtype(job.config.model)
    params = jax.jit(lambda: model.init(config, train_step.random_key(job.config.seed)))()
    params = unstack(params, config, consume=True)
    for units in turns:
        for seed in range(units):
            for _ in sampling.generate(
                params, np.zeros(1, np.int32), job.new_tokens, config,
                sampling.Sampling(0.8, 200), num_samples=job.num_samples, seed=seed,
            ):  # fmt: skip
                pass


def ceilings(job: Job, turns: Turns) -> None:
    setup.start(RuntimeConfig(device=job.runtime.device, num_devices=1))
    width, length = (2048, 2**26) if jax.default_backend() == "cpu" else (8192, 2**29)
    square = jnp.ones((width, width), compute_dtype(setup.resolve_dtype(job.config.model)))
    long = jnp.ones(length, jnp.float32)
    multiply, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    found = worker.ceilings(
        width, lambda: multiply(square, square).block_until_ready(),
        long.nbytes, lambda: copy(long).block_until_ready(),
    )  # fmt: skip
    turns.facts = lambda: facts() | {"ceilings": found}
    next(turns)


MODES = {"train": train, "scaling": train, "generate": generate, "ceilings": ceilings}


def facts() -> dict[str, Any]:
    """What the report says of this side."""
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "versions": f"JAX {jax.__version__}",
        "devices": setup.describe(),
        "device_count": setup.device_count(),
        "platform": jax.default_backend(),
        "peak_flops": setup.peak_flops(),
        "device_memory": memory.get("peak_bytes_in_use"),
    }
