"""Checkpoints of a run: the only file that knows Orbax.

RUN_DIR/checkpoints/STEP is self-contained: parameters, optimizer state, and in its metadata the
config, the tokenizer, the fingerprint of the data, the losses, and a digest of every array: so
damage is found that no file format notices.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp

from gptjax import config as config_lib
from gptjax import optim, places, watch
from gptjax.config import TrainConfig
from gptjax.errors import RunError, UserError, first_line
from gptjax.model import Params, init_params, mix

# Orbax logs the tracebacks of a failed save or load, then raises it: once is enough.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


METADATA = "_CHECKPOINT_METADATA"
"""Orbax's file in a checkpoint that holds what we add."""


COMMITTED = "commit_success.txt"
"""Orbax's last file in a checkpoint in a bucket."""

DELETED = "deleted-"
"""Begins the name of a checkpoint that is being deleted."""


class Damaged(UserError):
    """A checkpoint that cannot be used. An older one may be whole."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a checkpoint knows besides arrays."""

    config: TrainConfig
    tokenizer: str
    """`tokenizers.to_json` of the run's tokenizer."""
    data_fingerprint: str | None
    """Of the tokens it was trained on; None where they are not known: the weights were imported."""
    best_val_loss: float | None
    """Of the run so far."""
    val_loss: float | None = None
    """Of these weights, where it was measured."""
    unfinished: dict[str, Any] | None = None
    """The last step's row for metrics.jsonl, where the run was stopped before its evaluation."""


