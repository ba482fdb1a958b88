"""A checkpoint is all that is needed to use it, and says so itself; damage is told from it."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import fuzz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import assert_bitwise, random_params

from gptjax import config_io, files, optim, run_metadata
from gptjax.checkpoint import Checkpoints, Corrupted, read_record
from gptjax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.data import tokenizers
from gptjax.errors import UserError
from gptjax.run_metadata import CheckpointMetadata, load_checkpoint, newest_metadata
from gptjax.runtime_config import ComputeConfig, RuntimeConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CONFIG = TrainConfig(
    ModelConfig(1, 2, 8, 8, vocab_size=2, attention_pattern=("dense", "banded")),
    DataConfig("text.txt", val_fraction=0.2),
    OptimizerConfig(1e-2, lr_decay_steps=7),
    seed=3,
)
RUNTIME = RuntimeConfig("somewhere", eval_interval=3, compute=ComputeConfig("xla", remat=True))
TOKENIZER = '{"kind": "char", "characters": "ab"}'
METADATA = CheckpointMetadata(
    CONFIG, RUNTIME, TOKENIZER, data_fingerprint="f00d", best_val_loss=2.5, val_loss=2.75,
    eval_windows=8, attention="xla", unfinished={"step": 3},
)  # fmt: skip


def params_of(seed):
    return jax.tree.map(jnp.asarray, random_params(CONFIG.model, seed))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """Two checkpoints, the second one without an optimizer state; the first one is better."""
    folder = tmp_path_factory.mktemp("run")
    opt_state = optim.adam_state(CONFIG, jnp.int32(1), params_of(7), params_of(8))
    with Checkpoints(folder, keep=2) as checkpoints:
        for step, loss, arrays in [(1, 1.0, {"opt_state": opt_state}), (2, 2.0, {})]:
            metadata = dataclasses.replace(METADATA, val_loss=loss)
            checkpoints.save(step, {"params": params_of(step)} | arrays, metadata.to_dict())
    return folder


@pytest.fixture
def copied(run_dir, tmp_path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / "copied"))


@pytest.mark.parametrize(
    "metadata", [METADATA, CheckpointMetadata(CONFIG, RuntimeConfig(), TOKENIZER)]
)
def test_metadata_survives_json(metadata):
    text = json.dumps(metadata.to_dict())
    assert CheckpointMetadata.from_dict(json.loads(text), "here") == metadata


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": None}, {"val_loss": "low"}, {"best_val_loss": [1]}, {"more": 1},
        {"experiment": {"model": {"vocab_size": None}}}, {"runtime": {"eval_interval": 0}},
    ],
)  # fmt: skip
def test_metadata_of_another_form_is_refused(change):
    with pytest.raises(UserError, match="here"):
        CheckpointMetadata.from_dict(METADATA.to_dict() | change, "here")
    for name in ("experiment", "runtime", "tokenizer", "best_val_loss", "val_loss"):
        rest = {key: value for key, value in METADATA.to_dict().items() if key != name}
        with pytest.raises(UserError, match="here"):
            CheckpointMetadata.from_dict(rest, "here")


def test_a_setting_from_the_future_is_named():
    fields = METADATA.to_dict()
    fields["experiment"] = fields["experiment"] | {"warp": 9}
    with pytest.raises(UserError, match="here: unknown setting warp") as caught:
        CheckpointMetadata.from_dict(fields, "here")
    assert not isinstance(caught.value, Corrupted)  # so no older one is taken instead


def test_a_checkpoint_is_loaded_with_all_it_has(run_dir):
    best = load_checkpoint(run_dir, "best", optimizer=True)
    assert (best.step, best.metadata) == (1, dataclasses.replace(METADATA, val_loss=1.0))
    assert_bitwise(best.params, params_of(1))
    count, mu, _ = optim.adam_parts(best.opt_state)
    assert int(count) == 1
    assert_bitwise(mu, params_of(7))
    latest = load_checkpoint(run_dir, "latest", optimizer=True)
    assert latest.step == 2 and latest.opt_state is None  # it has none
    assert_bitwise(latest.params, params_of(2))
    assert load_checkpoint(run_dir, "1").opt_state is None  # not asked for


def test_the_newest_metadata_is_read(run_dir, tmp_path):
    assert newest_metadata(run_dir) == dataclasses.replace(METADATA, val_loss=2.0)
    assert newest_metadata(tmp_path) is None
    with Checkpoints(run_dir) as checkpoints:
        assert run_metadata.read(checkpoints, 1).val_loss == 1.0


@pytest.mark.parametrize("damaged", ["metadata", "arrays"])
def test_for_a_damaged_one_the_next_is_used_with_a_warning(copied, capsys, damaged):
    folder = copied / "checkpoints"
    if damaged == "metadata":
        (folder / "2.json").write_text("{")
        assert newest_metadata(copied).val_loss == 1.0
    else:
        shutil.rmtree(folder / "2" / "params")
    assert load_checkpoint(copied, "latest").step == 1
    warning = capsys.readouterr().err.strip()
    assert warning.startswith("warning: ") and "checkpoints/2" in warning
    assert warning.endswith("; using step 1 instead") and "\n" not in warning
    # One that was asked for by its step is not replaced.
    with pytest.raises(Corrupted, match="checkpoints/2"):
        load_checkpoint(copied, "2")


def test_one_that_training_deletes_meanwhile_is_no_damage(copied, capsys, monkeypatch):
    restore = Checkpoints.restore

    def deleted_first(self, step, **targets):
        if step == 2:
            shutil.rmtree(copied / "checkpoints" / "2")
        return restore(self, step, **targets)

    monkeypatch.setattr(Checkpoints, "restore", deleted_first)
    assert load_checkpoint(copied, "latest").step == 1
    assert not capsys.readouterr().err


def test_where_none_is_whole_the_first_problem_is_named(copied):
    for path in (copied / "checkpoints").glob("*.json"):
        path.write_text("{")
    message = r"checkpoints/2 is corrupted.*no checkpoint there is whole: bring the run back from"
    with pytest.raises(Corrupted, match=message):
        load_checkpoint(copied, "latest")
    with pytest.raises(Corrupted, match=message):
        newest_metadata(copied)


# ----------------------------------------------------------------- of the first edition


@pytest.fixture(scope="module")
def first_edition(tmp_path_factory) -> Path:
    """A run that gptjax 0.1 trained on `helpers.TEXT`, with two micro-batches of 8 a step, and
    evaluated over four of them."""
    folder = tmp_path_factory.mktemp("first")
    with tarfile.open(Path(__file__).parent / "data" / "first_edition_run.tar.gz") as archive:
        # Python before 3.11.4 has no filters.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder)
    return folder / "tiny"


def test_metadata_of_the_first_edition(first_edition):
    metadata = newest_metadata(first_edition)
    model = ModelConfig(2, 2, 8, 16, vocab_size=44, dropout=0.1, bias=False)
    assert metadata.config.model == model
    assert metadata.config.optimizer == OptimizerConfig(0.02, min_lr=0.002, warmup_steps=5)
    runtime = metadata.runtime
    assert (runtime.gradient_accumulation_steps, runtime.num_devices) == (2, 8)
    # 32 windows then, and in a run that goes on.
    assert metadata.eval_windows == runtime.eval_windows(metadata.config) == 32
    assert metadata.val_loss == metadata.best_val_loss == 2.9214947289628945
    assert tokenizers.from_json(metadata.tokenizer, "here").n_vocab == 44
    assert metadata.unfinished is None and len(metadata.data_fingerprint) == 64


def test_its_best_loss_compares_with_those_of_this_edition(first_edition, tmp_path):
    run_dir = Path(shutil.copytree(first_edition, tmp_path / "run"))
    with Checkpoints(run_dir, keep=1) as checkpoints:
        saved = run_metadata.read(checkpoints, 40)
        for step, loss in ((41, 3.0), (42, 3.5)):
            metadata = dataclasses.replace(saved, val_loss=loss)
            checkpoints.save(step, {"params": {"wte": jnp.ones(3)}}, metadata.to_dict())
        checkpoints.wait()
        assert checkpoints.candidates("best")[0] == 40
    with Checkpoints(run_dir) as checkpoints:
        assert checkpoints.steps == [40, 42]


# -------------------------------------------------------------------------------- damage


def check(path: Path):
    """What reads a checkpoint's metadata works with what it has read."""
    found = newest_metadata(path.parents[1])
    with contextlib.suppress(UserError):
        tokenizers.from_json(found.tokenizer, "here")
    assert found.config.model.padded_vocab_size and f"{found.best_val_loss or 0:.4f}"
    return found


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(drawn=st.data())
@pytest.mark.parametrize("signed", [False, True])
def test_damaged_metadata_is_whole_or_refused(tmp_path, drawn, signed):
    """Signed: as if another version had written it."""
    record = {"metadata": METADATA.to_dict(), "digests": {}}

    def sign(record):
        text = json.dumps({k: v for k, v in record.items() if k != "sha256"}, sort_keys=True)
        return record | {"sha256": hashlib.sha256(text.encode()).hexdigest()}

    path = tmp_path / "run" / "checkpoints" / "3.json"
    (path.parent / "3").mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(sign(record)))
    assert check(path) == METADATA
    path.write_bytes(drawn.draw(fuzz.damaged(path.read_bytes())))
    if signed:
        with contextlib.suppress(Exception):
            path.write_text(json.dumps(sign(json.loads(path.read_bytes()))))
    found = fuzz.read_or_refuse(lambda: check(path), "checkpoints/3")
    assert found is None or signed or found == METADATA


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(drawn=st.data())
def test_a_damaged_config_json_is_read_or_refused(tmp_path, drawn):
    path = tmp_path / "config.json"
    path.write_bytes(
        drawn.draw(fuzz.damaged(config_io.run_settings_json(CONFIG, RUNTIME).encode()))
    )
    found = fuzz.read_or_refuse(
        lambda: config_io.run_settings(files.read_json(path), str(path)), path
    )
    assert found is None or isinstance(found[0].model.n_layer, int)


def test_old_metadata_that_was_changed_is_corrupted(first_edition, tmp_path):
    run_dir = Path(shutil.copytree(first_edition, tmp_path / "run"))
    path = run_dir / "checkpoints" / "40" / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"dropout": 0.1', '"dropout": 0.2'))
    with pytest.raises(Corrupted, match="checkpoints/40 is corrupted: its metadata has changed"):
        read_record(run_dir / "checkpoints", 40)
    path.unlink()
    with pytest.raises(Corrupted, match=r"cannot read .*checkpoints/40: No such file"):
        read_record(run_dir / "checkpoints", 40)
    assert np.isfinite(newest_metadata(first_edition).val_loss)
