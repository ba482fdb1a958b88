"""Weights & Biases, offline: what its record files say."""

import helpers
import pytest
from tracker_records import history_steps, read_wandb

from gptjax.trackers import wandb

pytest.importorskip("wandb", reason="it is an extra")
pytestmark = pytest.mark.slow  # it starts a process


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "elsewhere"))


def test_a_run_is_recorded_in_its_folder(tracked, tmp_path):
    (said,) = tracked("wandb", tmp_path / "run", watch=6)
    assert said.startswith(f"wandb      wandb sync {tmp_path}/run/wandb/offline-run-")
    rows, ids, settings = read_wandb(tmp_path / "run")
    logged = helpers.logged(tmp_path / "run")
    assert [row["_step"] for row in rows] == [row["step"] for row in logged]
    for name in ("train_loss", "val_loss", "learning_rate", "grad_norm"):
        assert [row.get(name) for row in rows] == [row[name] for row in logged]
    assert len(ids) == 1 and settings["model.n_embd"] == 16
    assert [row["_step"] for row in rows if "sample/_type" in row] == [4, 8, 12]
    assert [row["_step"] for row in rows if "gradients/all/_type" in row] == [6, 12]
    assert len([*(tmp_path / "run").glob("wandb/offline-*/files/media/html/*.html")]) == 3


def test_a_resumed_run_goes_on_in_its_record_without_repeating_a_step(tracked, tmp_path):
    tracked("wandb", tmp_path / "whole")
    tracked("wandb", tmp_path / "run", crash=True)
    assert [row["_step"] for row in read_wandb(tmp_path / "run")[0]] == [*range(7)]
    tracked("wandb", tmp_path / "run")
    (rows, ids, _), (expected, _, _) = read_wandb(tmp_path / "run"), read_wandb(tmp_path / "whole")
    assert len(ids) == 1
    for name in ("_step", "train_loss", "val_loss", "grad_norm"):
        assert [row.get(name) for row in rows] == [row.get(name) for row in expected]


def test_a_file_that_a_kill_has_cut_has_the_steps_that_are_whole(tracked, tmp_path):
    tracked("wandb", tmp_path / "run", watch=6)
    (path,) = (tmp_path / "run").glob("wandb/offline-*/*.wandb")
    content, cut = path.read_bytes(), tmp_path / "cut"
    seen = set()
    for length in range(7, len(content), 37):
        cut.write_bytes(content[:length])
        found = [*wandb.steps(content[:length])]
        assert found == history_steps(cut)
        seen.add(len(found))
    assert seen == {*range(14)}


def test_without_a_login_it_records_and_asks_nothing(tracked, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (said,) = tracked("wandb", tmp_path / "run")
    assert "wandb sync" in said
    assert len(read_wandb(tmp_path / "run")[0]) == 13
