"""Checkpoints: arrays by Orbax, and beside them a file of our own that says what they are.

RUN_DIR/checkpoints/STEP holds the arrays, RUN_DIR/checkpoints/STEP.json the metadata (any JSON
object) with a digest of every array: so damage is found that no file format notices. The metadata
is written first; a checkpoint counts once Orbax has renamed its folder to STEP, atomically.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp

from gptjax import files, interrupts
from gptjax.devices import peer_failure
from gptjax.errors import RunError, UserError, first_line, is_out_of_memory
from gptjax.hashed_random import mix

ORBAX_METADATA = "_CHECKPOINT_METADATA"
"""Orbax's file in a checkpoint, in which gptjax 0.1 kept its metadata."""

COMMITTED = "commit_success.txt"
"""Orbax's last file in a checkpoint in a bucket, where folders cannot be renamed."""

DELETED = "deleted-"
"""Begins the name of a checkpoint that is being deleted."""


class Corrupted(UserError):
    """A checkpoint that cannot be used. An older one may be whole."""


class Checkpoints:
    """The checkpoints of one run directory. A context manager: leaving it waits for the last save.

    Metadata is a JSON object. Of its fields this class knows `val_loss`, and `eval_windows`: how it
    was measured; the best checkpoint is the one with the lowest loss among those measured alike.
    """

    def __init__(self, run_dir: Path, keep: int | None = None, keep_every: int | None = None):
        """`keep`: the newest checkpoints to keep besides the best; None opens for reading.
        `keep_every`: keep those whose step is a multiple of it too.

        Raises:
            UserError: opened for reading, and there is no run; or a name that Orbax cannot stand.
        """
        self.run_dir = run_dir
        root = run_dir if files.is_remote(run_dir) else run_dir.absolute()
        self.directory = root / "checkpoints"
        if keep is None and not self.directory.is_dir():
            raise UserError(f"no run in {run_dir}: expected a folder that training has written")
        self._keep, self._keep_every = keep, keep_every
        self._unverified: tuple[int, dict[str, list[tuple[int, ...]]]] | None = None
        self._metadata: dict[int, dict[str, Any]] = {}
        if keep is not None:
            self._orbax_directory  # noqa: B018 (what it refuses, it refuses now)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            if "_saver" in self.__dict__:
                with contextlib.suppress(Exception):  # reported by `wait`, or by what came before
                    self._saver.close()

    @functools.cached_property
    def _saver(self) -> ocp.training.Checkpointer:
        """Made for the first save: it cannot stand corrupted checkpoints, and readers need none. It
        removes what an interrupted save has left."""
        assert self._keep is not None, "opened for reading"
        _say_errors_once()
        return ocp.training.Checkpointer(
            self._orbax_directory,
            # Orbax would delete old ones under their own names: a kill leaves half of one.
            preservation_policy=ocp.training.preservation_policies.PreserveAll(),
            cleanup_tmp_directories=True,
        )

    @property
    def _orbax_directory(self) -> Path:
        """`directory`, by a name that Orbax can stand: it takes the path of what it has written for
        a pattern, in which it finds nothing where the path has one of these characters; and its C++
        code takes UTF-8, whatever the locale.

        Raises:
            UserError: there is something else of that name, or no such name in a bucket.
        """
        name = str(self.directory)
        if _is_utf8(name) and not re.search(r"[][*?\\]", name):
            return self.directory
        if files.is_remote(self.directory):
            raise UserError(f"{name}: in a bucket, a run's name cannot have any of []*?\\ in it")
        digest = hashlib.sha256(os.fsencode(self.directory)).hexdigest()[:16]
        # The same name on all hosts. Made anew where somebody has tidied up there.
        link = Path(tempfile.gettempdir()) / f"gptjax-{os.getuid()}-{digest}"
        with contextlib.suppress(FileExistsError):
            link.symlink_to(self.directory)
        ours = link.is_symlink() and link.lstat().st_uid == os.getuid()
        if not ours or link.resolve() != self.directory.resolve():
            raise UserError(f"{link} is not our link to {self.directory}; move it away")
        return link

    @property
    def steps(self) -> list[int]:
        """Of all finished checkpoints, in order."""
        return finished_steps(self.run_dir)

    @property
    def latest_step(self) -> int | None:
        """The newest checkpoint's step; None where there is none."""
        return max(self.steps, default=None)

    def candidates(self, name: str) -> list[int]:
        """The steps that "latest", "best" or a number names, in the order in which to try them.

        Raises:
            UserError: there is none; the ones there are are listed.
        """
        if name == "latest":
            found = self.steps[::-1]
        elif name == "best":
            found = self._by_loss()
        else:
            found = [step for step in self.steps if str(step) == name]
        if not found:
            existing = ", ".join(map(str, self.steps)) or "none"
            raise UserError(f"no checkpoint {name!r} in {self.directory}; there are: {existing}")
        return found

    def _by_loss(self) -> list[int]:
        """The steps by their validation loss, the lowest first; before them those that cannot be
        read (they may be the best), after them those without a loss, or measured otherwise than the
        newest."""
        unreadable, losses = [], {}
        for step in self.steps[::-1]:
            try:
                losses[step] = self._loss(step)
            except Corrupted:
                unreadable.append(step)
        measure = next((windows for loss, windows in losses.values() if loss is not None), None)

        def rank(step: int) -> float:
            loss, windows = losses[step]
            return math.inf if loss is None or windows != measure else loss

        return unreadable + sorted(losses, key=rank)  # of equal ones the newest first

    def _loss(self, step: int) -> tuple[float | None, int | None]:
        """(validation loss, how it was measured). Raises Corrupted."""
        if step not in self._metadata:
            self._metadata[step] = self.read_metadata(step)
        metadata = self._metadata[step]
        return metadata.get("val_loss"), metadata.get("eval_windows")

    def save(self, step: int, arrays: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Start saving named trees of arrays in the background. Waits until they are computed, and
        for the save before it; then deletes what is no longer kept.

        Raises:
            RunError: this save or the one before it failed, for instance on a full disk; or a
                number is not finite.
        """
        found = {name: _digests(tree) for name, tree in arrays.items()}
        non_finite = [
            path for part in found.values() for path, (_, finite) in part.items() if not finite
        ]
        if non_finite:
            raise RunError(
                f"the state after step {step} is not finite (in {non_finite[0]}); it was not saved;"
                f" {self.last_saved()}"
            )
        digests = {name: {p: digest for p, (digest, _) in d.items()} for name, d in found.items()}
        self.wait()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._orbax_directory  # noqa: B018 (there is a link to make)
            if jax.process_index() == 0:
                self._write_metadata(step, metadata, digests)
            with interrupts.deferred(), _save_options():
                self._saver.save_checkpointables_async(step, arrays, force=True)
            self._unverified = step, {name: _shapes(tree) for name, tree in arrays.items()}
        except Exception as error:  # of tensorstore, Orbax and the file system
            raise self._save_failed(error) from error
        self._metadata[step] = metadata

    def update_metadata(self, step: int, metadata: dict[str, Any], *, writes: bool) -> None:
        """Replace the metadata of a finished checkpoint. Only one host `writes`.

        Raises:
            OSError: it cannot be written.
        """
        if writes:
            self._write_metadata(step, metadata, self._read_record(step)["digests"])
        self._metadata[step] = metadata

    def _write_metadata(self, step: int, metadata: dict[str, Any], digests: Any) -> None:
        record = _signed({"metadata": metadata, "digests": digests})
        files.write_atomic(self.directory / f"{step}.json", json.dumps(record) + "\n")

    def read_metadata(self, step: int) -> dict[str, Any]:
        """Raises Corrupted: it is not what was written."""
        return self._read_record(step)["metadata"]

    def array_names(self, step: int) -> list[str]:
        """Of the trees that were saved. Raises Corrupted."""
        return list(self._read_record(step)["digests"])

    def _read_record(self, step: int) -> dict[str, Any]:
        return read_record(self.directory, step)

    def wait(self) -> None:
        """Return when everything is on disk and can be opened, and nothing more than is to be kept.

        Raises:
            RunError: a save failed.
        """
        try:
            with interrupts.deferred():
                if "_saver" in self.__dict__:
                    self._saver.wait()
                if self._unverified and jax.process_index() == 0:
                    self._verify(*self._unverified)
        except Exception as error:  # as in `save`: what failed in the background is raised here
            raise self._save_failed(error) from error
        finally:
            self._unverified = None
        if self._keep and jax.process_index() == 0:
            self._prune(self._keep)

    def _verify(self, step: int, written: dict[str, list[tuple[int, ...]]]) -> None:
        """Open a new checkpoint as a reader would, up to the arrays' numbers. Before older ones are
        deleted: a save counts only when it can be opened."""
        try:
            self.read_metadata(step)
            found = ocp.checkpointables_metadata(self._orbax_directory / str(step)).metadata
            broken = [n for n in written if not found.get(n) or _shapes(found[n]) != written[n]]
            if step not in self.steps or broken:
                raise Corrupted(f"{', '.join(broken) or 'the folder'} of step {step} is missing")
        except Exception as error:  # of tensorstore, Orbax and the file system
            moved = self.set_aside(step)
            raise Corrupted(
                f"step {step} cannot be opened again ({first_line(error)}); see {moved}"
            ) from error

    def _prune(self, keep: int) -> None:
        """Delete all but the newest `keep`, the best, and each `keep_every`th step; nothing, while
        one of them cannot be read. What cannot be deleted is no reason to lose a new one."""
        for folder in self.directory.glob(f"{DELETED}*"):  # of a process that was killed
            _remove(folder)
        steps = self.steps
        for path in self.directory.glob("*.json"):  # of a save that was not finished
            if path.stem not in map(str, steps):
                path.unlink(missing_ok=True)
        try:
            measured = {step for step in steps if self._loss(step)[0] is not None}
        except Corrupted:
            return
        best = [step for step in self._by_loss() if step in measured][:1]
        for step in steps[:-keep]:
            if step in best or (self._keep_every and step % self._keep_every == 0):
                continue
            # First it ceases to be a checkpoint, atomically.
            folder = self.directory / str(step)
            with contextlib.suppress(Exception):  # of the file system and gcsfs
                if files.is_remote(folder):
                    (folder / COMMITTED).unlink()
                else:
                    folder = folder.rename(self.directory / f"{DELETED}{step}")
                (self.directory / f"{step}.json").unlink(missing_ok=True)
                _remove(folder)

    def _save_failed(self, error: Exception) -> RunError:
        reason = _gist(error)
        if "No space left" in str(error):
            reason = "the disk is full"
        return RunError(f"cannot save a checkpoint in {self.directory}: {reason}; {self._newest()}")

    def last_saved(self) -> str:
        """What is on disk, for an error message, once the save in progress is done."""
        with contextlib.suppress(RunError):
            self.wait()
        return self._newest()

    def _newest(self) -> str:
        step = self.latest_step
        return "there is no checkpoint yet" if step is None else f"step {step} is saved"

    def set_aside(self, step: int) -> Path:
        """Move a corrupted checkpoint out of the way, to RUN_DIR/damaged-STEP; where to."""
        corrupted = self.directory / str(step)
        to = self.run_dir / f"damaged-{step}"
        for number in itertools.count(2):
            if not to.exists() or not corrupted.exists():
                break
            to = self.run_dir / f"damaged-{step}-{number}"
        # Where it is missing, another host was faster.
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            corrupted.rename(to)
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            (self.directory / f"{step}.json").rename(self.run_dir / f"{to.name}.json")
        return to

    def set_aside_before(self) -> list[Path]:
        """What `set_aside` has moved."""
        return list(self.run_dir.glob("damaged-*"))

    def restore(self, step: int, **targets: Any) -> dict[str, Any]:
        """Load the named trees: of jax.ShapeDtypeStruct with a sharding each, so that a checkpoint
        opens on any number of devices.

        Raises:
            Corrupted: a file is missing, cut short or changed, or it is another model's.
            RunError: another host failed meanwhile.
        """
        where = f"the checkpoint {self.directory}/{step}"
        digests = self._read_record(step)["digests"]
        _say_errors_once()
        try:
            with interrupts.deferred():
                loaded = ocp.load_checkpointables(self._orbax_directory / str(step), targets)
        except Exception as error:  # of tensorstore, Orbax and the file system
            if is_out_of_memory(error):
                raise
            if peer_failure.is_peer_failure(error):  # no fault of the checkpoint's
                raise RunError(peer_failure.MESSAGE) from error
            reason = _gist(error)
            if "incompatible handler" in reason or "not found in the checkpoint" in reason:
                reason = "a part of it is missing"
            raise Corrupted(f"{where} cannot be read: {reason}") from error
        for part, tree in loaded.items():
            for path, (digest, _) in _digests(tree).items():
                if digests.get(part, {}).get(path) != digest:
                    raise Corrupted(f"{where} is corrupted: {part}{path} is not what was saved")
        return loaded


def _is_utf8(name: str) -> bool:
    """Whether the bytes of this path are those that C++ code is given."""
    try:
        return name.encode() == os.fsencode(name)
    except UnicodeEncodeError:  # bytes that are no characters
        return False


def _say_errors_once() -> None:
    """Orbax logs the traceback of a failed save or load, and raises it then; and it leaves reads
    behind that nobody waits for any more, which Python reports when they are collected."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_not_orbaxs)  # adds it once
    if not isinstance(sys.unraisablehook, _UnraisableHook):
        sys.unraisablehook = _UnraisableHook(sys.unraisablehook)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


class _UnraisableHook:
    """Passes on what no code could raise, but for a read that ends after the load that failed."""

    def __init__(self, before: Any):
        self._before = before

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._before(unraisable)


def _is_not_orbaxs(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname + record.getMessage()


def finished_steps(run_dir: Path) -> list[int]:
    """Of the checkpoints of a run, in order. Initialises neither Orbax nor JAX's devices."""
    # On a disk a checkpoint gets its name when it is whole, in a bucket this file.
    named = [p for p in run_dir.glob("checkpoints/*") if re.fullmatch("0|[1-9][0-9]{0,9}", p.name)]
    if files.is_remote(run_dir):
        named = [path for path in named if (path / COMMITTED).exists()]
    return sorted(int(path.name) for path in named)


def read_record(directory: Path, step: int) -> dict[str, Any]:
    """{"metadata": ..., "digests": {tree: {array: its digest}}} of one checkpoint, also of one that
    gptjax 0.1 wrote. Initialises neither Orbax nor JAX's devices.

    Raises:
        Corrupted: it is not what was written.
    """
    path, where = directory / f"{step}.json", f"the checkpoint {directory / str(step)}"
    try:
        if path.exists():
            record = json.loads(path.read_text(encoding="utf-8"))
        else:
            text = (directory / str(step) / ORBAX_METADATA).read_text(encoding="utf-8")
            record = json.loads(text).get("custom_metadata")
            if not record:
                raise FileNotFoundError(f"{path} is missing")
        if record != _signed(record):
            raise ValueError
        if "metadata" in record:
            metadata = record["metadata"]
        else:
            metadata = record["facts"]
            config = metadata["config"]
            if not config["eval_full_split"]:  # then it counted micro-batches
                micro = config["batch_size"] // config["gradient_accumulation_steps"]
                metadata["eval_windows"] = config["eval_batches"] * micro
        return {"metadata": metadata, "digests": record["digests"]}
    except OSError as error:
        raise Corrupted(f"cannot read {where}: {_gist(error)}") from error
    except Exception as error:  # a file that is not ours can fail in any way
        raise Corrupted(f"{where} is corrupted: its metadata has changed") from error


def on_one_device(shapes: Any) -> Any:
    """Targets for `Checkpoints.restore`."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)


@jax.jit
def _digest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(uint32 [], whether all is finite). A sum of hashes of each number and its index, modulo
    2**32: the same wherever the parts of `x` lie."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    index = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return mix(mix(index) ^ bits).sum(dtype=jnp.uint32), jnp.isfinite(x).all()


def _digests(tree: Any) -> dict[str, tuple[int, bool]]:
    """{array's path: its digest}, of 32-bit arrays."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    found = [(jax.tree_util.keystr(path), _digest(x)) for path, x in leaves]
    return {path: (int(digest), bool(finite)) for path, (digest, finite) in found}


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return sorted(tuple(x.shape) for x in jax.tree.leaves(tree))


def _save_options() -> ocp.Context:
    context = ocp.Context()
    # Weights hardly compress (8% in what we measured, at six times the time of the save).
    context.array.saving.use_compression = False
    # Host arrays are an import's, which nobody changes: no second copy of a model that may be big.
    context.memory.deepcopy_host_arrays = False
    return context


def _signed(record: dict[str, Any]) -> dict[str, Any]:
    """`record` with the hash of all else in it, as `sha256`."""
    rest = {name: value for name, value in record.items() if name != "sha256"}
    text = json.dumps(rest, sort_keys=True)
    return rest | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def _remove(folder: Path) -> None:
    if files.is_remote(folder):
        folder.rmtree()  # type: ignore[attr-defined]
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _gist(error: Exception) -> str:
    """Tensorstore's long messages end in the system's words."""
    system = re.search(r": ([^:]+) \[os_error", str(error))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return system[1] if system else first_line(error)
