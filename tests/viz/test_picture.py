"""Loss curves: real pictures of the right points, or one clear line."""

import json

import pytest

from gptjax.errors import RunError, UserError
from gptjax.viz import picture

pytest.importorskip("matplotlib", reason="drawing needs matplotlib")


@pytest.fixture
def run_dir(tmp_path):
    rows = [{"step": s, "train_loss": 4 / (s + 1), "val_loss": None} for s in range(1, 50)]
    rows[10]["val_loss"] = 3.0
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_a_run_is_drawn_in_the_format_of_the_name(run_dir):
    picture.draw([run_dir], run_dir / "loss.png")
    drawn = (run_dir / "loss.png").read_bytes()
    assert drawn.startswith(b"\x89PNG") and len(drawn) > 5000
    picture.draw([run_dir, run_dir], run_dir / "both.svg")
    assert "<svg" in (run_dir / "both.svg").read_text()


def test_numbers_that_are_none_are_left_out(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as log:
        log.write('\n{"step": 50, "train_loss": NaN, "val_loss": Infinity}\n')
    picture.draw([run_dir], run_dir / "loss.svg")
    assert "<svg" in (run_dir / "loss.svg").read_text()


def test_what_cannot_be_drawn_is_one_clear_line(run_dir):
    for out, words in (("x.foo", "cannot draw .*x.foo"), ("..", "it is a folder")):
        with pytest.raises(UserError, match=words):
            picture.draw([run_dir], run_dir / out)
    with pytest.raises(RunError, match=r"cannot write .*: No such file"):
        picture.draw([run_dir], run_dir / "nope" / "x.png")
    with pytest.raises(UserError, match=r"nope/metrics\.jsonl"):
        picture.draw([run_dir / "nope"], run_dir / "x.png")
    (run_dir / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no losses yet"):
        picture.draw([run_dir], run_dir / "x.png")
