"""How a run begins: with random weights, with those of another run, or where it was left; and what
may differ from the run that is resumed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gptjax import (
    attention,
    config_io,
    files,
    finetune,
    optim,
    program,
    run_metadata,
    train_step,
)
from gptjax.checkpoint import Checkpoints, Corrupted
from gptjax.config import ModelConfig, TrainConfig
from gptjax.data import tokenizers
from gptjax.data.batches import windows_over
from gptjax.data.token_files import Dataset
from gptjax.data.tokenizers import Tokenizer
from gptjax.devices import hosts, setup
from gptjax.devices.base import Strategy
from gptjax.errors import RunError, UserError
from gptjax.model import Params, init
from gptjax.run_metadata import CheckpointMetadata
from gptjax.runtime_config import RuntimeConfig
from gptjax.train_step import TrainState

NOT_IN_WEIGHTS = {"dropout", "dtype"}
"""What weights do not fix, besides a context that may be shorter than theirs."""

ADAPTER_SETTINGS = {"lora_rank", "lora_alpha", "lora_targets"}
"""What is not adopted either: those of other weights are in their kernels."""


def adopt(wanted: ModelConfig, weights: ModelConfig) -> ModelConfig:
    """`wanted` with the architecture of `weights` in place of what was not given explicitly.

    Raises:
        UserError: a given setting differs from theirs, or exceeds their block_size.
    """
    fields, problems = dataclasses.asdict(wanted), []
    for name, theirs in dataclasses.asdict(weights).items():
        given, value = name in wanted.given, fields[name]
        if name == "block_size" and given:
            if value > theirs:
                problems.append(f"model.block_size {value} exceeds the weights' {theirs}")
        elif name not in NOT_IN_WEIGHTS | ADAPTER_SETTINGS:
            if given and value != theirs and value is not None:
                problems.append(f"model.{name} {value} is not the weights' {theirs}")
            fields[name] = theirs
    if problems:
        raise UserError(
            f"{'; '.join(problems)}: leave it out of the command and the config file, or set it so"
        )
    return ModelConfig(**fields)


def adopt_weights(config: TrainConfig, run_dir: str) -> tuple[TrainConfig, Tokenizer | None]:
    """`config` with the architecture and the kind of tokenizer of the weights that it begins with:
    those of the run in `run_dir`, if it exists, or of `init_from`; and their tokenizer.

    Raises:
        UserError: a given setting differs from theirs; there is no run in `init_from`, or not the
            one that the run in `run_dir` began with.
    """
    origin, adapted = config.init_from, config.model.lora_rank > 0
    metadata = run_metadata.newest_metadata(files.path(run_dir))
    if metadata and _folder_name(metadata.config.init_from) != _folder_name(origin):
        raise UserError(
            f"{run_dir} began with the weights of {metadata.config.init_from or 'no other run'},"
            f" not of {origin or 'none'} (--init-from); leave it out, or name another --run-dir"
        )
    if metadata:
        origin = metadata.config.init_from
    elif origin:
        metadata = run_metadata.newest_metadata(files.path(origin))
        if not metadata:
            how = program.command("convert", "import", "gpt2", origin)
            raise UserError(f"no run in {origin} (--init-from); GPT-2's weights make one: {how}")
        if not files.is_remote(files.path(origin)):
            origin = str(files.path(origin).absolute())
    if adapted and not origin:
        raise UserError(
            "LoRA (--lora-rank) adapts weights that are there; name their run with --init-from, and"
            " a new one with --run-dir"
        )
    if not metadata:
        return config, None
    tokenizer = tokenizers.from_json(metadata.tokenizer, origin or run_dir)
    changes: dict[str, Any] = {}
    if origin:
        changes |= {"init_from": origin, "model": adopt(config.model, metadata.config.model)}
    if origin or metadata.data_fingerprint is None:
        if "tokenizer" in config.data.given and config.data.tokenizer != tokenizer.kind:
            raise UserError(
                f"data.tokenizer {config.data.tokenizer} is not the weights' {tokenizer.kind};"
                " leave it out"
            )
        changes["data"] = config.data.replace(tokenizer=tokenizer.kind)
    return config.replace(**changes), tokenizer


def _folder_name(run_dir: str | None) -> str | None:
    """All that stays where a run and its origin are moved together."""
    return files.path(run_dir).resolve().name if run_dir else None


def resolve(
    config: TrainConfig, saved: TrainConfig | None = None, device: jax.Device | None = None
) -> TrainConfig:
    """`config` with everything decided that is left open: by the run that is resumed, whose
    precision and schedule stay what they were, or else by the device and `max_steps`.

    So a run that is extended keeps its schedule and continues at min_lr, as in nanoGPT: no step
    that was taken would have had another learning rate in the longer run.
    """
    model, optimizer = config.model, config.optimizer
    if saved and model.dtype == "auto":
        model = model.replace(dtype=saved.model.dtype)
    if optimizer.lr_decay_steps is None:
        steps = (saved or config).lr_decay_steps
        optimizer = optimizer.replace(lr_decay_steps=steps)
    return config.replace(model=setup.resolve_dtype(model, device), optimizer=optimizer)


def conflicts(saved: CheckpointMetadata, config: TrainConfig, fingerprint: str) -> list[str]:
    """What differs and would make the resumed run another experiment, a line a setting. Where data
    lie and where its first weights came from is no part of it: the tokens are compared by their
    `fingerprint`. Of imported weights only the architecture is fixed."""
    old = config_io.flatten(resolve(saved.config))
    new = config_io.flatten(config)
    imported = saved.data_fingerprint is None
    if imported:
        free = {f"model.{name}" for name in NOT_IN_WEIGHTS}
        old = {n: v for n, v in old.items() if n.startswith("model.") and n not in free}
    compared = [
        name for name in old
        if name not in ("max_steps", "init_from")
        and (name in ("data.mix", "data.pack") or not name.startswith("data."))
    ]  # fmt: skip
    out = [
        f"{name}: {old[name]!r} in the run, {new[name]!r} now"
        for name in compared
        if old[name] != new[name]
    ]
    if not imported and saved.data_fingerprint != fingerprint:
        out.append(
            f"the tokens: fingerprint {str(saved.data_fingerprint)[:12]} in the run,"
            f" {fingerprint[:12]} in {config.data.dir} now"
        )
    return out


@dataclasses.dataclass
class Start:
    """Where training starts."""

    step: int
    origin: str
    """In words."""
    eval_windows: int
    """Validation windows that an evaluation takes."""
    best_val_loss: float | None = None
    """Of the run so far, as far as it was measured as it will be now."""
    evaluations_since_best: int = 0
    """In a row, with losses that were no better."""
    unfinished: dict[str, Any] | None = None
    """The row of `step` for metrics.jsonl, where its evaluation is still to be made."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """What the user should know, a line each."""


def init_or_resume(
    config: TrainConfig,
    runtime: RuntimeConfig,
    dataset: Dataset,
    checkpoints: Checkpoints,
    strategy: Strategy,
) -> tuple[TrainState, Start]:
    """(the state, in the strategy's layout for saving, where the run that `checkpoints` belong to
    starts). All hosts call it, and start at the same step; corrupted checkpoints are set aside.

    Raises:
        UserError: it would become another experiment, or no checkpoint of the run is whole.
        RunError: the hosts do not see the same.
    """
    notes: list[str] = []
    steps, whole = hosts.broadcast_from_main(checkpoints.steps), []
    for step in steps:
        corrupted = None
        try:
            run_metadata.read(checkpoints, step)
            whole.append(step)
        except Corrupted as error:
            corrupted = error
        failed = hosts.all_gather(int(corrupted is not None))
        if any(failed) and not all(failed):
            number = failed.index(1)
            raise RunError(f"host {number} cannot read step {step} of this run, others can")
        if corrupted and setup.is_main_host():
            notes.append(f"warning: {corrupted}; moved to {checkpoints.set_aside(step)}")
    for step in reversed(whole):
        try:
            state, start = _resume(step, config, runtime, dataset, checkpoints, strategy)
            start.notes[:0] = notes
            return state, start
        except Corrupted as error:
            note = f"{error}; moved to {checkpoints.set_aside(step)}"
            if setup.host_count() > 1:
                # The others may have read their shares well, and wait for this host's.
                raise RunError(f"{note}; start the same command again on all hosts") from error
            notes.append(f"warning: {note}")
    if steps or checkpoints.set_aside_before():
        reasons = "".join(f" ({note.removeprefix('warning: ')})" for note in notes[:1])
        raise UserError(
            f"no checkpoint of {checkpoints.run_dir} is whole, see"
            f" {checkpoints.run_dir}/damaged-*{reasons}; to begin anew, name another --run-dir"
        )
    if (checkpoints.run_dir / "config.json").exists():
        notes.append(f"note: {checkpoints.run_dir} has no checkpoint yet; it begins anew")
    windows, _ = eval_windows(config, runtime, dataset)
    if config.init_from:
        state, origin = _from_weights(config, strategy), f"from {config.init_from}"
    else:
        state, origin = strategy.initialise(lambda: train_step.init_state(config)), "new"
    return state, Start(0, origin, windows, notes=notes)


def _resume(
    step: int,
    config: TrainConfig,
    runtime: RuntimeConfig,
    dataset: Dataset,
    checkpoints: Checkpoints,
    strategy: Strategy,
) -> tuple[TrainState, Start]:
    """Raises Corrupted; UserError where the settings would make it another experiment."""
    saved = run_metadata.read(checkpoints, step)
    if found := conflicts(saved, config, dataset.fingerprint):
        raise UserError(
            f"{checkpoints.run_dir} holds a run with other settings; {'; '.join(found)}; resume it"
            " without changes, or name another --run-dir"
        )
    targets = strategy.targets(jax.eval_shape(lambda: train_step.init_state(config)))
    wanted: dict[str, Any] = {"params": targets.params}
    before, kind = saved.config.optimizer.kind, config.optimizer.kind
    there = "opt_state" in checkpoints.array_names(step)
    same = before == kind and saved.config.freeze == config.freeze
    if there and same:
        wanted["opt_state"] = targets.opt_state
    loaded = checkpoints.restore(step, **wanted)
    state = _state(step, loaded["params"], loaded.get("opt_state"), config, strategy)
    imported = saved.data_fingerprint is None
    origin = f"imported, at step {step}" if imported else f"resumed at step {step}"
    if config.init_from:
        origin += f", first from {config.init_from}"
    windows, there_are = eval_windows(config, runtime, dataset)
    measured, best = min(there_are, saved.eval_windows or there_are), saved.best_val_loss
    since = saved.evaluations_since_best
    notes = _notes(saved, config, runtime)
    if there and not same:  # so the weights are imported
        of = before if before != kind else "all parameters"
        notes.append(f"note: {kind} begins anew; the imported state is that of {of}")
    if best is not None and windows != measured:
        best, since = None, 0
        notes.append(
            f"note: evaluations are over {windows} validation windows now, over {measured} before;"
            " their losses do not compare, so the best is chosen anew"
        )
    return state, Start(step, origin, windows, best, since, saved.unfinished, notes)


def eval_windows(config: TrainConfig, runtime: RuntimeConfig, dataset: Dataset) -> tuple[int, int]:
    """(validation windows that an evaluation takes, that there are)."""
    total = len(windows_over(len(dataset.val), config.model.block_size))
    return min(total, runtime.eval_windows(config) or total), total


def _notes(saved: CheckpointMetadata, config: TrainConfig, runtime: RuntimeConfig) -> list[str]:
    """What is otherwise than when the run was saved, or than in a new run here."""
    out = []
    here = setup.resolve_dtype(config.model.replace(dtype="auto")).dtype
    # gptjax 0.1 saved "auto".
    if saved.config.model.dtype != "auto" and config.model.dtype != here:
        out.append(f"note: the run computes in {config.model.dtype}, as it began; here a new one"
                   f" would in {here}")  # fmt: skip
    packed = config.data.packed
    kernel, why = attention.choose(config.model, runtime.compute, train=True, packed=packed)
    if saved.attention not in (None, kernel):
        out.append(
            f"note: attention is computed by {kernel} ({why}), by {saved.attention} before: the"
            " same function, up to rounding"
        )
    decay = config.lr_decay_steps
    extended = saved.data_fingerprint and config.max_steps > saved.config.max_steps
    if extended and config.optimizer.warmup_steps <= decay < config.max_steps:
        out.append(f"note: the learning rate's decay ended at step {decay}; the steps after it run"
                   f" at min_lr {config.optimizer.min_lr:g}")  # fmt: skip
        if not config.optimizer.min_lr:
            raise UserError(
                f"the learning rate is 0 after step {decay} (min_lr), where more steps change"
                " nothing; start another run from these weights by --init-from"
            )
    return out


def _from_weights(config: TrainConfig, strategy: Strategy) -> TrainState:
    """Step 0 with the best weights of another run, their position table cropped."""
    run_dir = files.path(config.init_from or "")
    params = run_metadata.load_checkpoint(run_dir, "best", strategy.targets).params
    if "wpe" in params:
        size = config.model.block_size
        params = params | {"wpe": strategy.initialise(lambda table: table[:size], params["wpe"])}
    if config.model.lora_rank:
        key = train_step.random_key(config.seed)
        fresh = strategy.initialise(lambda: finetune.only_adapters(init(config.model, key)))
        params = finetune.join(params, fresh)
    return _state(0, params, None, config, strategy)


def _state(
    step: int, params: Params, opt_state: Any, config: TrainConfig, strategy: Strategy
) -> TrainState:
    """`opt_state` None: one that has seen nothing."""
    if opt_state is None:
        opt_state = strategy.initialise(optim.optimizer(config).init, params)
    return TrainState(strategy.initialise(lambda: jnp.int32(step)), params, opt_state)
