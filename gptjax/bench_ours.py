"""Our side of `gptjax.bench`, in a process of its own."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import bench, data, devices, generate, parallel, train
from gptjax.bench import Job
from gptjax.model import compute_dtype, init_params, unstack


def trainer(job: Job) -> Callable[[int], None]:
    """A function that takes so many training steps, as train_jax.py does."""
    config = job.config
    size = config.model.num_parameters(embeddings=False)
    devices.start(config.device, job.devices, size)
    config.divide_batch(devices.device_count())
    strategy = parallel.strategy("pmap")
    step = strategy.map_train_step(
        functools.partial(train.train_step, config=config), config.gradient_accumulation_steps
    )
    state = strategy.place(strategy.build(lambda: train.init_state(config)))
    tokens = bench.random_tokens(config)
    number = 0

    def run(steps: int) -> None:
        nonlocal state, number
        pending = None
        for _ in range(steps):
            rows = data.batch_at(
                tokens, config.seed, number, batch_size=config.batch_size,
                block_size=config.model.block_size,
            )  # fmt: skip
            state, metrics = step(state, rows)
            # The metrics of the step before are read while this one runs.
            if pending:
                parallel.fetch(pending)
            pending, number = metrics, number + 1
        if pending:
            parallel.fetch(pending)

    return run


def sampler(job: Job) -> Callable[[int], None]:
    """A function that continues a prompt of one token so many times, as generate_jax.py does."""
    config = job.config
    devices.use_platform(config.device)
    params = jax.jit(lambda: init_params(config.model, config.seed))()
    params = unstack(params, config.model, consume=True)
    prompt = np.zeros(1, np.int32)

    def run(times: int) -> None:
        for seed in range(times):
            for _ in generate.generate(
                params, prompt, job.tokens, config.model, generate.Sampling(0.8, 200),
                num_samples=job.samples, seed=seed,
            ):  # fmt: skip
                pass

    return run


def ceilings(job: Job) -> Callable[[int], None]:
    """A function that measures one large matmul and one large copy, and puts down the best."""
    devices.start(job.config.device, 1, 10**9)
    on_cpu = jax.default_backend() == "cpu"
    width = 2048 if on_cpu else 8192
    square = jnp.ones((width, width), compute_dtype(job.config.model))
    long = jnp.ones((2**26 if on_cpu else 2**29,), jnp.float32)
    multiply, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)

    def seconds(work: Callable[[], jax.Array]) -> float:
        work().block_until_ready()
        times = []
        for _ in range(7):
            began = time.perf_counter()
            work().block_until_ready()
            times.append(time.perf_counter() - began)
        return min(times)

    def run(_: int) -> None:
        best["matmul_flops"] = 2 * width**3 / seconds(lambda: multiply(square, square))
        best["copy_bytes_per_second"] = 2 * long.nbytes / seconds(lambda: copy(long))

    return run


best: dict[str, float] = {}


def facts() -> dict[str, Any]:
    """What the table says of this side."""
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "versions": f"JAX {jax.__version__}",
        "devices": devices.describe(),
        "device_count": devices.device_count(),
        "platform": jax.default_backend(),
        "peak_flops": devices.peak_flops(),
        "device_memory": memory.get("peak_bytes_in_use"),
        "ceilings": best,
    }


if __name__ == "__main__":
    bench.serve(
        {"train": trainer, "scaling": trainer, "generate": sampler, "ceilings": ceilings}, facts
    )
