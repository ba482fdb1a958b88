"""The training command, run as a user runs it: real processes, killed for real."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHAKESPEARE, assert_one_clear_line, command_environment
from runs import TINY, TRAIN, assert_same_run, final_state, logged, start, wait_for

from gptjax import checkpoint, state_dict, torch_gpt
from gptjax.checkpoint import Checkpoints

# -------------------------------------------------------------------------- what it shows


def test_a_run_prepares_trains_evaluates_saves_and_prints_a_sample(uninterrupted):
    run_dir, result = uninterrupted
    out = result.stdout
    assert not result.stderr, "warnings on start-up are defects"
    for words in ("prepared", "2 x cpu", "attention  xla", "compiled and took the first step in",
                  "step 40/40 | loss", "MFU unknown", "step 40: validation loss", "a sample:",
                  "python generate_jax.py --run-dir run"):  # fmt: skip
        assert words in out
    rows = logged(run_dir)
    assert [row["step"] for row in rows] == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert [row["step"] for row in rows if row["val_loss"]] == [0, 10, 20, 30, 40]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    assert 3.5 < rows[0]["val_loss"] < 4.2  # ln of the vocabulary of about 45
    assert all(np.isfinite(row["grad_norm"]) for row in rows[1:])
    assert "batch      8 x 16 = 128 tokens per step" in out


def test_a_run_without_its_settings_file_goes_on_and_a_damaged_one_is_named(
    uninterrupted, tmp_path, command
):
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"max_steps": 6,}')
    result = command(TRAIN, "--run-dir", "run")
    assert_one_clear_line(result, "run/config.json is not valid JSON", "or delete run/config.json")
    (tmp_path / "run" / "config.json").unlink()
    result = command(TRAIN, "--run-dir", "run")
    assert result.returncode == 0 and "complete at step 40" in result.stdout


def test_the_exact_validation_loss_is_pytorchs_over_the_whole_split(uninterrupted):
    run_dir, _ = uninterrupted
    _, facts, params, _ = checkpoint.load(run_dir, "40")
    config = facts.config
    tensors = state_dict.to_torch(params, config.model, "out_in")
    theirs = torch_gpt.from_state_dict(config.model, tensors)
    val = np.fromfile(Path(config.data.dir) / "val.bin", "<u2").astype(np.int64)
    total = 0.0
    for at in range(0, len(val) - 1, 16):
        window = torch.from_numpy(val[at : at + 17])[None]
        with torch.no_grad():
            loss = torch_gpt.cross_entropy(theirs(window[:, :-1]), window[:, 1:])
        total += loss.item() * (window.shape[1] - 1)
    assert logged(run_dir)[-1]["val_loss"] == pytest.approx(total / (len(val) - 1), rel=1e-6)


def test_hundreds_of_evaluation_steps_on_two_devices_do_not_starve_each_other(command, text_file):
    flags = "--data.val-fraction 0.95 --max-steps 1 --batch-size 2 --sample-tokens 0"
    result = command(TRAIN, *TINY, "--run-dir", "run", *flags.split())
    assert result.returncode == 0, result.stderr
    assert "step 1: validation loss" in result.stdout


def test_the_same_command_again_finds_the_run_complete(uninterrupted, cache_dir):
    run_dir, _ = uninterrupted
    before = logged(run_dir)
    result = subprocess.run(
        [sys.executable, TRAIN, "--run-dir", "run"], cwd=run_dir.parent,
        env=command_environment(cache_dir), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0 and "complete at step 40" in result.stdout
    assert logged(run_dir) == before


# ------------------------------------------------------------------------------ resuming


def test_killed_and_resumed_equals_uninterrupted_bitwise(
    uninterrupted, tmp_path, text_file, cache_dir, command
):
    process = start(tmp_path, cache_dir, *TINY, "--run-dir", "run")
    wait_for(process, "step 25/40")
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_at = [row["step"] for row in logged(tmp_path / "run")][-1]
    assert killed_at < 40
    result = command(TRAIN, "--run-dir", "run")
    assert result.returncode == 0, result.stderr
    assert re.search(r"resumed at step (10|20|30)", result.stdout)
    assert_same_run(uninterrupted[0], tmp_path / "run")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_signal_saves_says_how_to_resume_and_loses_nothing(
    uninterrupted, tmp_path, text_file, cache_dir, command, number, code
):
    process = start(tmp_path, cache_dir, *TINY, "--run-dir", "run")
    wait_for(process, "step 15/40")
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    saved = int(re.search(r"saved step (\d+)\. Resume: python train_jax.py --run-dir run", out)[1])
    assert 15 <= saved < 40
    result = command(TRAIN, "--run-dir", "run")
    assert result.returncode == 0 and f"resumed at step {saved}" in result.stdout
    assert_same_run(uninterrupted[0], tmp_path / "run")


def test_a_resume_with_other_settings_is_refused_with_both_values(uninterrupted, cache_dir):
    run_dir, _ = uninterrupted

    def resume(*flags):
        return subprocess.run(
            [sys.executable, TRAIN, "--run-dir", "run", *flags], cwd=run_dir.parent,
            env=command_environment(cache_dir), capture_output=True, text=True,
        )  # fmt: skip

    before = final_state(run_dir)
    assert_one_clear_line(
        resume("--learning-rate", "0.5", "--model.n-layer", "3", "--data.source", "other.txt"),
        "model.n_layer: 2 in the run, 3 now", "learning_rate: 0.002 in the run, 0.5 now",
        "data.source: 'text.txt' in the run, 'other.txt' now",
    )  # fmt: skip
    assert all(map(np.array_equal, before, final_state(run_dir)))


def test_another_text_is_noticed_by_its_fingerprint(uninterrupted, tmp_path, cache_dir, command):
    run_dir, _ = uninterrupted
    shutil.copytree(run_dir, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    shutil.copytree(config["data"]["dir"], tmp_path / "set")
    tokens = np.fromfile(tmp_path / "set" / "train.bin", "<u2")
    tokens[100] = (tokens[100] + 1) % 10
    tokens.tofile(tmp_path / "set" / "train.bin")
    result = command(TRAIN, "--run-dir", "run", "--data.dir", "set")
    assert_one_clear_line(result, "the tokens: fingerprint", "in the run", "set now")


# ----------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model.n-layr 4", ["--model.n-layr", "perhaps --model.n-layer"]),
        ("--max-steps many", ["--max-steps", "'many'"]),
        (
            "--model.n-head 3 --batch-size 0 --sed 1",
            ["n_embd 16", "n_head 3", "batch_size 0", "--sed", "perhaps --seed"],
        ),
        ("--batch-size 9", ["batch_size 9 does not divide over 2 device(s)", "use 8 or 10"]),
        ("--model.block-size 100000", ["has", "tokens, but one block needs 100001"]),
        ("--model.vocab-size 5", ["model.vocab_size 5 is not the"]),
        ("--model.vocab-size 50304", ["--model.vocab-multiple 64"]),
        ("--device gpu", ["--device gpu: JAX finds no gpu here"]),
        ("--data.source nope.txt", ["no text at 'nope.txt'"]),
        ("--data.dir nope", ["no folder nope"]),
        ("--data.source=", ["data.source is empty"]),
        ("--run-dir text.txt", ["text.txt is a file; expected a folder"]),
        ("--num-devices 1000000000", ["num_devices 1000000000 must be at most"]),
        ("--model.attention cudnn", ["cudnn does not fit here", "needs an NVIDIA GPU"]),
        ("--data.tokenizer sentencepiece --data.sentencepiece-vocab-size 99", ["99 pieces"]),
    ],
)
def test_bad_input_is_one_clear_line(command, text_file, tmp_path, flags, words):
    run_dir = [] if "--run-dir" in flags else ["--run-dir", "run"]
    result = command(TRAIN, *TINY, *run_dir, *flags.split())
    assert_one_clear_line(result, *words)
    assert not (tmp_path / "run").exists()


def test_a_non_finite_loss_stops_names_the_step_and_keeps_the_last_good_checkpoint(
    command, text_file, tmp_path
):
    # The rate rises until the weights overflow; every step is saved, few are evaluated.
    flags = "--learning-rate 1e36 --min-lr 0 --grad-clip 0 --warmup-steps 39 --save-interval 1"
    result = command(TRAIN, *TINY, "--run-dir", "wild", *flags.split())
    assert_one_clear_line(result, "became", "in another --run-dir", code=1)
    bad = int(re.search(r"at step (\d+)", result.stderr)[1]) if "at step" in result.stderr else 40
    with Checkpoints(tmp_path / "wild") as checkpoints:
        step = checkpoints.latest_step
    if step is not None:
        assert step < bad and f"step {step} is saved" in result.stderr
        assert all(np.isfinite(x).all() for x in final_state(tmp_path / "wild", step))


def test_a_full_disk_is_one_clear_line_and_the_last_checkpoint_survives(
    uninterrupted, tmp_path, text_file, command
):
    """A real limit on file size stands in for a full disk: every write past it fails."""
    limited = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.argv.pop(0);"
        "sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0]);"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    data_dir = json.loads((uninterrupted[0] / "config.json").read_text())["data"]["dir"]
    result = command("-c", limited, TRAIN, *TINY, "--run-dir", "run", "--data.dir", data_dir)
    assert_one_clear_line(result, "cannot save a checkpoint", code=1)


# ------------------------------------------------------------------------------ settings


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="Tiny Shakespeare is not on this machine")
def test_the_large_shakespeare_setting_takes_a_step_on_the_cpu(command, tmp_path):
    config = ROOT / "configs" / "shakespeare_char.py"
    few = "--max-steps 2 --eval-batches 1 --eval-full-split False --sample-tokens 0 --batch-size 4"
    result = command(TRAIN, config, *few.split(), GPTJAX_CACHE_DIR=str(SHAKESPEARE.parent))
    assert result.returncode == 0, result.stderr
    assert "step 2/2" in result.stdout
    assert os.listdir(tmp_path / "runs") == ["shakespeare_char"]


def test_a_run_resumed_from_its_config_file_reads_its_text_once(command, tmp_path, text_file):
    (tmp_path / "mine.py").write_text(
        "from gptjax.config import DataConfig, ModelConfig, TrainConfig\n"
        "config = TrainConfig(model=ModelConfig(1, 2, 8, 16), data=DataConfig('text.txt'),"
        " batch_size=2, max_steps=2, sample_tokens=0)\n"
    )
    for said in ("(new)", "complete at step 2"):
        result = command(TRAIN, "mine.py")
        assert result.returncode == 0 and said in result.stdout, result.stderr
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_another_origin_than_the_runs_own_is_refused(command, tmp_path, text_file):
    flags = "--data.source text.txt --batch-size 2 --max-steps 2 --sample-tokens 0".split()
    sizes = "--model.n-layer 1 --model.n-head 2 --model.n-embd 8 --model.block-size 16".split()
    for name in ("a", "b"):
        assert command(TRAIN, *flags, *sizes, "--run-dir", name).returncode == 0
    started = command(TRAIN, *flags, "--init-from", "a", "--run-dir", "tuned")
    assert started.returncode == 0 and f"from {tmp_path / 'a'}" in started.stdout, started.stderr
    again = command(TRAIN, *flags, "--init-from", "b", "--run-dir", "tuned")
    assert_one_clear_line(again, "init_from", str(tmp_path / "a"), str(tmp_path / "b"))
    shutil.rmtree(tmp_path / "a")  # a run needs its origin no more once it has begun
    assert "complete at step 2" in command(TRAIN, "--run-dir", "tuned").stdout
