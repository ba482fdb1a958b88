"""Rows to devices, copies to devices, and the rule for CPU devices."""

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


@pytest.mark.parametrize(
    ("cores", "batch", "devices"), [(2, 12, 2), (16, 12, 12), (8, 7, 7), (4, 9, 3), (1, 12, 1)]
)
def test_a_small_model_gets_one_cpu_device_per_core_that_divides_its_batch(
    monkeypatch, cores, batch, devices
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores))
    assert parallel._cpu_devices(800_000, batch) == devices


def test_a_large_model_gets_one_cpu_device():
    assert parallel._cpu_devices(85_000_000, 16) == 1


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
