"""The set-up before JAX starts, and what is known of devices."""

import ctypes
import os

import jax
import pytest

from gptjax import devices
from gptjax.errors import UserError


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="not glibc")
def test_a_step_gets_its_memory_back_and_not_from_the_kernel(command):
    """In processes of their own: malloc is told once, before the threads start."""
    script = """
import resource, sys
from gptjax import devices
if len(sys.argv) > 1:
    devices.start("cpu", None, 10**9)
import jax, jax.numpy as jnp
step = jax.jit(lambda x: x + 1)
faults, x = [], jnp.zeros(1 << 24)
for _ in range(60):
    x = step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(sum(after - before > 1000 for before, after in zip(faults[-21:], faults[-20:])))
"""
    # 64 MiB are 16,384 pages, and more than malloc ever keeps by itself. Its heap still grows now
    # and then.
    kept, returned = (int(command("-c", script, *flags).stdout) for flags in (["keep"], []))
    assert returned > 15 and kept < 5


def test_the_compilation_cache_loses_its_oldest_files_beyond_its_size(tmp_path):
    for age, name in enumerate(["new", "middle", "old"]):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    devices._delete_oldest(tmp_path, 300)
    assert len(list(tmp_path.iterdir())) == 3
    devices._delete_oldest(tmp_path, 150)
    assert [file.name for file in tmp_path.iterdir()] == ["new"]


def test_xla_flags_of_the_user_are_kept(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_foo=1")
    devices.add_xla_flag("--xla_bar=2")
    devices.add_xla_flag("--xla_foo=3")
    assert devices.os.environ["XLA_FLAGS"] == "--xla_foo=1 --xla_bar=2"


def test_a_missing_device_is_named_with_what_to_do():
    with pytest.raises(UserError, match=r"JAX finds no gpu here, only cpu; install jax\[cuda13\]"):
        devices.use_platform("gpu")


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L4", 121e12),
     ("NVIDIA A100-SXM4-80GB", 312e12), ("TPU v4", 275e12), ("TPU v5 lite", 197e12),
     ("cpu", None), ("NVIDIA L40", None)],
)  # fmt: skip
def test_peak_flops_are_the_datasheets_or_unknown(monkeypatch, kind, peak):
    device = type("Device", (), {"device_kind": kind})
    monkeypatch.setattr(jax, "devices", lambda: [device] * 4)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert devices.peak_flops() == (4 * peak if peak else None)
