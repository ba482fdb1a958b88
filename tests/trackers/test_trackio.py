"""Trackio's database, read by SQL."""

import helpers
import pytest
from tracker_records import column, read_trackio


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where trackio keeps its records; it learns that as it is imported."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        pytest.importorskip("trackio", reason="it is an extra")
        yield folder


def test_a_run_is_recorded(tracked, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_PROJECT", "first")
    assert tracked("trackio", tmp_path / "run", watch=6) == []
    runs, configs = read_trackio(folder, "first")
    ((name, rows),) = runs.items()
    assert name.startswith("run-") and configs[name]["model.n_embd"] == 16
    logged = helpers.logged(tmp_path / "run")
    for each in ("train_loss", "val_loss", "learning_rate", "grad_norm"):
        expected = [(row["step"], row[each]) for row in logged if row[each] is not None]
        assert column(rows, each) == expected
    assert [step for step, _ in column(rows, "sample")] == [4, 8, 12]
    assert [step for step, _ in column(rows, "gradients/all")] == [6, 12]


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_its_record_without_repeating_a_step(
    tracked, folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRACKIO_PROJECT", "second")
    tracked("trackio", tmp_path / "whole")
    tracked("trackio", tmp_path / "run", crash=True)
    tracked("trackio", tmp_path / "run")
    runs, _ = read_trackio(folder, "second")
    ours, expected = ([rows for name, rows in runs.items() if name.startswith(start)]
                      for start in ("run-", "whole-"))  # fmt: skip
    assert len(ours) == len(expected) == 1
    for name in ("train_loss", "val_loss", "grad_norm"):
        assert column(ours[0], name) == column(expected[0], name)
