"""Values of a sweep, its table, and what is kept of a run that is over."""

import numpy as np
import pytest

from gptjax import sweep
from gptjax.config import TrainConfig
from gptjax.errors import UserError
from gptjax.sweep import Result


def result(value, final, best=None, diverged=None):
    return Result(value, None, final, final if best is None else best, diverged)


@pytest.mark.parametrize(
    ("text", "points", "expected"),
    [
        ("1e-4..1e-2", 5, ["1e-4", "0.000316", "0.001", "0.00316", "1e-2"]),
        ("1e-2..1e-4", 3, ["1e-2", "0.001", "1e-4"]),
        ("0.0012345..0.12345", 3, ["0.0012345", "0.0123", "0.12345"]),
        ("1..2", 3, ["1", "1.41", "2"]),
        ("1e-3..1.01e-3", 5, ["1e-3", "1.01e-3"]),
        ("1e-3,3e-3", 5, ["1e-3", "3e-3"]),
        ("0,0.1,0.1,.2", 5, ["0", "0.1", ".2"]),
        ("-1,1", 5, ["-1", "1"]),
        ("0.5..2", 3, ["0.5", "1", "2"]),
    ],
)
def test_values_are_a_list_or_a_range(text, points, expected):
    assert sweep.values(text, points, whole=False) == expected


def test_whole_numbers_stay_whole():
    assert sweep.values("2..8", 3, whole=True) == ["2", "4", "8"]
    assert sweep.values("1..3", 9, whole=True) == ["1", "2", "3"]


def test_a_range_has_equal_ratios():
    found = np.array([float(x) for x in sweep.values("3e-5..0.7", 7, whole=False)])
    np.testing.assert_allclose(found, np.geomspace(3e-5, 0.7, 7), rtol=5e-3)


@pytest.mark.parametrize("text", ["0..1", "1..1", "-1..1", "1e-999..1", "1..1e999"])
def test_a_range_without_ratios_is_refused(text):
    with pytest.raises(UserError, match=r"a range takes two different numbers above 0.*or list"):
        sweep.values(text, 3, whole=False)


@pytest.mark.parametrize("text", ["1", "1..", "..", "1,", "a..b", "10:15", "1,a", "1..2..3", ""])
def test_what_is_neither_does_not_match(text):
    assert not sweep.VALUES.fullmatch(text)


def test_the_table_marks_the_best_and_what_diverged():
    results = [result("0.1", 2.5), result("1", 2.0, 1.75), result("10", None, 3.0, "nan at step 3")]
    assert sweep.table("learning_rate", results) == [
        "learning_rate  final loss  best loss",
        "          0.1      2.5000     2.5000",
        "            1      2.0000     1.7500  best",
        "           10           -     3.0000  diverged",
    ]


def test_a_best_value_at_an_end_is_told():
    low, middle, high = result("0.2", 2.0), result("1", 1.0), result("10", 3.0)
    assert sweep.at_an_end([low, middle, high]) is None
    assert sweep.at_an_end([high, low]) == (
        "the best value, 0.2, is the smallest that was tried: smaller ones may be better"
    )
    assert "1, is the largest that was tried: larger" in sweep.at_an_end([low, middle])
    assert sweep.at_an_end([middle]) is None
    assert sweep.at_an_end([result("1", None, diverged="nan"), result("2", None)]) is None


def test_a_result_is_known_for_the_same_settings_only(tmp_path):
    config = TrainConfig(max_steps=10)
    assert sweep.recorded("1", tmp_path, config) is None
    made = sweep.record("1", tmp_path, config, [2.0, 1.0, 1.5], None)
    assert (made.final, made.best, made.diverged) == (1.5, 1.0, None)
    assert sweep.recorded("1", tmp_path, config) == made
    assert sweep.recorded("1", tmp_path, config.replace(max_steps=11)) is None
    made = sweep.record("1", tmp_path, config, [2.0], "train_loss became nan at step 3")
    assert (made.final, made.best) == (None, 2.0)
    assert sweep.recorded("1", tmp_path, config) == made and sweep.best([made]) is None
