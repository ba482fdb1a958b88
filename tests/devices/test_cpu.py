"""What makes CPUs faster, and its off-switches."""

import ctypes
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import command_environment

from gptjax.devices import cpu

TRAIN_AND_SAMPLE = """
import functools, json, sys
import numpy as np
from gptjax import sampling, train_step
from gptjax.config import ModelConfig, TrainConfig
from gptjax.decode_layout import unstack
from gptjax.devices import hosts, setup
from gptjax.devices.strategy import get_strategy
from gptjax.runtime_config import RuntimeConfig

setup.start(RuntimeConfig(device="cpu", num_devices=2))
model = ModelConfig(int(sys.argv[1]), 2, 16, block_size=16, vocab_size=50)
config = TrainConfig(model, batch_size=4)
strategy = get_strategy("pmap")
step = strategy.map_train_step(functools.partial(train_step.train_step, config=config))
state = strategy.to_devices(strategy.initialise(lambda: train_step.init_state(config)))
windows = np.random.default_rng(0).integers(0, 50, (4, 17)).astype(np.int32)
for _ in range(2):
    state, metrics = step(state, windows)
params = unstack(strategy.for_sampling(state.params), model)
tokens = sampling.generate(params, np.zeros(1, np.int32), 12, model, seed=1)
print(json.dumps([hosts.fetch(metrics), np.concatenate([*tokens], 1).tolist()]))
"""


@pytest.mark.parametrize("layers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_all_off_switches_together_change_no_result(layers, cache_dir):
    off = "-malloc,-thread_per_device,-sampling_kernels"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN_AND_SAMPLE, str(layers)],
            env=command_environment(cache_dir, GPTJAX_TRICKS=tricks), stdout=subprocess.PIPE,
        )
        for tricks in ("", off)
    ]  # fmt: skip
    outputs = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
    (metrics, tokens), (expected_metrics, expected_tokens) = outputs
    assert metrics == pytest.approx(expected_metrics, rel=1e-5)
    assert tokens == expected_tokens


def test_sampling_without_the_newer_kernels_is_the_same(monkeypatch):
    def logits(x):
        return jax.nn.log_softmax(jnp.tanh(x @ x.T)).sum(-1)

    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    options = cpu.sampling_compiler_options()
    assert options
    ours = jax.jit(logits, compiler_options=options)(x)
    monkeypatch.setenv("GPTJAX_TRICKS", "-sampling_kernels")
    assert cpu.sampling_compiler_options() is None
    np.testing.assert_allclose(ours, jax.jit(logits)(x), rtol=1e-5)


def test_cores_are_divided_only_among_several_devices(monkeypatch):
    for devices, tricks, flags in [
        (1, "", ""), (2, "-thread_per_device", ""), (2, "", "--xla_cpu_multi_thread_eigen=false")
    ]:  # fmt: skip
        monkeypatch.setenv("XLA_FLAGS", "")
        monkeypatch.setenv("GPTJAX_TRICKS", tricks)
        cpu.divide_cores(devices)
        assert os.environ["XLA_FLAGS"] == flags


def test_xla_flags_of_the_user_are_kept(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_foo=1")
    cpu.add_xla_flag("--xla_bar=2")
    cpu.add_xla_flag("--xla_foo=3")
    assert os.environ["XLA_FLAGS"] == "--xla_foo=1 --xla_bar=2"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="not glibc")
def test_a_step_reuses_its_memory_unless_switched_off(command):
    """In processes of their own: malloc is told once, before JAX's threads start."""
    script = """
import resource, sys
from gptjax.devices import setup
from gptjax.runtime_config import RuntimeConfig
setup.start(RuntimeConfig(device="cpu", num_devices=int(sys.argv[1])))
import jax, jax.numpy as jnp
n = jax.device_count()


@jax.pmap
def step(x):
    wide = jnp.sqrt(x + jnp.arange(int(sys.argv[2]) << 13))
    return wide @ jnp.ones(wide.shape[1])


faults, x = [], jnp.ones((n, 32, 1))
for _ in range(10):
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(sorted(b - a for a, b in zip(faults, faults[1:]))[6])
"""
    for devices, mib in (("1", "70"), ("1", "160")):
        kept, returned = (
            int(command("-c", script, devices, mib, GPTJAX_TRICKS=tricks).stdout)
            for tricks in ("", "-malloc")
        )
        # A MiB is 256 pages of 4 KiB.
        assert returned > int(mib) * 200 and kept < 100, (devices, mib)
