"""`bench race`: both sides train by the same settings, and their losses mean the same."""

import json

import pytest

from benchmarks import race
from gptjax.errors import UserError


def test_ratios_are_to_the_first_recipe():
    slow, fast = ([{"seconds": s, "loss": 2.0 + s / 100} for s in x] for x in ((9, 20, 30), (3, 4)))
    lines = race.table({"slow": slow, "fast": fast})
    assert lines[1].split() == ["slow", "20.0", "1.00x", "2.1967", "2.0900,", "2.2000,", "2.3000"]
    assert lines[2].split()[1:4] == ["3.5", "5.71x", "2.0350"]


def test_recipes_that_are_not_there_are_refused():
    with pytest.raises(
        UserError, match="no recipe contains 'zzz'; there are nanoGPT's, PyTorch; nanoGPT's; "
    ):
        race.main(["--only", "zzz"], "bench race")
    with pytest.raises(UserError, match="seeds"):
        race.main(["--seeds", "0"], "bench race")


@pytest.mark.slow
@pytest.mark.long
def test_both_sides_learn_the_same(monkeypatch, tmp_path, capsys):
    pytest.importorskip("torch", reason="needs PyTorch")
    short = f"{race.FAST} --max-steps 60 --eval-interval 30"
    monkeypatch.setattr(race, "RECIPES", {"a": ("torch", short), "b": ("gptjax", short)})
    race.main(["--seeds", "1", "--json", str(tmp_path / "report.json")], "bench race")
    assert "seed 1: a: " in capsys.readouterr().out
    # What a report would be lost by is told before anything is trained.
    with pytest.raises(OSError):
        race.main(["--json", str(tmp_path / "no" / "report.json")], "bench race")
    found = json.loads((tmp_path / "report.json").read_text())["recipes"]
    (a,), (b,) = found.values()
    # Sixty steps with other first weights and batches; the unigrams of Shakespeare are 3.3.
    assert 2.0 < a["loss"] < 2.6 and a["loss"] == pytest.approx(b["loss"], abs=0.1)
