"""What gptjax 0.1 wrote and 0.2 still reads: its saved settings, its config files, its flags.

There, one TrainConfig held everything: the optimizer's settings and the circumstances of the run
were fields of it, and what `runtime_config.ComputeConfig` holds was part of the model.
"""

import dataclasses
import runpy
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gptjax
from gptjax import config
from gptjax.config import ModelConfig, OptimizerConfig, TrainConfig
from gptjax.runtime_config import ComputeConfig, DistributedConfig, RuntimeConfig

UNSET: Any = object()
"""The value of what a config file left out."""


def _names(*classes: type) -> list[str]:
    return [field.name for cls in classes for field in dataclasses.fields(cls)]


ACTIVATIONS = {"tanh": "gelu_tanh", "erf": "gelu_erf"}
"""{what `model.gelu` was: what `model.activation` is now}."""

RENAMED = {f"model.{name}": f"compute.{name}" for name in _names(ComputeConfig)} | {
    "parallel.strategy": "strategy", "gelu": "model.activation", "model.gelu": "model.activation",
}  # fmt: skip
"""{old: new}. (The optimizer's flags are understood without `optimizer.` as before.)"""


def notice(text: str) -> None:
    """Say that something of gptjax 0.1 was used."""
    print(f"note: {text}", file=sys.stderr)


def split_settings(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(those of the experiment, those of its circumstances), unchecked: what is not known is left
    where it was."""
    experiment: dict[str, Any] = {}
    runtime: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "parallel" and isinstance(value, dict):
            runtime |= value
        elif name == "model" and isinstance(value, dict):
            compute = {key: value[key] for key in _names(ComputeConfig) if key in value}
            experiment[name] = {key: value[key] for key in value if key not in compute}
            runtime |= {"compute": compute} if compute else {}
        elif name in _names(RuntimeConfig):
            runtime[name] = value
        elif name not in _names(OptimizerConfig):
            experiment[name] = value
    optimizer = {name: fields[name] for name in _names(OptimizerConfig) if name in fields}
    given = experiment.get("optimizer", {})
    if optimizer and isinstance(given, dict):
        experiment["optimizer"] = given | optimizer
    batches, steps = runtime.get("eval_batches"), runtime.get("gradient_accumulation_steps")
    if type(batches) is int and type(steps) is int and batches > 0 < steps:
        runtime["eval_batches"] = max(1, round(batches / steps))  # these were micro-batches
    return experiment, runtime


def with_activation(experiment: Any) -> Any:
    """An experiment's settings, unchecked, with `model.activation` for what was `model.gelu`."""
    model = experiment.get("model") if isinstance(experiment, dict) else None
    if not isinstance(model, dict) or "gelu" not in model:
        return experiment
    form = model["gelu"]
    rest = {name: value for name, value in model.items() if name != "gelu"}
    activation = ACTIVATIONS.get(form, form) if isinstance(form, str) else form
    return experiment | {"model": {"activation": activation} | rest}


def run_config_file(path: Path) -> dict[str, Any]:
    """The names that a config file sets. It is run with classes in place of `gptjax.config`'s that
    take the settings of both editions and check none; what is left out is UNSET.

    Raises:
        Exception: whatever the file raises.
    """

    def replace(self: Any, changes: Mapping[str, Any] = {}, /, **more: Any) -> Any:
        return dataclasses.replace(self, **changes, **more)

    def recorder(name: str, *classes: type, **more: Any) -> Any:
        names = dict.fromkeys([*_names(*classes), *more])
        fields = [(each, Any, UNSET) for each in names]
        return dataclasses.make_dataclass(name, fields, namespace={"replace": replace})

    model = recorder("ModelConfig", ModelConfig, ComputeConfig, gelu=UNSET)
    train = recorder("TrainConfig", TrainConfig, OptimizerConfig, RuntimeConfig, parallel=UNSET)
    stand_in = types.ModuleType("gptjax.config")
    vars(stand_in).update(vars(config))
    vars(stand_in).update(
        ModelConfig=model, TrainConfig=train, DistributedConfig=DistributedConfig,
        ParallelConfig=recorder("ParallelConfig", strategy=UNSET),
        PRESETS={
            name: model(**{field: getattr(preset, field) for field in preset.given})
            for name, preset in config.PRESETS.items()
        },
        FINETUNE=train(data=config.FINETUNE.data, optimizer=config.FINETUNE.optimizer),
    )  # fmt: skip
    sys.modules["gptjax.config"], gptjax.config = stand_in, stand_in
    try:
        return runpy.run_path(str(path))
    finally:
        sys.modules["gptjax.config"], gptjax.config = config, config
