"""`import gptjax` does nothing: it is the user's process."""

import json
import subprocess
import sys

import helpers
import pytest

import gptjax

IMPORT = """
import json, logging, os, sys, warnings
def state():
    loggers = {name: logging.getLogger(name).level for name in ("", "absl", "asyncio", "jax")}
    streams = sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__
    return [loggers, [str(f) for f in warnings.filters], dict(os.environ), streams]
before = state()
import gptjax
names = dir(gptjax), gptjax.__version__
print(json.dumps([before == state(), sorted(sys.modules)]))
"""


def imported(code: str) -> list:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], cwd=helpers.ROOT, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    return json.loads(result.stdout)


def test_importing_it_loads_no_library_and_changes_nothing():
    unchanged, modules = imported(IMPORT)
    assert unchanged
    heavy = {"jax", "jaxlib", "flax", "optax", "orbax", "numpy", "torch", "transformers", "tyro",
             "rich", "tiktoken", "matplotlib", "safetensors", "sentencepiece"}  # fmt: skip
    assert not heavy & set(modules)
    assert [name for name in modules if name.startswith("gptjax")] == ["gptjax"]


def test_settings_are_made_without_jax():
    code = "import gptjax, json, sys; gptjax.TrainConfig(); gptjax.RuntimeConfig();"
    modules = imported(code + "print(json.dumps(sorted(sys.modules)))")
    assert "gptjax.config" in modules and not {"jax", "numpy", "flax"} & set(modules)


@pytest.mark.parametrize("name", gptjax.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(gptjax, name)
    assert name in dir(gptjax)
    assert name in ("__version__", "PRESETS") or value.__doc__


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'gptjax' has no attribute 'generate'"):
        gptjax.generate  # noqa: B018
