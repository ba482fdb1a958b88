"""What a checkpoint says of itself besides arrays, and how it is loaded to be used."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gptjax import config_io, finetune, optim
from gptjax.checkpoint import (
    Checkpoints,
    Corrupted,
    finished_steps,
    on_one_device,
    read_record,
)
from gptjax.config import ModelConfig, TrainConfig
from gptjax.model import Params, init
from gptjax.runtime_config import RuntimeConfig
from gptjax.train_step import random_key


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """A checkpoint is self-contained: with this, nothing but its arrays is needed to use it."""

    config: TrainConfig
    runtime: RuntimeConfig
    tokenizer: str
    """`tokenizers.to_json` of the run's tokenizer."""
    data_fingerprint: str | None = None
    """Of the tokens it was trained on; None where they are not known: the weights were imported."""
    best_val_loss: float | None = None
    """Of the run so far, among losses over the same windows."""
    val_loss: float | None = None
    """Of these weights, where it was measured."""
    eval_windows: int | None = None
    """Over how many validation windows the two losses were measured; None: over all (0.1)."""
    evaluations_since_best: int = 0
    """In a row, with losses that were no better; `RuntimeConfig.patience` is over them."""
    attention: str | None = None
    """The attention kernel it was trained with; None: not known."""
    unfinished: dict[str, Any] | None = None
    """The last step's row for metrics.jsonl, where the run was stopped before its evaluation."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["config"], fields["runtime"]
        return {
            "experiment": config_io.to_dict(self.config),
            "runtime": config_io.to_dict(self.runtime),
        } | fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any], where: str) -> "CheckpointMetadata":
        """The inverse of `to_dict`; understands gptjax 0.1's too. `where` names it in errors.

        Raises:
            Corrupted: it is not of that form.
            UserError: it has settings that this version does not know.
        """
        try:
            rest = dict(fields)
            if "experiment" in rest:
                saved = {name: rest.pop(name) for name in ("experiment", "runtime")}
            else:
                saved = rest.pop("config")
            config, runtime = config_io.run_settings(saved, where)
            if config.model.vocab_size is None or not isinstance(rest["tokenizer"], str):
                raise TypeError
            for loss in ("best_val_loss", "val_loss"):
                float(rest[loss] or 0)
            return cls(config, runtime, **rest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Corrupted(f"{where} is corrupted: its metadata has changed") from error


class Loaded(NamedTuple):
    """A checkpoint, to use rather than to train on."""

    step: int
    metadata: CheckpointMetadata
    model: ModelConfig
    """The network that `params` are of: without LoRA's adapters, which are in the kernels."""
    params: Params
    opt_state: Any = None
    """Where it was asked for, and was saved."""


def read(checkpoints: Checkpoints, step: int) -> CheckpointMetadata:
    """Raises Corrupted or UserError, as `CheckpointMetadata.from_dict`."""
    where = f"the checkpoint {checkpoints.directory}/{step}"
    return CheckpointMetadata.from_dict(checkpoints.read_metadata(step), where)


def load_checkpoint(
    run_dir: Path,
    name: str,
    targets: Callable[[Any], Any] = on_one_device,
    *,
    optimizer: bool = False,
) -> Loaded:
    """The checkpoint `name` ("latest", "best" or a step), placed as `targets` says. Where that one
    is corrupted, the next newest or best, with a warning.

    Raises:
        UserError: there is no such run or checkpoint, or none that is whole.
    """
    with Checkpoints(run_dir) as checkpoints:
        problem: Corrupted | None = None
        for step in checkpoints.candidates(name):
            try:
                metadata = read(checkpoints, step)
                config = metadata.config
                params = jax.eval_shape(functools.partial(init, config.model), random_key(0))
                wanted = {"params": params}
                if optimizer and "opt_state" in checkpoints.array_names(step):
                    wanted["opt_state"] = jax.eval_shape(optim.optimizer(config).init, params)
                parts = {part: targets(shapes) for part, shapes in wanted.items()}
                found = checkpoints.restore(step, **parts)
            except Corrupted as error:
                if step not in checkpoints.steps:  # deleted meanwhile: the run is being trained
                    return load_checkpoint(run_dir, name, targets, optimizer=optimizer)
                problem = problem or error
                continue
            if problem:
                print(f"warning: {problem}; using step {step} instead", file=sys.stderr)
            model, params = finetune.merge(config.model, found["params"])
            return Loaded(step, metadata, model, params, found.get("opt_state"))
        assert problem is not None
        raise _advised(problem)


def newest_metadata(run_dir: Path) -> CheckpointMetadata | None:
    """Of the newest checkpoint of a run that can be read; None where there is no checkpoint.

    Raises:
        Corrupted: none can be read.
    """
    problem: Corrupted | None = None
    for step in reversed(finished_steps(run_dir)):
        directory = run_dir / "checkpoints"
        try:
            fields = read_record(directory, step)["metadata"]
            return CheckpointMetadata.from_dict(fields, f"the checkpoint {directory / str(step)}")
        except Corrupted as error:
            problem = problem or error
    if problem:
        raise _advised(problem)
    return None


def _advised(problem: Corrupted) -> Corrupted:
    return Corrupted(
        f"{problem}; no checkpoint there is whole: bring the run back from a copy, or train anew in"
        " another --run-dir"
    )