class Checkpoints:
    """The checkpoints of one run directory. A context manager: leaving it waits for the last
    save."""

    def __init__(self, run_dir: Path, keep: int | None = None):
        """`keep`: the newest checkpoints to keep besides the best; None opens for reading.

        Raises:
            UserError: opened for reading, and there is no run.
        """
        self.run_dir = run_dir
        where = run_dir if places.is_remote(run_dir) else run_dir.absolute()
        self.directory = where / "checkpoints"
        if keep is None and not self.directory.is_dir():
            raise UserError(
                f"no run in {run_dir}: expected a folder that train_jax.py --run-dir has written"
            )
        self._keep = keep
        self._val_losses: dict[int, float | None] = {}

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            if "_saver" in self.__dict__:
                with contextlib.suppress(Exception):  # told by `wait`, or by what came before
                    self._saver.close()

    @functools.cached_property
    def _saver(self) -> ocp.training.Checkpointer:
        """Made for the first save: it cannot stand damaged checkpoints, and readers need none. It
        clears away what an interrupted save has left."""
        assert self._keep is not None, "opened for reading"
        return ocp.training.Checkpointer(
            self.directory,
            # Orbax would delete old ones under their own names: a kill leaves half of one.
            preservation_policy=ocp.training.preservation_policies.PreserveAll(),
            cleanup_tmp_directories=True,
        )

    @property
    def steps(self) -> list[int]:
        """Of all finished checkpoints, in order."""
        return sorted(int(path.name) for path in _finished(self.run_dir))

    @property
    def latest_step(self) -> int | None:
        """The newest checkpoint's step; None where there is none."""
        return max(self.steps, default=None)

    def by_loss(self) -> list[int]:
        """The steps by their validation loss, the lowest first; before them those that cannot be
        read, after them those without one."""

        def rank(step: int) -> tuple[float, int]:
            try:
                loss = self._val_loss(step)
            except Damaged:
                return -math.inf, -step
            return math.inf if loss is None else loss, -step

        return sorted(self.steps, key=rank)

    def _val_loss(self, step: int) -> float | None:
        """Raises Damaged."""
        if step not in self._val_losses:
            self._val_losses[step] = self.facts(step).val_loss
        return self._val_losses[step]

    def candidates(self, name: str) -> list[int]:
        """The steps that "latest", "best" or a number names, in the order in which to try them.

        Raises:
            UserError: there is none; the ones there are are listed.
        """
        if name == "latest":
            found = self.steps[::-1]
        elif name == "best":
            found = self.by_loss()
        else:
            found = [step for step in self.steps if str(step) == name]
        if not found:
            there = ", ".join(map(str, self.steps)) or "none"
            raise UserError(f"no checkpoint {name!r} in {self.directory}; there are: {there}")
        return found

    def save(self, step: int, params: Any, opt_state: Any, facts: Facts) -> None:
        """Start saving in the background; waits only for the save before it, and deletes what is
        no longer kept then.

        `opt_state` None: there is none, the optimizer starts afresh when training goes on.

        Raises:
            RunError: this save or the one before it failed, for instance on a full disk; or a
                number is not finite.
        """
        parts = {"params": params} | ({} if opt_state is None else {"opt_state": opt_state})
        found = {name: _digests(tree) for name, tree in parts.items()}
        wild = [
            array for part in found.values() for array, (_, finite) in part.items() if not finite
        ]
        if wild:
            raise RunError(
                f"the state after step {step} is not finite (in {wild[0]}); it was not saved;"
                f" {self.safe()}"
            )
        digests = {part: {a: number for a, (number, _) in by.items()} for part, by in found.items()}
        record = _signed({"facts": _facts_to_json(facts), "digests": digests})
        self._val_losses[step] = facts.val_loss
        self.wait()
        try:
            with _writing():
                self._saver.save_checkpointables_async(
                    step, parts, force=True, custom_metadata=record
                )
        except Exception as error:  # tensorstore's, Orbax's and the file system's kinds
            raise self._failed(error) from error

    def amend(self, step: int, facts: Facts, *, writes: bool) -> None:
        """Replace what a finished checkpoint says besides its arrays. Only one host `writes`.

        Raises:
            OSError: it cannot be written.
        """
        self._val_losses[step] = facts.val_loss
        if not writes:
            return
        path = self.directory / str(step) / METADATA
        whole = json.loads(path.read_text(encoding="utf-8"))
        whole["custom_metadata"] |= {"facts": _facts_to_json(facts)}
        whole["custom_metadata"] = _signed(whole["custom_metadata"])
        places.replace_file(path, json.dumps(whole))

    def wait(self) -> None:
        """Return when everything is on disk, and nothing more than is to be kept.

        Raises:
            RunError: a save failed.
        """
        try:
            if "_saver" in self.__dict__:
                self._saver.wait()
        except Exception as error:  # as in `save`: what failed in the background comes here
            raise self._failed(error) from error
        if self._keep and jax.process_index() == 0:
            self._prune(self._keep)

    def _prune(self, keep: int) -> None:
        """Delete all but the newest `keep` and the best; nothing, while one of them cannot be read.
        What cannot be deleted is no reason to lose a new one."""
        for folder in self.directory.glob(f"{DELETED}*"):  # of a process that was killed
            _remove(folder)
        steps = self.steps
        try:
            losses = {step: self._val_loss(step) for step in steps}
        except Damaged:
            return
        best = min((loss for loss in losses.values() if loss is not None), default=None)
        for step in steps[:-keep]:
            if best is None or losses[step] != best:
                # First it ceases to be a checkpoint, all at once.
                folder = self.directory / str(step)
                with contextlib.suppress(Exception):  # the file system's and gcsfs's kinds
                    if places.is_remote(folder):
                        (folder / COMMITTED).unlink()
                    else:
                        folder = folder.rename(self.directory / f"{DELETED}{step}")
                    _remove(folder)

    def _failed(self, error: Exception) -> RunError:
        reason = _gist(error)
        if "No space left" in str(error):
            reason = "the disk is full"
        return RunError(f"cannot save a checkpoint in {self.directory}: {reason}; {self._newest()}")

    def safe(self) -> str:
        """What is on disk, for an error message, once the save in progress is done."""
        with contextlib.suppress(RunError):
            self.wait()
        return self._newest()

    def _newest(self) -> str:
        step = self.latest_step
        return "there is no checkpoint yet" if step is None else f"step {step} is saved"

    def set_aside(self, step: int) -> Path:
        """Move a damaged checkpoint out of the way, to RUN_DIR/damaged-STEP; where to."""
        damaged = self.directory / str(step)
        to = self.run_dir / f"damaged-{step}"
        for number in itertools.count(2):
            if not to.exists() or not damaged.exists():
                break
            to = self.run_dir / f"damaged-{step}-{number}"
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # another host was faster
            damaged.rename(to)
        return to

    def damaged(self) -> list[Path]:
        """What `set_aside` has moved."""
        return list(self.run_dir.glob("damaged-*"))

    def facts(self, step: int) -> Facts:
        """Raises Damaged."""
        return _read_record(self.directory / str(step))[0]

    def has_optimizer(self, step: int) -> bool:
        """False for imported weights that came without their optimizer's state."""
        return "opt_state" in _read_record(self.directory / str(step))[1]

    def restore(self, step: int, **targets: Any) -> dict[str, Any]:
        """Load `params` and/or `opt_state` as given: trees of jax.ShapeDtypeStruct with a
        sharding each, so that a checkpoint opens on any number of devices.

        Raises:
            Damaged: a file is missing, cut short or changed, or it is another model's.
            RunError: another host has gone meanwhile.
        """
        where = f"the checkpoint {self.directory}/{step}"
        _, digests = _read_record(self.directory / str(step))
        try:
            loaded = ocp.load_checkpointables(self.directory / str(step), targets)
        except Exception as error:  # tensorstore's, Orbax's and the file system's kinds
            # Orbax leaves reads behind that nobody waits for any more.
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            if watch.is_loss(error):  # no fault of the checkpoint's
                raise RunError(watch.GONE) from error
            reason = _gist(error)
            if "incompatible handler" in reason:
                reason = "a part of it is missing"
            raise Damaged(f"{where} cannot be read: {reason}") from error
        for part, tree in loaded.items():
            for array, (number, _) in _digests(tree).items():
                if digests.get(part, {}).get(array) != number:
                    raise Damaged(f"{where} is damaged: {part}{array} is not what was saved")
        return loaded


