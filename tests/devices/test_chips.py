"""The vendors' numbers, by the names that JAX gives devices."""

import os

import pytest

from gptjax.devices import chips


@pytest.mark.parametrize(
    ("kind", "flops"),
    [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v4", 275e12), ("TPU v6 lite", 918e12),
     ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L4", 121e12),
     ("NVIDIA L40S", 362e12), ("Tesla V100-SXM2-16GB", 125e12), ("NVIDIA A100-SXM4-80GB", 312e12),
     ("NVIDIA L40", None), ("cpu", None), ("TPU v9", None)],
)  # fmt: skip
def test_a_device_is_found_by_its_longest_name(kind, flops):
    chip = chips.find(kind)
    assert (chip and chip.flops) == flops


@pytest.mark.parametrize("attached", [False, True])
def test_the_tpu_library_is_told_only_where_there_is_no_tpu(monkeypatch, attached):
    monkeypatch.setattr(chips.glob, "glob", lambda pattern: ["/dev/accel0"] * attached)
    for name in chips.NO_TPUS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    chips.prepare_tpu_library()
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine"
    assert ("TPU_SKIP_MDS_QUERY" in os.environ) == (not attached)
    for name in chips.NO_TPUS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "mine", ["", "--xla_tpu_x=1", f"--{chips.STACK}=65536", "--undefok=a,b --a=1"]
)
def test_the_tpu_compiler_has_stacks_that_it_does_not_overflow(monkeypatch, mine):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", mine)
    monkeypatch.setattr(chips, "NO_TPUS", {})
    for _ in range(2):  # a process and its children
        chips.prepare_tpu_library()
    flags = os.environ["LIBTPU_INIT_ARGS"].split()
    assert flags[: len(mine.split())] == mine.split()
    if "undefok" in mine:  # libtpu takes the last one
        assert flags[-1] == f"--undefok={chips.STACK},a,b"
    assert sum(flag.startswith(f"--{chips.STACK}=") for flag in flags) == 1
