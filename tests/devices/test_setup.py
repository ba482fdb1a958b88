"""The set-up of devices, and what is known of them."""

import os
import types

import jax
import pytest

from gptjax.config import ModelConfig
from gptjax.devices import setup
from gptjax.errors import UserError
from gptjax.runtime_config import RuntimeConfig


@pytest.fixture
def cache_settings():
    """The tests' own settings of the compilation cache, restored."""
    names = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs",
             "persistent_cache_min_entry_size_bytes")  # fmt: skip
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_compilation_cache_loses_its_oldest_files(tmp_path, monkeypatch, cache_settings):
    for age, name in enumerate(["new", "middle", "old"]):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    for limit, names in ((300, {"new", "middle", "old"}), (150, {"new"})):
        monkeypatch.setattr(setup, "COMPILATION_CACHE_BYTES", limit)
        setup.use_compilation_cache(tmp_path)
        assert set(os.listdir(tmp_path)) == names
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, cache_settings):
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").touch()
    setup.use_compilation_cache(tmp_path / "file" / "xla")
    assert jax.config.jax_compilation_cache_dir == before


def test_a_missing_device_is_named_with_what_to_do():
    with pytest.raises(UserError, match=r"JAX finds no gpu here, only cpu; install jax\[cuda13\]"):
        setup.select_platform("gpu")


def test_the_number_of_devices_is_fixed_once_jax_runs(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert setup.device_count() == 8 and setup.describe() == "8 x cpu"
    setup.start(RuntimeConfig(device="cpu", num_devices=8))
    with pytest.raises(UserError, match="JAX already runs with 8 devices"):
        setup.start(RuntimeConfig(device="cpu", num_devices=2))


@pytest.mark.parametrize(
    ("backend", "dtype", "expected"),
    [("cpu", "auto", "float32"), ("gpu", "auto", "bfloat16"), ("tpu", "auto", "bfloat16"),
     ("tpu", "float32", "float32"), ("cpu", "bfloat16", "bfloat16")],
)  # fmt: skip
def test_an_open_dtype_is_what_suits_the_device(monkeypatch, backend, dtype, expected):
    device = types.SimpleNamespace(platform=backend)
    model = ModelConfig(n_layer=1, dtype=dtype)
    resolved = setup.resolve_dtype(model, device)
    assert resolved.dtype == expected and resolved.n_layer == 1
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert setup.resolve_dtype(model) == resolved


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("cpu", None)],
)
def test_the_peak_is_that_of_all_devices(monkeypatch, kind, peak):
    device = type("Device", (), {"device_kind": kind})
    monkeypatch.setattr(jax, "devices", lambda: [device] * 4)
    assert setup.peak_flops() == (4 * peak if peak else None)
