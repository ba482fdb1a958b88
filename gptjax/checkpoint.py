"""Checkpoints of a run: the only file that knows Orbax.

RUN_DIR/checkpoints/STEP is self-contained: parameters, optimizer state, and in its metadata the
config, the tokenizer, the fingerprint of the data and the best validation loss.
"""

import contextlib
import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint.experimental.v1 as ocp

from gptjax import config as config_lib
from gptjax import optim
from gptjax.config import TrainConfig
from gptjax.errors import RunError, UserError, first_line
from gptjax.model import Params, init_params

# Orbax logs the tracebacks of a failed save or load, then raises it: once is enough.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a checkpoint knows besides arrays."""

    config: TrainConfig
    tokenizer: str
    """`tokenizers.to_json` of the run's tokenizer."""
    data_fingerprint: str | None
    """Of the tokens it was trained on; None where they are not known: the weights were imported."""
    best_val_loss: float | None


class Checkpoints:
    """The checkpoints of one run directory. A context manager: leaving it waits for the last
    save."""

    def __init__(self, run_dir: Path, keep: int | None = None):
        """`keep`: the newest checkpoints to keep besides the best; None opens for reading.

        Raises:
            UserError: opened for reading, and there is no run.
        """
        self.directory = run_dir.absolute() / "checkpoints"
        if keep is None and not self.directory.is_dir():
            raise UserError(
                f"no run in {run_dir}: expected a folder that train_jax.py --run-dir has written"
            )
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            n=1,
            get_metric_fn=lambda m: m["val_loss"],
            reverse=True,
            keep_checkpoints_without_metrics=False,
        )
        try:
            self._orbax = ocp.training.Checkpointer(
                self.directory,
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep), best] if keep else [policies.PreserveAll()]
                ),
                cleanup_tmp_directories=keep is not None,
            )
        except ValueError as error:  # bad JSON or UTF-8 in a checkpoint's metrics
            raise UserError(
                f"a checkpoint in {self.directory} is damaged: {_gist(error)};"
                " move away the one that has a broken metrics/metrics file"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            with contextlib.suppress(Exception):  # told by `wait`, or by what came before
                self._orbax.close()

    @property
    def latest_step(self) -> int | None:
        """The newest checkpoint's step; None where there is none."""
        return self._orbax.latest.step if self._orbax.latest else None

    @property
    def best_step(self) -> int | None:
        """The step of the lowest validation loss, the newest one where none was measured."""
        losses = {c.step: c.metrics["val_loss"] for c in self._orbax.checkpoints if c.metrics}
        return min(losses, key=losses.__getitem__) if losses else self.latest_step

    def resolve(self, name: str) -> int:
        """The step that "latest", "best" or a number names.

        Raises:
            UserError: there is none; the ones there are are listed.
        """
        steps = [c.step for c in self._orbax.checkpoints]
        step = {"latest": self.latest_step, "best": self.best_step}.get(name)
        if step is None and name in map(str, steps):
            step = int(name)
        if step is None:
            there = ", ".join(map(str, steps)) or "none"
            raise UserError(f"no checkpoint {name!r} in {self.directory}; there are: {there}")
        return step

    def save(self, step: int, params: Any, opt_state: Any, facts: Facts, val_loss: float | None):
        """Start saving in the background; waits only for the save before it.

        `opt_state` None: there is none, the optimizer starts afresh when training goes on.

        Raises:
            RunError: this save or the one before it failed, for instance on a full disk.
        """
        metadata = {
            "config": json.loads(config_lib.to_json(facts.config)),
            "tokenizer": facts.tokenizer,
            "data_fingerprint": facts.data_fingerprint,
            "best_val_loss": facts.best_val_loss,
        }
        parts = {"params": params} | ({} if opt_state is None else {"opt_state": opt_state})
        try:
            with _writing():
                self._orbax.save_checkpointables_async(
                    step,
                    parts,
                    force=True,
                    metrics=None if val_loss is None else {"val_loss": val_loss},
                    custom_metadata=metadata,
                )
        except Exception as error:  # tensorstore's, Orbax's and the file system's kinds
            raise self._failed(error) from error

    def wait(self) -> None:
        """Return when everything is on disk.

        Raises:
            RunError: a save failed.
        """
        try:
            self._orbax.wait()
        except Exception as error:  # as in `save`: what failed in the background comes here
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> RunError:
        reason = _gist(error)
        if "No space left" in str(error):
            reason = "the disk is full"
        self._orbax.reload()
        kept = f"step {self.latest_step} is safe" if self.latest_step is not None else "none yet"
        return RunError(f"cannot save a checkpoint in {self.directory}: {reason} ({kept})")

    def facts(self, step: int) -> Facts:
        """Raises UserError if the checkpoint is damaged."""
        return _read_facts(self.directory / str(step))

    def has_optimizer(self, step: int) -> bool:
        """False for imported weights that came without their optimizer's state."""
        return (self.directory / str(step) / "opt_state").is_dir()

    def restore(self, step: int, **targets: Any) -> dict[str, Any]:
        """Load `params` and/or `opt_state` as given: trees of jax.ShapeDtypeStruct with a
        sharding each, so that a checkpoint opens on any number of devices.

        Raises:
            UserError: the checkpoint is damaged or holds another model.
        """
        try:
            return self._orbax.load_checkpointables(step, targets)
        except Exception as error:  # tensorstore's, Orbax's and the file system's kinds
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            reason = _gist(error)
            if "incompatible handler" in reason:
                reason = "it is damaged; move it away to go on from the one before"
            raise UserError(
                f"the checkpoint {self.directory}/{step} cannot be read: {reason}"
            ) from error


def _writing() -> ocp.Context:
    """How arrays are written."""
    context = ocp.Context()
    # Weights hardly compress (8% in what we measured, at six times the time of the save).
    context.array.saving.use_compression = False
    # Host arrays are an import's, which nobody changes: no second copy of a model that may be big.
    context.memory.deepcopy_host_arrays = False
    return context


class Loaded(NamedTuple):
    """A checkpoint, to use rather than to train on."""

    step: int
    facts: Facts
    params: Params
    opt_state: Any = None
    """Where it was asked for, and is there."""


def load(
    run_dir: Path,
    name: str,
    sharding: jax.sharding.Sharding | None = None,
    *,
    optimizer: bool = False,
) -> Loaded:
    """The checkpoint `name` ("latest", "best" or a step), on one device or as `sharding` says.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged.
    """
    with Checkpoints(run_dir) as checkpoints:
        step = checkpoints.resolve(name)
        facts = checkpoints.facts(step)
        params = jax.eval_shape(lambda: init_params(facts.config.model, 0))
        wanted = {"params": params}
        if optimizer and checkpoints.has_optimizer(step):
            wanted["opt_state"] = jax.eval_shape(optim.optimizer(facts.config).init, params)
        one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        targets = {part: abstract(tree, sharding or one_device) for part, tree in wanted.items()}
        return Loaded(step, facts, **checkpoints.restore(step, **targets))


def newest_facts(run_dir: Path) -> Facts | None:
    """Of the newest checkpoint of a run, without waking Orbax or JAX; None where there is none.

    Raises:
        UserError: it is damaged.
    """
    steps = [p for p in run_dir.glob("checkpoints/*") if p.name.isdecimal()]
    return _read_facts(max(steps, key=lambda p: int(p.name))) if steps else None


def _read_facts(checkpoint: Path) -> Facts:
    # Orbax's own reader of this file would open every array's metadata besides.
    try:
        text = (checkpoint / "_CHECKPOINT_METADATA").read_text(encoding="utf-8")
        metadata = json.loads(text)["custom_metadata"]
        return Facts(
            config_lib.from_json(json.dumps(metadata["config"]), str(checkpoint)),
            metadata["tokenizer"],
            metadata["data_fingerprint"],
            metadata["best_val_loss"],
        )
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {checkpoint}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the checkpoint {checkpoint} is damaged ({type(error).__name__} in its metadata);"
            " move it away to go on from the one before"
        ) from error


def _gist(error: Exception) -> str:
    """Tensorstore's long messages end in the system's words."""
    system = re.search(r": ([^:]+) \[os_error", str(error))
    return system[1] if system else first_line(error)


def abstract(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """`tree` (arrays or their shapes) as a target for `Checkpoints.restore`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
