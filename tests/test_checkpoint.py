"""Checkpoints: bitwise, self-contained, on any number of devices, newest and best kept."""

import shutil

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from gptjax import checkpoint, parallel, train
from gptjax.checkpoint import Checkpoints, Facts
from gptjax.config import ModelConfig, TrainConfig
from gptjax.errors import RunError, UserError

CONFIG = TrainConfig(model=ModelConfig(2, 2, 16, 8, vocab_size=11), run_dir="somewhere")
EVERYWHERE = NamedSharding(Mesh(np.array(jax.devices()), ("all",)), PartitionSpec())
FACTS = Facts(CONFIG, '{"kind": "char", "characters": "ab"}', "f00d", 2.5)


@pytest.fixture(scope="module")
def state():
    return jax.jit(lambda: train.init_state(CONFIG))()


def save(checkpoints, step, state, val_loss=None):
    checkpoints.save(step, state.params, state.opt_state, FACTS, val_loss)


def steps(run_dir):
    return sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.mark.parametrize("devices", [1, 8])
def test_a_checkpoint_of_eight_devices_restores_bitwise_on(tmp_path, state, devices):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 5, parallel.unreplicate(parallel.replicate(state)))
    sharding = SingleDeviceSharding(jax.devices()[3]) if devices == 1 else EVERYWHERE
    shapes = jax.eval_shape(lambda: train.init_state(CONFIG))
    target = checkpoint.abstract(shapes, sharding)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 5
        assert checkpoints.facts(5) == FACTS
        loaded = checkpoints.restore(5, params=target.params, opt_state=target.opt_state)
    for kind in ("params", "opt_state"):
        before, after = getattr(state, kind), loaded[kind]
        assert jax.tree.structure(before) == jax.tree.structure(after)
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert x.dtype == y.dtype and np.array_equal(x, y)
            assert len(y.sharding.device_set) == devices


def test_the_newest_two_and_the_best_are_kept(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, 2.4)]:
            save(checkpoints, step, state, loss)
    assert steps(tmp_path) == [2, 4, 5]
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step) == (5, 2)
        assert [checkpoints.resolve(name) for name in ("latest", "best", "4")] == [5, 2, 4]
        for name in ("3", "first", "-1"):
            with pytest.raises(UserError, match=f"no checkpoint '{name}'.*there are: 2, 4, 5"):
                checkpoints.resolve(name)


def test_checkpoints_between_evaluations_go_and_the_best_stays(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in range(1, 11):
            save(checkpoints, step, state, {3: 1.0, 6: 2.0}.get(step))
    assert steps(tmp_path) == [3, 9, 10]


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


def test_another_model_or_a_damaged_file_is_a_user_error(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1, state)
    other = TrainConfig(model=ModelConfig(2, 2, 32, 8, vocab_size=11))
    shapes = jax.eval_shape(lambda: train.init_state(other).params)
    target = checkpoint.abstract(shapes, EVERYWHERE)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="cannot be read"):
        checkpoints.restore(1, params=target)
    for name in ("_CHECKPOINT_METADATA", "metrics/metrics"):
        broken = tmp_path / "checkpoints" / "1" / name
        broken.parent.mkdir(exist_ok=True)
        broken.write_text("{")
        with pytest.raises(UserError, match="damaged"), Checkpoints(tmp_path) as checkpoints:
            checkpoints.facts(1)


def test_a_failed_save_names_the_checkpoint_that_is_safe(tmp_path, state, monkeypatch):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, 1, state)
        checkpoints.wait()

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints._orbax, "save_checkpointables_async", full)
        with pytest.raises(RunError, match=r"the disk is full \(step 1 is safe\)"):
            save(checkpoints, 2, state)
