"""Checkpoints: bitwise, on any devices; newest and best kept; damage named, never loaded."""

import json
import logging
import os
import shutil
import signal
from pathlib import Path

import fuzz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax import checkpoint
from gptjax.checkpoint import Checkpoints, Corrupted
from gptjax.errors import RunError, UserError

# Orbax leaves reads behind that nobody waits for any more when one of them has failed.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def make_arrays(seed: int = 0) -> dict:
    draw = np.random.default_rng(seed)
    params = {"wte": draw.standard_normal((64, 64), "f4"), "ln": {"scale": np.ones(8, "f4")}}
    state = {"count": np.int32(seed), "mu": draw.standard_normal((64, 64), "f4")}
    return jax.tree.map(jnp.asarray, {"params": params, "opt_state": state})


ARRAYS = make_arrays()
SHAPES = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), ARRAYS)


def save(checkpoints, step, val_loss=None, arrays=ARRAYS, **more):
    checkpoints.save(step, arrays, {"val_loss": val_loss} | more)


def restore(run_dir, step, targets=None):
    with Checkpoints(run_dir) as checkpoints:
        return checkpoints.restore(step, **(targets or checkpoint.on_one_device(SHAPES)))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y)


def steps(run_dir: Path) -> list[int]:
    """What lies there, without asking our own code."""
    return sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run directory with two checkpoints, of different arrays; the second one is better."""
    folder = tmp_path_factory.mktemp("whole")
    with Checkpoints(folder, keep=2) as checkpoints:
        save(checkpoints, 1, 2.0, make_arrays(1))
        save(checkpoints, 2, 1.0)
    return folder


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copied"))


# ------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("saved_on", [1, 8])
@pytest.mark.parametrize("loaded_on", [1, 4])
def test_a_checkpoint_loads_bitwise_on_any_devices(tmp_path, saved_on, loaded_on):
    def laid_out(count, make):
        mesh = Mesh(np.array(jax.devices()[-count:]), ("shards",))

        def one(x):
            last = [None] * (x.ndim - 1) + ["shards"] if x.ndim else []
            return make(x, NamedSharding(mesh, PartitionSpec(*last)))

        return lambda tree: jax.tree.map(one, tree)

    arrays = laid_out(saved_on, jax.device_put)(ARRAYS)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 5, arrays=arrays)
    target = laid_out(loaded_on, lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at))
    loaded = restore(tmp_path, 5, target(ARRAYS))
    assert_same(loaded, ARRAYS)
    assert loaded["params"]["wte"].sharding.device_set == {*jax.devices()[-loaded_on:]}


def test_a_part_loads_alone_and_metadata_comes_back(whole):
    with Checkpoints(whole) as checkpoints:
        assert set(checkpoints.array_names(2)) == {"params", "opt_state"}
        assert checkpoints.read_metadata(2) == {"val_loss": 1.0}
        target = checkpoint.on_one_device({"params": SHAPES["params"]})
        assert_same(checkpoints.restore(2, **target), {"params": ARRAYS["params"]})


def test_metadata_changes_without_touching_the_arrays(copied):
    with Checkpoints(copied, keep=2) as checkpoints:
        assert checkpoints.candidates("best") == [2, 1]
        checkpoints.update_metadata(2, {"val_loss": 3.0}, writes=True)
        assert checkpoints.candidates("best") == [1, 2]
        checkpoints.update_metadata(1, {"val_loss": 4.0}, writes=False)  # as another host would
        assert checkpoints.candidates("best") == [2, 1]
    with Checkpoints(copied) as checkpoints:
        assert [checkpoints.read_metadata(step)["val_loss"] for step in (1, 2)] == [2.0, 3.0]
    assert_same(restore(copied, 2), ARRAYS)


@pytest.mark.parametrize(
    "name", ["über", "x\udcff", "*", "a?", "run[1]", "a\\b", "[", "a [b] c]", "a\nb"]
)
def test_a_run_directory_may_have_any_name(tmp_path, name):
    with Checkpoints(tmp_path / "run1", keep=1) as checkpoints:  # which a pattern would match
        save(checkpoints, 2)
    with Checkpoints(tmp_path / name, keep=1) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2, arrays=make_arrays(2))
    assert steps(tmp_path / name) == [2]
    assert_same(restore(tmp_path / name, 2), make_arrays(2))


def test_a_load_that_fails_leaves_no_traceback_behind(copied, command):
    """Several reads fail at once; those that fail after the first find nobody who waits."""
    for manifest in copied.rglob("manifest.ocdbt"):
        manifest.write_bytes(manifest.read_bytes()[:7])
    result = command(
        "-c", "import sys; from pathlib import Path; from gptjax.checkpoint import *\n"
        "shapes = {str(i): jax.ShapeDtypeStruct((2,), 'f4') for i in range(9)}\n"
        f"with Checkpoints(Path({str(copied)!r})) as found:\n"
        "    try: found.restore(2, params=on_one_device(shapes))\n"
        "    except Corrupted: print('refused')",
    )  # fmt: skip
    assert (result.stdout, result.stderr) == ("refused\n", "")


@pytest.mark.parametrize("name", ["run[1]", "a*"])
def test_a_name_that_no_bucket_can_have_is_refused_at_once(name):
    with pytest.raises(UserError, match="in a bucket, a run's name cannot have any of"):
        Checkpoints(epath.Path(f"gs://bucket/{name}"), keep=1)


def test_ctrl_c_while_loading_is_no_damage(whole, monkeypatch):
    load = checkpoint.ocp.load_checkpointables

    def interrupted(*args, **more):
        os.kill(os.getpid(), signal.SIGINT)
        load(*args, **more)
        raise RuntimeError("what a library makes of it")

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):  # not Corrupted, after which another one is taken
            restore(whole, 2)
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_link_that_somebody_tidies_away_loses_no_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(checkpoint.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    with Checkpoints(tmp_path / "run[1]", keep=2) as checkpoints:
        for step in (1, 2):
            save(checkpoints, step)
            checkpoints.wait()
            (link,) = (tmp_path / "tmp").iterdir()
            link.unlink()
    assert steps(tmp_path / "run[1]") == [1, 2] and not (tmp_path / "tmp" / "2").exists()
    link.mkdir()
    with pytest.raises(UserError, match=f"{link.name} is not our link to"):
        restore(tmp_path / "run[1]", 2)


@pytest.mark.parametrize("part", ["manifest.ocdbt", "_METADATA", "d"])
def test_a_save_that_cannot_be_opened_is_an_error(tmp_path, monkeypatch, part):
    open_metadata = checkpoint.ocp.checkpointables_metadata

    def damaged_first(folder):
        path = folder / "params" / part
        shutil.rmtree(path) if path.is_dir() else os.truncate(path, 20)
        return open_metadata(folder)

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        monkeypatch.setattr(checkpoint.ocp, "checkpointables_metadata", damaged_first)
        save(checkpoints, 2)
        with pytest.raises(RunError, match="step 2 cannot be opened again") as caught:
            checkpoints.wait()
    assert "step 1 is saved" in str(caught.value) and steps(tmp_path) == [1]
    assert_same(restore(tmp_path, 1), ARRAYS)


def test_every_nth_checkpoint_is_kept(tmp_path):
    with Checkpoints(tmp_path, keep=1, keep_every=4) as checkpoints:
        for step in range(2, 12, 2):
            save(checkpoints, step, val_loss=float(step))
    assert steps(tmp_path) == [2, 4, 8, 10]  # 2 is the best


def test_no_run_is_one_clear_line_and_makes_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"no run in .*nothing: expected a folder"):
        Checkpoints(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


# ------------------------------------------------------------------------------- which stay


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step is None
        for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, None), (10, 2.4)]:
            save(checkpoints, step, loss)
    assert steps(tmp_path) == [2, 5, 10]
    files = {path.name for path in (tmp_path / "checkpoints").glob("*.json")}
    assert files == {"2.json", "5.json", "10.json"}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 10 and checkpoints.steps == [2, 5, 10]
        found = [checkpoints.candidates(name) for name in ("latest", "best", "5")]
        assert found == [[10, 5, 2], [2, 10, 5], [5]]
        for name in ("3", "first", "-1", "05"):
            with pytest.raises(UserError, match=f"no checkpoint '{name}'.*there are: 2, 5, 10"):
                checkpoints.candidates(name)


def test_of_equal_losses_the_newest_is_best(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, step, 1.5)
        checkpoints.wait()
        assert checkpoints.candidates("best") == [3, 2, 1]


def test_best_compares_only_losses_over_the_newest_windows(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step, loss, windows in [(1, 1.0, 8), (2, 3.0, None), (3, 2.5, None), (4, None, None)]:
            save(checkpoints, step, loss, eval_windows=windows)
        checkpoints.wait()
        # 1.0 over eight windows is not better than 2.5 over all.
        assert checkpoints.candidates("best")[0] == 3
    assert steps(tmp_path) == [3, 4]


def test_nothing_goes_while_one_cannot_be_read(tmp_path):
    """It might be the best."""
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 1, 1.0)
    path = tmp_path / "checkpoints" / "1.json"
    content = path.read_text()
    path.write_text("{")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 2, 2.0)
        save(checkpoints, 3, 3.0)
        checkpoints.wait()
        assert checkpoints.candidates("best") == [1, 2, 3]
    assert steps(tmp_path) == [1, 2, 3]
    path.write_text(content)
    with Checkpoints(tmp_path, keep=1):
        pass
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 4, 4.0)
    assert steps(tmp_path) == [1, 4]


def test_what_an_interrupted_deletion_left_is_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 1)
    folder = tmp_path / "checkpoints"
    left = shutil.copytree(folder / "1", folder / "deleted-0")
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps == [1]
        save(checkpoints, 2)
    assert steps(tmp_path) == [2] and not left.exists()


def test_an_interrupted_save_is_no_checkpoint_and_goes(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1)
    folder = tmp_path / "checkpoints"
    unfinished = shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp")
    (folder / "2.json").write_text("{}")
    with Checkpoints(tmp_path) as reading:
        assert reading.latest_step == 1
    assert unfinished.exists()  # reading changes nothing
    with Checkpoints(tmp_path, keep=2) as writing:
        save(writing, 3)
    assert steps(tmp_path) == [1, 3]
    assert not unfinished.exists() and not (folder / "2.json").exists()


def test_a_corrupted_checkpoint_is_set_aside_under_a_new_name(copied):
    with Checkpoints(copied, keep=2) as checkpoints:
        assert checkpoints.set_aside_before() == []
        (copied / "damaged-2").mkdir()
        assert checkpoints.set_aside(2) == copied / "damaged-2-2"
        assert (copied / "damaged-2-2.json").exists() and checkpoints.steps == [1]
        assert set(map(str, checkpoints.set_aside_before())) >= {str(copied / "damaged-2-2")}
        checkpoints.set_aside(2)  # which another host has done


# ------------------------------------------------------------------------------------ damage


def damage(path: Path, how: str, at: int = 0) -> None:
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[at % len(content)] ^= 1 << at % 8
        path.write_bytes(content)


def is_refused(run_dir, step=2) -> bool:
    """Whether it is; if not, it is whole."""
    try:
        loaded = restore(run_dir, step)
    except Corrupted as error:
        assert "\n" not in str(error) and f"checkpoints/{step}" in str(error)
        return True
    assert_same(loaded, ARRAYS)
    return False


def files_of(run_dir: Path) -> list[Path]:
    folder = run_dir / "checkpoints"
    found = [p for p in [*(folder / "2").rglob("*"), folder / "2.json"] if p.is_file()]
    return sorted(found, key=lambda p: -p.stat().st_size)


@pytest.mark.parametrize("how", ["gone", "cut", "flipped"])
def test_damaged_arrays_or_metadata_are_named(copied, how):
    """The largest file of each tree holds its numbers."""
    folder = copied / "checkpoints"
    victims = [next(p for p in files_of(copied) if part in p.parts)
               for part in ("params", "opt_state", "2.json")]  # fmt: skip
    assert victims[-1] == folder / "2.json"
    for path in victims:
        content = path.read_bytes()
        damage(path, how, at=len(content) // 2)
        assert is_refused(copied)
        path.write_bytes(content)
    assert not is_refused(copied)


def test_any_file_cut_short_or_gone_is_named_or_harmless(copied):
    refused, files = 0, files_of(copied)
    for path in files:
        content = path.read_bytes()
        for how in ("cut", "gone"):
            damage(path, how)
            refused += is_refused(copied)
            path.write_bytes(content)
    assert refused > len(files)


def test_any_flipped_bit_is_named_or_harmless(copied):
    draw, refused = np.random.default_rng(0), 0
    for path in files_of(copied):
        content = path.read_bytes()
        for _ in range(4):
            damage(path, "flipped", int(draw.integers(8 * len(content))))
            refused += is_refused(copied)
            path.write_bytes(content)
    assert refused > 15 and not is_refused(copied)


RECORD = {"val_loss": 1.5, "eval_windows": 8}


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(drawn=st.data())
def test_damaged_metadata_is_whole_or_refused(copied, drawn):
    path = copied / "checkpoints" / "1.json"
    with Checkpoints(copied, keep=2) as checkpoints:
        if json.loads(path.read_text())["metadata"] != RECORD:
            checkpoints.update_metadata(1, RECORD, writes=True)
        content = path.read_bytes()
        path.write_bytes(drawn.draw(fuzz.damaged(content)))
        try:
            found = fuzz.read_or_refuse(lambda: checkpoints.read_metadata(1), "checkpoints/1")
        finally:
            path.write_bytes(content)
    assert found in (None, RECORD)


def test_another_models_checkpoint_is_refused(whole):
    other = {"params": {"wte": jax.ShapeDtypeStruct((64, 65), np.float32)}}
    with pytest.raises(Corrupted, match=r"checkpoints/2 cannot be read"):
        restore(whole, 2, checkpoint.on_one_device(other))


def test_a_missing_part_is_named(copied):
    shutil.rmtree(copied / "checkpoints" / "2" / "params")
    with pytest.raises(Corrupted, match=r"checkpoints/2 cannot be read: a part of it is missing"):
        restore(copied, 2)


def test_missing_metadata_are_named(copied):
    (copied / "checkpoints" / "2.json").unlink()
    with Checkpoints(copied) as checkpoints, pytest.raises(Corrupted, match=r"2\.json is missing"):
        checkpoints.read_metadata(2)


def test_numbers_that_moved_are_not_taken_for_the_same(tmp_path):
    """Not even where all of them are still there."""
    digests = []
    for number, order in enumerate((slice(None), slice(None, None, -1))):
        arrays = {"params": {"wte": ARRAYS["params"]["wte"][order]}}
        with Checkpoints(tmp_path / str(number), keep=1) as checkpoints:
            save(checkpoints, 1, arrays=arrays)
        record = json.loads((tmp_path / str(number) / "checkpoints" / "1.json").read_text())
        digests.append(record["digests"])
    assert digests[0] != digests[1]


# ----------------------------------------------------------------------------- failed saves


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, value):
    params = ARRAYS["params"] | {"wte": ARRAYS["params"]["wte"].at[3, 5].set(value)}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1)
        with pytest.raises(
            RunError, match=r"after step 2 is not finite \(in \['wte'\]\).*step 1 is saved"
        ):
            save(checkpoints, 2, arrays=ARRAYS | {"params": params})
    assert steps(tmp_path) == [1]


def test_a_failed_save_names_the_checkpoint_that_is_there(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"cannot save .*: the disk is full; step 1 is saved"):
            save(checkpoints, 2)
        monkeypatch.undo()
        save(checkpoints, 3)
    assert steps(tmp_path) == [1, 3]


def test_a_save_that_fails_in_the_background_is_noticed(tmp_path, monkeypatch):
    """At its very end, where it gets its name."""
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()

        def fails(*_, **__):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "rename", fails)
        save(checkpoints, 2)
        with pytest.raises(RunError, match=r"cannot save .*: Input/output error; step 1 is saved"):
            checkpoints.wait()
        monkeypatch.undo()
        assert checkpoints.last_saved() == "step 1 is saved"
    assert steps(tmp_path) == [1]


def test_reading_changes_no_log_level(whole):
    levels = [logging.getLogger(name).level for name in ("absl", "asyncio")]
    restore(whole, 2)
    assert [logging.getLogger(name).level for name in ("absl", "asyncio")] == levels
