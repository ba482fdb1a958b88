"""Rows to devices, copies to devices, memory, the compilation cache."""

import ctypes
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import parallel
from gptjax.errors import UserError


def test_rows_reach_devices_and_micro_batches_in_order():
    rows = np.arange(48)[:, None]
    split = parallel.split_rows(rows, 3)
    assert split.shape == (8, 3, 2, 1)
    assert np.array_equal(split.reshape(-1), np.arange(48))


def test_hosts_feed_contiguous_shares_of_the_same_global_batch(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    shares = []
    for host in range(4):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        shares.append(np.arange(32)[parallel.host_rows(32)])
    assert np.array_equal(np.concatenate(shares), np.arange(32))


def test_copies_go_out_and_come_back_unchanged():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.int32(7)}
    stacked = parallel.replicate(tree)
    assert stacked["a"].shape == (8, 2, 3)
    for back in (parallel.unreplicate(stacked), parallel.first_copy(stacked)):
        assert jax.tree.all(jax.tree.map(np.array_equal, back, tree))
    assert len(parallel.unreplicate(stacked)["a"].sharding.device_set) == 1  # one process
    assert parallel.fetch(parallel.replicate({"x": jnp.float32(1.5)})) == {"x": 1.5}


def test_what_unreplicate_returns_survives_donation_of_the_original():
    stacked = parallel.replicate({"a": jnp.arange(1000.0)})
    one = parallel.unreplicate(stacked)
    step = jax.pmap(lambda x: jax.tree.map(lambda y: y * 0 - 1, x), donate_argnums=0)
    for _ in range(3):
        stacked = step(stacked)
    assert np.array_equal(one["a"], np.arange(1000.0))


def test_all_devices_learn_the_largest_stop_signal_after_the_same_step():
    step = parallel.map_train_step(lambda state, batch, axis_name: (state, {"loss": batch.sum()}))
    batch = np.ones((8, 1))
    _, quiet = step(parallel.replicate({"x": jnp.zeros(3)}), batch)
    _, stopped = step(parallel.replicate({"x": jnp.zeros(3)}), batch, stop=15)
    assert (parallel.fetch(quiet)["stop"], parallel.fetch(stopped)["stop"]) == (0, 15)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="not glibc")
def test_a_step_gets_its_memory_back_and_not_from_the_kernel(command):
    """In processes of their own: malloc is told once, before the threads start."""
    script = """
import resource, sys
from gptjax import parallel
if len(sys.argv) > 1:
    parallel.start("cpu", None, 10**9)
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
    parallel._delete_oldest(tmp_path, 300)
    assert len(list(tmp_path.iterdir())) == 3
    parallel._delete_oldest(tmp_path, 150)
    assert [file.name for file in tmp_path.iterdir()] == ["new"]


def test_xla_flags_of_the_user_are_kept(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_foo=1")
    parallel.add_xla_flag("--xla_bar=2")
    parallel.add_xla_flag("--xla_foo=3")
    assert parallel.os.environ["XLA_FLAGS"] == "--xla_foo=1 --xla_bar=2"


def test_a_missing_device_is_named_with_what_to_do():
    with pytest.raises(UserError, match=r"JAX finds no gpu here, only cpu; install jax\[cuda13\]"):
        parallel.use_platform("gpu")


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
    assert parallel.peak_flops() == (4 * peak if peak else None)
