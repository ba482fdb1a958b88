"""TPU slices by the names that people and Google give them."""

import importlib.util

import pytest

from gptjax.devices import topology
from gptjax.errors import UserError


@pytest.mark.parametrize(
    ("name", "kind", "sides"),
    # https://docs.cloud.google.com/tpu/docs/v5e, v5p, v4, v6e: the shapes of their slices
    [("v5e-1", "v5e", (1, 1)), ("v5e-4", "v5e", (2, 2)), ("v5e-8", "v5e", (2, 4)),
     ("v5litepod-16", "v5e", (4, 4)), ("v5e-32", "v5e", (4, 8)), ("V5E-256", "v5e", (16, 16)),
     ("v6e-8", "v6e", (2, 4)), ("v6e-128", "v6e", (8, 16)), ("v4-8", "v4", (2, 2, 1)),
     ("v4-16", "v4", (2, 2, 2)), ("v4-32", "v4", (2, 2, 4)), ("v5p-64", "v5p", (2, 4, 4)),
     ("v5p-128", "v5p", (4, 4, 4)), ("v5p-256", "v5p", (4, 4, 8)), ("v5p-1024", "v5p", (8, 8, 8)),
     ("v5p-2048", "v5p", (8, 8, 16)), ("v3-8", "v3", (2, 2)), ("v5e:2x4", "v5e", (2, 4)),
     ("v5p:4x4x12", "v5p", (4, 4, 12))],
)  # fmt: skip
def test_a_name_gives_the_shape_of_the_slice(name, kind, sides):
    assert topology.shape(name) == (kind, sides)


@pytest.mark.parametrize(
    ("name", "words"),
    [("a100-8", "expected a TPU slice such as"), ("v5e", "expected"), ("", "expected"),
     ("v5e-0", "no such slice"), ("v5e-2", "no such slice"), ("v5e-12", "powers of two"),
     ("v4:2x2", "has 3 axes"), ("v5e:2x2x2", "has 2 axes"), ("v5e:0x4", "has 2 axes"),
     ("v9z-8", "expected")],
)  # fmt: skip
def test_what_is_no_slice_is_told_what_is(name, words):
    with pytest.raises(UserError, match=f"--topology {name}: .*{words}"):
        topology.shape(name)


def test_without_the_compiler_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'jax\[tpu\]'"):
        topology.devices("v5e-8")
