"""gptjax sweep: a run for each value, and once."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import helpers
import pytest

from gptjax.errors import UserError

FLAGS = (
    "--data text.txt --n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 8 --max-steps"
    " 6 --eval-interval 2 --log-interval 1 --eval-batches 2 --optimizer adamw --warmup-steps 1"
    " --min-lr 1e-4 --grad-clip 0"
).split()
RATES = ("--learning-rate", "1e-3,1e-1,1e37")
FOLDER = "runs/sweeps/quickstart"


@pytest.fixture(scope="module")
def swept(tmp_path_factory, gptjax_in):
    """(the folder, what the command printed); the last rate diverges."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "text.txt").write_text(helpers.TEXT)
    return folder, gptjax_in(folder, "sweep", *FLAGS, *RATES)


@pytest.fixture
def copy(swept, tmp_path):
    shutil.copytree(swept[0], tmp_path, dirs_exist_ok=True)
    return tmp_path / FOLDER


def table(out):
    """{value: the other cells}, in order."""
    lines = out[out.index("learning_rate  final loss") :].split("\n")[1:4]
    return {line.split()[0]: line.split()[1:] for line in lines}


def test_each_value_is_a_run_and_the_table_has_their_losses(swept):
    folder, out = swept
    assert sorted(os.listdir(folder / FOLDER)) == [
        "learning_rate=1e-1", "learning_rate=1e-3", "learning_rate=1e37", "sweep.png",
    ]  # fmt: skip
    found = table(out)
    assert [*found] == ["1e-3", "1e-1", "1e37"]
    for value in ("1e-3", "1e-1"):
        run_dir = folder / FOLDER / f"learning_rate={value}"
        rows = helpers.logged(run_dir)
        losses = [row["val_loss"] for row in rows if row["step"] and row["val_loss"]]
        assert found[value][:2] == [f"{losses[-1]:.4f}", f"{min(losses):.4f}"]
        saved = json.loads((run_dir / "config.json").read_text())["experiment"]
        assert saved["optimizer"]["learning_rate"] == float(value) and rows[-1]["step"] == 6
    assert found["1e37"] == ["-", "-", "diverged"] and "diverged: " in out
    best = min(("1e-3", "1e-1"), key=lambda value: float(found[value][0]))
    assert found[best][2:] == ["best"]


def test_the_picture_is_one(swept):
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    assert f"drew {FOLDER}/sweep.png" in swept[1]
    assert (swept[0] / FOLDER / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_run_s_command_runs(copy, swept, gptjax):
    (line,) = [line for line in swept[1].split("\n") if line.startswith("best: ")]
    words = shlex.split(line.removeprefix("best: gptjax "))
    assert "this run is complete at step 6" in gptjax(*words)


def test_a_sweep_begun_again_takes_no_step(copy, swept, gptjax):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("metrics.jsonl")}
    out = gptjax("sweep", *FLAGS, *RATES)
    assert table(out) == table(swept[1])
    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("metrics.jsonl")}
    # Another value is one more run; other settings would be other experiments.
    out = gptjax("sweep", *FLAGS, "--learning-rate=1e-3,1e-2")
    assert out.count("compiled and took") == 1
    with pytest.raises(UserError, match="holds a run with other settings; seed: 1337"):
        gptjax("sweep", *FLAGS, *RATES, "--seed", "3")


def test_a_run_that_is_not_over_is_finished(copy, swept, gptjax):
    (copy / "learning_rate=1e-1" / "sweep.json").unlink()
    assert table(gptjax("sweep", *FLAGS, *RATES)) == table(swept[1])
    out = gptjax("sweep", *FLAGS, "--max-steps", "8", "--learning-rate", "1e-3,1e-1")
    assert out.count("resumed at step 6") == 2


def test_without_matplotlib_there_is_no_picture_and_no_failure(copy, gptjax, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "note: no picture: drawing needs matplotlib" in gptjax("sweep", *FLAGS, *RATES)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "over one setting, not 0; give it a range"),
        ("--learning-rate 1,2 --dropout 0,0.1", "over one setting, not 2"),
        ("--learning-rate 0..1", "0..1: a range takes two different numbers above 0"),
        ("--learning-rate 1..2 --points 1", "points 1 must be at least 2"),
        ("--learning-rat 1,2", "unknown flag --learning-rat; did you mean --learning-rate"),
        ("--n-layer 1,1.5", "--n-layer '1.5': expected a whole number"),
        ("--n-layer 1..2.5", "--n-layer '2.5': expected a whole number"),
        ("--bias 1,0", "--bias"),
        ("--eval-interval 1,2", "unknown flag --eval-interval"),
        ("--dropout 0.1,2", "dropout 2.0 is outside"),
        ("--learning-rate 1e-5,1e-3 --min-lr 1e-4", "min_lr 0.0001 is above learning_rate 1e-05"),
        ("--dropout 0,0.1 --dry-run", "about one run; use train"),
        ("--dropout 0,0.1 --nonsense 1", "unknown flag --nonsense"),
        ("--dropout 0,0.1 --run-dir run", "run is a run; name another folder"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_begun(gptjax, tmp_path, argv, words):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        gptjax("sweep", *argv.split())
    assert words in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_ctrl_c_stops_a_sweep_that_goes_on_later(swept, tmp_path, cache_dir, text_file, gptjax):
    flags = [*FLAGS, "--max-steps", "3000", "--eval-interval", "3000", "--save-interval", "1000"]
    argv = ["sweep", *flags, "--seed", "1,2", "--learning-rate", "1e-2"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "gptjax", *argv], cwd=tmp_path, text=True,
        env=helpers.command_environment(cache_dir), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    helpers.wait_for(process, "step 20/3000")
    process.send_signal(signal.SIGINT)
    result = helpers.finish(process)
    assert result.returncode == 130 and "stopped; the same command goes on" in result.stdout
    again = subprocess.run(
        [sys.executable, "-m", "gptjax", *argv], cwd=tmp_path, text=True, capture_output=True,
        env=helpers.command_environment(cache_dir),
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("resumed at step") == 1 and again.stdout.count("(new)") == 1
    assert "final loss" in again.stdout
