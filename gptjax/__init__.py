"""gptjax: train, sample and compare GPT-2/GPT-3 style models in JAX and Flax.

Importing it does nothing else: each public name loads what it needs when it is first used.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

# `python -m gptjax.convert` and its like, commands of gptjax 0.1, work until 0.3.
__path__.append(f"{__path__[0]}/moved")

_PUBLIC = {
    "ModelConfig": "config",
    "DataConfig": "config",
    "OptimizerConfig": "config",
    "TrainConfig": "config",
    "PRESETS": "config",
    "RuntimeConfig": "runtime_config",
    "ComputeConfig": "runtime_config",
    "load_config": "config_io",
    "UserError": "errors",
    "ConfigError": "errors",
    "RunError": "errors",
    "init": "model",
    "apply": "model",
    "init_cache": "cache",
    "Callback": "trainer",
    "MetricsLog": "metrics",
    "History": "history",
    "ProgressDisplay": "progress",
    "Samples": "progress",
    "Trackers": "trackers.callback",
    "Run": "run",
    "load": "run",
    "train": "run",
    "from_pretrained": "run",
    "untrained": "run",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"gptjax.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