@jax.jit
def _digest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(uint32 [], whether all is finite). A sum of hashes of each number and its place, modulo
    2**32: the same wherever the parts of `x` lie."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return mix(mix(place) ^ bits).sum(dtype=jnp.uint32), jnp.isfinite(x).all()


def _digests(tree: Any) -> dict[str, tuple[int, bool]]:
    """{array's path: its digest}, of 32-bit arrays."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    found = [(jax.tree_util.keystr(path), _digest(x)) for path, x in leaves]
    return {path: (int(number), bool(finite)) for path, (number, finite) in found}


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


def on_one_device(shapes: Any) -> Any:
    """Targets for `Checkpoints.restore`."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)


def load(
    run_dir: Path,
    name: str,
    targets: Callable[[Any], Any] = on_one_device,
    *,
    optimizer: bool = False,
) -> Loaded:
    """The checkpoint `name` ("latest", "best" or a step), where `targets` says. Where that one is
    damaged, the next newest or best, with a warning.

    Raises:
        UserError: there is no such run or checkpoint, or none that is whole.
    """
    with Checkpoints(run_dir) as checkpoints:
        problem: Damaged | None = None
        for step in checkpoints.candidates(name):
            try:
                facts = checkpoints.facts(step)
                params = jax.eval_shape(functools.partial(init_params, facts.config.model, 0))
                wanted = {"params": params}
                if optimizer and checkpoints.has_optimizer(step):
                    wanted["opt_state"] = jax.eval_shape(optim.optimizer(facts.config).init, params)
                parts = {part: targets(shapes) for part, shapes in wanted.items()}
                found = checkpoints.restore(step, **parts)
            except Damaged as error:
                problem = problem or error
                continue
            if problem:
                print(f"warning: {problem}; step {step} is taken instead", file=sys.stderr)
            return Loaded(step, facts, **found)
        assert problem is not None
        raise problem


def newest_facts(run_dir: Path) -> Facts | None:
    """Of the newest checkpoint of a run that can be read, without waking Orbax or JAX; None where
    there is no checkpoint.

    Raises:
        Damaged: none can be read.
    """
    problem: Damaged | None = None
    for path in sorted(_finished(run_dir), key=lambda path: -int(path.name)):
        try:
            return _read_record(path)[0]
        except Damaged as error:
            problem = problem or error
    if problem:
        raise problem
    return None


def _finished(run_dir: Path) -> list[Path]:
    """On a disk a checkpoint gets its name when it is whole, in a bucket this file."""
    named = [p for p in run_dir.glob("checkpoints/*") if re.fullmatch("0|[1-9][0-9]{0,9}", p.name)]
    if places.is_remote(run_dir):
        return [path for path in named if (path / COMMITTED).exists()]
    return named


def _remove(folder: Path) -> None:
    if places.is_remote(folder):
        folder.rmtree()  # type: ignore[attr-defined]
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _facts_to_json(facts: Facts) -> dict[str, Any]:
    fields = {field.name: getattr(facts, field.name) for field in dataclasses.fields(facts)}
    return fields | {"config": json.loads(config_lib.to_json(facts.config))}


def _signed(record: dict[str, Any]) -> dict[str, Any]:
    """`record` with the hash of all else in it, as `sha256`."""
    rest = {name: value for name, value in record.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True)
    return rest | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def _read_record(checkpoint: Path) -> tuple[Facts, dict[str, dict[str, int]]]:
    """(facts, the digest of each array of each part).

    Raises:
        Damaged: it is not what was written.
        UserError: it has settings that this version does not know.
    """
    # Orbax's own reader of this file would open every array's metadata besides.
    try:
        text = (checkpoint / METADATA).read_text(encoding="utf-8")
        record = json.loads(text)["custom_metadata"]
        if record != _signed(record):
            raise ValueError
        facts = Facts(
            config=config_lib.from_json(json.dumps(record["facts"].pop("config")), str(checkpoint)),
            **record["facts"],
        )
        if facts.config.model.vocab_size is None or not isinstance(facts.tokenizer, str):
            raise TypeError
        for loss in (facts.best_val_loss, facts.val_loss):
            float(loss or 0)
        return facts, record["digests"]
    except OSError as error:
        raise Damaged(f"cannot read the checkpoint {checkpoint}: {_gist(error)}") from error
    except UserError:  # whole, but of another version
        raise
    except Exception as error:  # a file that is not ours can fail in any way
        raise Damaged(f"the checkpoint {checkpoint} is damaged: its metadata changed") from error


def _gist(error: Exception) -> str:
    """Tensorstore's long messages end in the system's words."""
    system = re.search(r": ([^:]+) \[os_error", str(error))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return system[1] if system else first_line(error)
