"""Event files, read by TensorBoard's own reader."""

import helpers
import numpy as np
import pytest
from tracker_records import read_tensorboard

pytest.importorskip("tensorboardX", reason="it is an extra")
pytest.importorskip("tensorboard", reason="it reads event files")


def test_losses_samples_settings_and_norms_are_there(tracked, tmp_path):
    said = tracked("tensorboard", tmp_path / "run", watch=6)
    assert said == [f"tensorboard tensorboard --logdir {tmp_path}/run/tensorboard"]
    numbers, texts, histograms = read_tensorboard(tmp_path / "run")
    rows = helpers.logged(tmp_path / "run")
    for name in ("train_loss", "val_loss", "learning_rate", "grad_norm"):
        expected = [(row["step"], np.float32(row[name])) for row in rows if row[name] is not None]
        assert numbers[name] == expected
    assert [step for step, _ in numbers["gradients/h.0.attn.c_attn.kernel"]] == [6, 12]
    assert {*histograms} == {"gradients/all", "parameters/all"}
    ((_, settings),) = texts["settings/text_summary"]
    assert "    model.n_embd = 16\n" in settings and "    optimizer.kind = 'adamw'\n" in settings
    samples = texts["sample/text_summary"]
    assert [step for step, _ in samples] == [4, 8, 12]
    assert all(text.startswith("    ") for _, text in samples)


@pytest.mark.slow
def test_steps_that_a_crash_lost_are_there_once(tracked, tmp_path):
    tracked("tensorboard", tmp_path / "whole")
    tracked("tensorboard", tmp_path / "run", crash=True)
    assert [step for step, _ in read_tensorboard(tmp_path / "run")[0]["train_loss"]] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    tracked("tensorboard", tmp_path / "run")
    (numbers, texts, _), (expected, expected_texts, _) = map(
        read_tensorboard, (tmp_path / "run", tmp_path / "whole")
    )
    for name in ("train_loss", "val_loss", "grad_norm"):
        assert numbers[name] == expected[name]
    assert [step for step, _ in numbers["train_loss"]] == [*range(1, 13)]
    assert texts["sample/text_summary"] == expected_texts["sample/text_summary"]
    assert [step for step, _ in texts["settings/text_summary"]] == [0]
