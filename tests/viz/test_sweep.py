"""The picture of a sweep: which points it has, and how they are marked."""

import pytest

from gptjax.errors import RunError
from gptjax.sweep import Result
from gptjax.viz import sweep

figure = pytest.importorskip("matplotlib.figure", reason="drawing needs matplotlib")

RESULTS = [
    Result("1e-3", None, 2.5, 2.5),
    Result("1e-1", None, 3.0, 2.75),
    Result("1e-2", None, 2.0, 2.0),
    Result("1", None, None, 3.5, "nan"),
]


@pytest.fixture
def axes(monkeypatch):
    """Of the last picture."""
    drawn = []
    original = figure.Figure.add_subplot
    monkeypatch.setattr(
        figure.Figure,
        "add_subplot",
        lambda *args, **options: drawn.append(original(*args, **options)) or drawn[-1],
    )
    return drawn


def test_losses_stand_over_their_values(axes, tmp_path):
    sweep.draw("learning_rate", RESULTS, tmp_path / "s.svg")
    lines = {line.get_label(): line for line in axes[0].lines}
    assert [*lines["final"].get_xdata()] == [1e-3, 1e-2, 1e-1]
    assert [*lines["final"].get_ydata()] == [2.5, 2.0, 3.0]
    assert [*lines["best"].get_ydata()] == [2.5, 2.0, 2.75, 3.5]
    assert [*lines["best: 1e-2"].get_xydata()[0]] == [1e-2, 2.0]
    assert {*lines["diverged"].get_xdata()} == {1.0}
    assert (axes[0].get_xscale(), axes[0].get_xlabel()) == ("log", "learning_rate")
    assert "<svg" in (tmp_path / "s.svg").read_text()


def test_values_with_a_zero_have_no_log_axis(axes, tmp_path):
    results = [Result("0", None, 2.0, 2.0), Result("0.1", None, 1.0, 1.0)]
    sweep.draw("dropout", results, tmp_path / "s.png")
    assert axes[0].get_xscale() == "linear"


def test_a_picture_that_cannot_be_written_is_one_clear_line(tmp_path):
    with pytest.raises(RunError, match=r"cannot write .*gone/s\.png: No such file"):
        sweep.draw("dropout", RESULTS, tmp_path / "gone" / "s.png")
