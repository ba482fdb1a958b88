"""How a run begins: with random weights, with those of another run, or where it was left."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptjax import checkpoint, config, devices, optim, parallel, train
from gptjax.checkpoint import Checkpoints
from gptjax.config import TrainConfig
from gptjax.errors import RunError, UserError
from gptjax.model import Params
from gptjax.parallel import Strategy
from gptjax.places import place


@dataclasses.dataclass
class Beginning:
    """Where training starts."""

    state: train.TrainState
    """As `Strategy.build` lays it out: to be placed."""
    step: int
    origin: str
    """In words."""
    best_val_loss: float | None = None
    """Of the run so far."""
    unfinished: dict[str, Any] | None = None
    """The row of `step` for metrics.jsonl, where its evaluation is still to be made."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """What the user should know, a line each."""


def begin(
    settings: TrainConfig, fingerprint: str, checkpoints: Checkpoints, strategy: Strategy
) -> Beginning:
    """Of the run that `checkpoints` belong to. All hosts call it, and begin at the same step;
    damaged checkpoints are put aside. `fingerprint`: of the data that there are now.

    Raises:
        UserError: it would become another run, or nothing of the run is whole.
        RunError: the hosts do not see the same.
    """
    notes: list[str] = []

    steps, whole = parallel.first_hosts(checkpoints.steps), []
    for step in steps:
        damage = None
        try:
            checkpoints.facts(step)
            whole.append(step)
        except checkpoint.Damaged as error:
            damage = error
        failed = parallel.every(int(damage is not None))
        if any(failed) and not all(failed):
            number = failed.index(1)
            raise RunError(f"host {number} cannot read step {step} of this run, others can")
        if damage and devices.is_main_host():
            notes.append(f"warning: {damage}; moved to {checkpoints.set_aside(step)}")
    for step in reversed(whole):
        try:
            found = _resume(step, settings, fingerprint, checkpoints, strategy)
            return dataclasses.replace(found, notes=notes)
        except checkpoint.Damaged as damage:
            note = f"{damage}; moved to {checkpoints.set_aside(step)}"
            if devices.host_count() > 1:
                # The others may have read their shares well, and wait for this host's.
                raise RunError(f"{note}; start the same command again on all hosts") from damage
            notes.append(f"warning: {note}")
    if steps or checkpoints.damaged():
        raise UserError(
            f"no checkpoint of {settings.run_dir} is whole, see {settings.run_dir}/damaged-*;"
            " to begin anew, name another --run-dir"
        )
    if settings.init_from:
        state = _from_weights(place(settings.init_from), settings, strategy)
        return Beginning(state, 0, f"from {settings.init_from}")
    return Beginning(strategy.build(lambda: train.init_state(settings)), 0, "new")


def _resume(
    step: int,
    settings: TrainConfig,
    fingerprint: str,
    checkpoints: Checkpoints,
    strategy: Strategy,
) -> Beginning:
    """Raises Damaged; UserError where the settings would make it another run."""
    facts = checkpoints.facts(step)
    trained_on = facts.data_fingerprint
    conflicts = config.resume_conflicts(facts.config, settings, imported=not trained_on)
    if trained_on and trained_on != fingerprint:
        conflicts.append(
            f"the tokens: fingerprint {trained_on[:12]} in the run, {fingerprint[:12]} in"
            f" {settings.data.dir} now"
        )
    if conflicts:
        raise UserError(
            f"{settings.run_dir} holds a run with other settings; " + "; ".join(conflicts)
            + "; resume it without changes, or name another --run-dir"
        )  # fmt: skip
    targets = strategy.targets(jax.eval_shape(lambda: train.init_state(settings)))
    wanted: dict[str, Any] = {"params": targets.params}
    if checkpoints.has_optimizer(step):
        wanted["opt_state"] = targets.opt_state
    loaded = checkpoints.restore(step, **wanted)
    state = _state(step, loaded["params"], loaded.get("opt_state"), settings, strategy)
    origin = f"resumed at step {step}" if trained_on else f"imported, at step {step}"
    return Beginning(state, step, origin, facts.best_val_loss, facts.unfinished)


def _from_weights(run_dir: Path, settings: TrainConfig, strategy: Strategy) -> train.TrainState:
    """Step 0 with the best weights of another run, their position table cropped."""
    params = checkpoint.load(run_dir, "best", strategy.targets).params
    if "wpe" in params:
        size = settings.model.block_size
        params = params | {"wpe": strategy.build(lambda table: table[:size], params["wpe"])}
    return _state(0, params, None, settings, strategy)


def _state(
    step: int, params: Params, opt_state: Any, settings: TrainConfig, strategy: Strategy
) -> train.TrainState:
    """`opt_state` None: one that has seen nothing."""
    if opt_state is None:
        opt_state = strategy.build(optim.optimizer(settings).init, params)
    return train.TrainState(strategy.build(lambda: jnp.int32(step)), params, opt_state)
