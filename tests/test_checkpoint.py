"""Checkpoints: bitwise, self-contained, on any number of devices, newest and best kept."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from gptjax import checkpoint, parallel, train
from gptjax.checkpoint import Checkpoints, Facts
from gptjax.config import ModelConfig, TrainConfig
from gptjax.errors import RunError, UserError

# Orbax leaves reads behind that nobody waits for any more when one of them has failed.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CONFIG = TrainConfig(model=ModelConfig(2, 2, 16, 8, vocab_size=11), run_dir="somewhere")
FACTS = Facts(CONFIG, '{"kind": "char", "characters": "ab"}', "f00d", 2.5)


@pytest.fixture(scope="module")
def state():
    return jax.jit(lambda: train.init_state(CONFIG))()


def save(checkpoints, step, state, val_loss=None):
    facts = dataclasses.replace(FACTS, val_loss=val_loss)
    checkpoints.save(step, state.params, state.opt_state, facts)


def steps(run_dir):
    return sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.mark.parametrize("to", ["pmap", "fsdp", "one device"])
@pytest.mark.parametrize("kind", ["pmap", "fsdp"])
def test_a_checkpoint_of_eight_devices_restores_bitwise_under(tmp_path, state, kind, to):
    saving = parallel.strategy(kind)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        built = saving.build(lambda: train.init_state(CONFIG))
        save(checkpoints, 5, saving.unplace(saving.place(built)))
    layout = parallel.strategy(to).targets if to != "one device" else checkpoint.on_one_device
    target = layout(jax.eval_shape(lambda: train.init_state(CONFIG)))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 5
        assert checkpoints.facts(5) == FACTS
        loaded = checkpoints.restore(5, params=target.params, opt_state=target.opt_state)
    for kind in ("params", "opt_state"):
        before, after = getattr(state, kind), loaded[kind]
        assert jax.tree.structure(before) == jax.tree.structure(after)
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert x.dtype == y.dtype and np.array_equal(x, y)


def test_the_newest_two_and_the_best_are_kept(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, 2.4)]:
            save(checkpoints, step, state, loss)
    assert steps(tmp_path) == [2, 4, 5]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 5
        found = [checkpoints.candidates(name) for name in ("latest", "best", "4")]
        assert found == [[5, 4, 2], [2, 5, 4], [4]]
        for name in ("3", "first", "-1"):
            with pytest.raises(UserError, match=f"no checkpoint '{name}'.*there are: 2, 4, 5"):
                checkpoints.candidates(name)


def test_checkpoints_between_evaluations_go_and_the_best_stays(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in range(1, 11):
            save(checkpoints, step, state, {3: 1.0, 6: 2.0}.get(step))
    assert steps(tmp_path) == [3, 9, 10]


def test_what_a_killed_deletion_has_left_is_no_checkpoint_and_goes(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 1, state)
    left = tmp_path / "checkpoints" / "deleted-0"
    shutil.copytree(tmp_path / "checkpoints" / "1", left)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps == [1]
        save(checkpoints, 2, state)
    assert steps(tmp_path) == [2] and not left.exists()


def test_nothing_is_deleted_while_one_cannot_be_read_for_it_might_be_the_best(tmp_path, state):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 1, state, 1.0)
    path = tmp_path / "checkpoints" / "1" / checkpoint.METADATA
    content = path.read_text()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 2, state, 2.0)
        path.write_text("{")
        checkpoints._val_losses.clear()
        save(checkpoints, 3, state, 3.0)
        checkpoints.wait()
        assert steps(tmp_path) == [1, 2, 3]
        path.write_text(content)
    assert steps(tmp_path) == [1, 3]


def test_leaving_waits_for_the_last_save(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1, state)
    assert steps(tmp_path) == [1]


def test_an_unfinished_save_is_cleaned_up_and_never_taken_for_a_checkpoint(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1, state)
    unfinished = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", unfinished)
    with Checkpoints(tmp_path) as reading:
        assert reading.latest_step == 1
    assert unfinished.exists()  # reading changes nothing
    with Checkpoints(tmp_path, keep=2) as writing:
        assert writing.latest_step == 1
        save(writing, 2, state)
    assert steps(tmp_path) == [1, 2] and not unfinished.exists()


def test_no_run_is_one_clear_line_and_makes_no_folder(tmp_path):
    with pytest.raises(UserError, match="no run in"):
        Checkpoints(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, state):
    """Two checkpoints, of different weights."""
    folder = tmp_path_factory.mktemp("whole")
    other = state._replace(params=jax.tree.map(lambda x: x + 1, state.params))
    with Checkpoints(folder, keep=2) as checkpoints:
        save(checkpoints, 1, other, 2.0)
        save(checkpoints, 2, state, 1.0)
    return folder


def files(checkpoint_dir):
    return sorted(p for p in checkpoint_dir.rglob("*") if p.is_file())


def loads_or_is_named(run_dir, state, name="2"):
    """True where the checkpoint loads as it was saved; False where it is refused."""
    try:
        loaded = checkpoint.load(run_dir, name, optimizer=True)
    except checkpoint.Damaged as error:
        assert "\n" not in str(error) and f"checkpoints/{name}" in str(error)
        return False
    assert loaded.facts == dataclasses.replace(FACTS, val_loss=1.0)
    for kind in ("params", "opt_state"):
        before, after = getattr(state, kind), getattr(loaded, kind)
        assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(after)))
    return True


def test_a_checkpoint_with_any_file_cut_short_or_gone_is_named_or_whole(tmp_path, state, whole):
    refused = 0
    for path in files(whole / "checkpoints" / "2"):
        for change in ("cut", "gone"):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            shutil.copytree(whole, tmp_path / "run")
            victim = tmp_path / "run" / path.relative_to(whole)
            if change == "gone":
                victim.unlink()
            else:
                victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
            refused += not loads_or_is_named(tmp_path / "run", state)
    assert refused > len(files(whole / "checkpoints" / "2"))


def test_a_checkpoint_with_any_bit_flipped_is_named_or_whole(tmp_path, state, whole):
    draw = np.random.default_rng(0)
    shutil.copytree(whole, tmp_path / "run")
    refused = 0
    for path in files(tmp_path / "run" / "checkpoints" / "2"):
        content = path.read_bytes()
        for _ in range(6):
            damaged = bytearray(content)
            damaged[draw.integers(len(damaged))] ^= 1 << draw.integers(8)
            path.write_bytes(damaged)
            refused += not loads_or_is_named(tmp_path / "run", state)
        path.write_bytes(content)
    assert refused > 20 and loads_or_is_named(tmp_path / "run", state)


def test_where_the_newest_is_damaged_the_one_before_is_taken_with_a_warning(
    tmp_path, state, whole, capsys
):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "2" / checkpoint.METADATA).write_text("{")
    for name in ("latest", "best"):
        assert checkpoint.load(tmp_path / "run", name).step == 1
        warning = capsys.readouterr().err.strip()
        assert "checkpoints/2 is damaged" in warning and "step 1 is taken instead" in warning
    assert checkpoint.newest_facts(tmp_path / "run").val_loss == 2.0


def test_another_models_checkpoint_is_refused(whole):
    other = TrainConfig(model=ModelConfig(2, 2, 32, 8, vocab_size=11))
    shapes = jax.eval_shape(lambda: train.init_state(other).params)
    with Checkpoints(whole) as checkpoints, pytest.raises(UserError, match="cannot be read"):
        checkpoints.restore(2, params=checkpoint.on_one_device(shapes))


def test_facts_can_be_amended_without_touching_the_arrays(tmp_path, state, whole):
    shutil.copytree(whole, tmp_path / "run")
    changed = dataclasses.replace(FACTS, val_loss=3.0)
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        checkpoints.amend(2, changed, writes=True)
        assert checkpoints.candidates("best") == [1, 2]
    loaded = checkpoint.load(tmp_path / "run", "2")
    assert loaded.facts == changed
    assert np.array_equal(loaded.params["wte"], state.params["wte"])


def test_a_state_that_is_not_finite_is_not_saved(tmp_path, state):
    wild = state._replace(params=state.params | {"wte": state.params["wte"].at[3, 5].set(np.nan)})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1, state)
        with pytest.raises(RunError, match=r"after step 2 is not finite \(in \['wte'\]\)"):
            save(checkpoints, 2, wild)
    assert steps(tmp_path) == [1]


def test_a_failed_save_names_the_checkpoint_that_is_safe(tmp_path, state, monkeypatch):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1, state)
        checkpoints.wait()

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints._saver, "save_checkpointables_async", full)
        with pytest.raises(RunError, match=r"the disk is full; step 1 is saved"):
            save(checkpoints, 2, state)
