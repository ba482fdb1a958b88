"""gptjax train: which settings count, and what a user sees. (`test_faults` has what can happen.)"""

import contextlib
import json
import os
import re
import shutil
import signal

import helpers
import numpy as np
import pytest
import tokenizers as hf

from gptjax import config_io, run, run_metadata
from gptjax.checkpoint import Checkpoints
from gptjax.commands import train
from gptjax.config import FINETUNE
from gptjax.errors import UserError


def settings(folder, *argv):
    """(config, runtime, tokenizer) that a command line in `folder` comes to."""
    with contextlib.chdir(folder):
        return train.read_settings([str(x) for x in argv], "gptjax train")[:3]


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the run and its text, in `tmp_path`."""
    shutil.copytree(trained[0].parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def test_a_run_that_has_lost_its_checkpoints_never_begins_anew(copy, gptjax):
    shutil.rmtree(copy / "checkpoints")
    before = {name: (copy / name).read_bytes() for name in ("config.json", "metrics.jsonl")}
    with pytest.raises(UserError, match=r"run has been trained to step 30, .* no checkpoint"):
        gptjax("train", "--run-dir", "run", "--sample-tokens", 0)
    assert before == {name: (copy / name).read_bytes() for name in before}
    # One that was killed before its first checkpoint does, and says so.
    (copy / "metrics.jsonl").unlink()
    out = gptjax("train", "--run-dir", "run", "--sample-tokens", 0)
    assert "note: run has no checkpoint yet; it begins anew" in out


def test_a_run_says_what_it_does_and_how_to_go_on(trained):
    run_dir, out = trained
    for words in (
        "prepared 2", "run        run (new)", "8 x cpu", "attention  xla", "8 x 16 = 128 tokens",
        "compiled and took the first step in", "step 30/30 | loss", " left | lr ",
        "step 30: validation loss", "(best)", "more samples: ",
    ):  # fmt: skip
        assert words in out
    rows = helpers.logged(run_dir)
    assert [row["step"] for row in rows] == [0, 10, 20, 30]
    assert [row["step"] for row in rows if row["val_loss"]] == [0, 20, 30]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]


def test_a_run_that_is_named_again_is_complete(copy, gptjax):
    for argv in (["run"], ["--run-dir", "run"], ["--run-dir=run", "--n-layer", "1"]):
        assert "this run is complete at step 30" in gptjax("train", *argv)


def test_a_resume_with_other_settings_names_both_values(copy, gptjax):
    with pytest.raises(UserError) as caught:
        gptjax("train", "run", "--learning-rate", "0.5", "--n-layer", "3")
    for words in ("model.n_layer: 1 in the run, 3 now", "learning_rate: 0.01 in the run, 0.5 now"):
        assert words in str(caught.value)


def test_the_settings_of_a_run_are_the_default_when_resumed(copy):
    config, runtime, tokenizer = settings(copy.parent, "--run-dir", "run", "--eval-batches", "3")
    saved, old = config_io.run_settings(json.loads((copy / "config.json").read_text()), "x")
    assert (config, runtime) == (saved, old.replace({"eval_batches": 3}))
    assert tokenizer.n_vocab == config.model.vocab_size


def test_a_resume_that_packs_otherwise_keeps_the_tokens(copy):
    config = settings(copy.parent, "--run-dir", "run", "--data.pack", "documents")[0]
    saved = settings(copy.parent, "--run-dir", "run")[0]
    assert config.data == saved.data.replace(pack="documents") and config.data.dir


def test_without_config_json_the_checkpoint_has_the_settings(copy):
    before = settings(copy.parent, "run")[:2]
    (copy / "config.json").unlink()
    assert settings(copy.parent, "run")[:2] == before


def test_a_damaged_config_json_is_named_with_what_to_do(copy):
    (copy / "config.json").write_text('{"max_steps": 6,}')
    with pytest.raises(UserError, match=r"run/config\.json is not valid JSON.*or delete run/conf"):
        settings(copy.parent, "run")


def test_data_made_from_the_text_are_made_again(copy, gptjax):
    shutil.rmtree(copy.parent / "data")
    config = config_io.run_settings(json.loads((copy / "config.json").read_text()), "x")[0]
    (copy / "config.json").write_text(
        (copy / "config.json").read_text().replace(config.data.dir, "/gone/data/text-char-12345678")
    )
    assert "complete at step 30" in gptjax("train", "run")
    assert len(os.listdir(copy.parent / "data")) == 1


def test_another_text_for_a_run_is_told_by_its_tokens(copy, gptjax):
    (copy.parent / "other.txt").write_text(helpers.TEXT[::-1])
    with pytest.raises(UserError, match="the tokens: fingerprint"):
        gptjax("train", "run", "--data.source", "other.txt")
    (copy.parent / "moved.txt").write_text(helpers.TEXT)
    assert "complete at step 30" in gptjax("train", "run", "--data.source", "moved.txt")


def test_more_steps_are_one_flag(copy, gptjax):
    out = gptjax("train", "run", "--max-steps", "32")
    assert "resumed at step 30" in out and "step 32/32" in out


def test_flags_count_over_the_config_file(tmp_path):
    (tmp_path / "own.py").write_text(
        "from gptjax.config import *\nconfig = TrainConfig(ModelConfig(3, 3, 6), seed=5)\n"
    )
    config, runtime, tokenizer = settings(tmp_path, "own.py", "--seed", "6", "--n-head=2")
    assert (config.model.n_layer, config.model.n_head, config.seed) == (3, 2, 6)
    assert (runtime.run_dir, tokenizer) == ("runs/own", None)


def test_another_optimizer_than_the_rates_were_chosen_for_is_told(tmp_path, capsys):
    settings(tmp_path, "quickstart", "--optimizer", "adamw")
    note = "note: --learning-rate is 0.008; the config's settings were chosen for muon, not adamw\n"
    assert capsys.readouterr().err == note
    settings(tmp_path, "shakespeare_char_cpu", "--optimizer", "muon", "--learning-rate", "1e-2")
    assert capsys.readouterr().err.startswith("note: --muon-learning-rate is 0.02; ")
    settings(tmp_path, "quickstart", "--optimizer", "adamw", "--learning-rate", "1e-3")
    settings(tmp_path, "quickstart", "--optimizer", "muon")
    assert not capsys.readouterr().err


def test_without_arguments_it_is_the_quickstart(tmp_path):
    config, runtime, _ = settings(tmp_path)
    default, expected = config_io.load_config("quickstart")
    assert (config, runtime) == (
        default,
        expected.replace({"run_dir": "runs/quickstart"}),
    )


def test_init_from_takes_the_architecture_of_the_weights(copy):
    config, runtime, tokenizer = settings(
        copy.parent, "--init-from", "run", "--data.source", "text.txt", "--block-size", "8"
    )
    saved = run_metadata.newest_metadata(copy).config
    assert config.model == saved.model.replace({"block_size": 8, "dtype": "auto"})
    assert config.optimizer == FINETUNE.optimizer and config.init_from == str(copy)
    assert (config.data.tokenizer, runtime.run_dir) == ("char", "runs/run-finetuned")
    assert tokenizer.n_vocab == saved.model.vocab_size


def test_init_from_takes_a_tokenizer_file_of_the_weights(gptjax, tmp_path, text_file, small_flags):
    own = hf.Tokenizer(hf.models.BPE())
    own.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(["a"], hf.trainers.BpeTrainer(initial_alphabet=alphabet))
    own.save(str(tmp_path / "own.json"))
    argv = ["train", *small_flags, "--max-steps", "2", "--data.tokenizer", "json"]
    with pytest.raises(UserError, match=r"takes a file: --data\.tokenizer-file"):
        gptjax(*argv, "--run-dir", "first")
    gptjax(*argv, "--data.tokenizer-file", "own.json", "--run-dir", "first")
    (tmp_path / "own.json").unlink()
    again = "--data text.txt --max-steps 2 --batch-size 8 --sample-tokens 0 --run-dir second"
    gptjax("train", "--init-from", "first", *again.split())
    assert run.load(tmp_path / "second").tokenizer.kind == "json"


def test_init_from_refuses_a_given_architecture_that_differs(copy):
    argv = ["--init-from", "run", "--data.source", "text.txt"]
    # 12 is the default, but it was given.
    with pytest.raises(UserError, match=r"model\.n_layer 12 is not the weights' 1: leave it out"):
        settings(copy.parent, *argv, "--n-layer", "12")
    with pytest.raises(UserError, match=r"block_size 32 exceeds the weights' 16"):
        settings(copy.parent, *argv, "--block-size", "32")


def test_a_fine_tuned_run_keeps_its_origin_and_moves_with_it(copy, gptjax):
    flags = "--batch-size 8 --max-steps 1 --sample-tokens 0 --data.source text.txt".split()
    out = gptjax("train", *flags, "--init-from", "run", "--run-dir", "tuned")
    assert f"(from {copy})" in out
    with pytest.raises(UserError, match=r"tuned began with the weights of .*/run, not of other"):
        gptjax("train", "--run-dir", "tuned", "--init-from", "other")
    (copy.parent / "there").mkdir()
    for name in ("run", "tuned"):
        shutil.move(copy.parent / name, copy.parent / "there" / name)
    argv = ["--run-dir", "there/tuned", "--init-from", "there/run"]
    assert "complete at step 1" in gptjax("train", *flags, *argv)
    shutil.rmtree(copy.parent / "there" / "run")  # it is not needed any more
    assert "complete at step 1" in gptjax("train", "there/tuned")


def test_print_config_prints_all_settings_and_ends(tmp_path, gptjax):
    printed = gptjax("train", "shakespeare_char_cpu", "--seed", "3", "--print-config")
    config, runtime = config_io.run_settings(json.loads(printed), "printed")
    assert (config.seed, runtime.run_dir) == (3, "runs/shakespeare_char_cpu")
    assert not list(tmp_path.iterdir())


def test_help_shows_the_defaults_of_the_config(gptjax):
    assert "(default: 480)" in gptjax("train", "gpt2", "--help")


def test_renamed_flags_work_with_a_notice(tmp_path, capsys):
    argv = "--model.remat --gelu erf --parallel.strategy fsdp --learning-rate 1e-2".split()
    config, runtime, _ = settings(tmp_path, *argv)
    assert (runtime.compute.remat, runtime.strategy) == (True, "fsdp")
    assert config.optimizer.learning_rate == 1e-2 and config.model.activation == "gelu_erf"
    assert capsys.readouterr().err.splitlines() == [
        "note: --model.remat is called --compute.remat now",
        "note: --gelu is called --model.activation now",
        "note: --parallel.strategy is called --strategy now",
    ]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--n-head 3 --batch-size 0 --sed 1", ["n_embd 16", "batch_size 0", "did you mean --seed"]),
        ("--batch-size 9", ["batch_size 9 does not divide over 8 device(s)", "use 8 or 16"]),
        ("--block-size 100000", ["tokens, but one block needs 100001"]),
        ("--vocab-size 5", ["model.vocab_size 5 is not the", "--model.vocab-multiple 64"]),
        ("--device gpu", ["--device gpu: JAX finds no gpu here"]),
        ("--data.source nope.txt", ["no text at 'nope.txt'"]),
        ("--data.dir nope", ["no folder nope"]),
        ("--data.source=", ["data.source is empty"]),
        ("--run-dir text.txt", ["text.txt is a file; expected a folder"]),
        ("--attention cudnn", ["cudnn does not fit here", "needs an NVIDIA GPU"]),
        ("--data.tokenizer sentencepiece --data.sentencepiece-vocab-size 99", ["99 pieces"]),
        ("--init-from nope", ["no run in nope (--init-from)", "gptjax convert import gpt2 nope"]),
        ("gpt2", ["no text to train on", "--data.source"]),
    ],
)
def test_bad_input_is_refused_and_nothing_is_begun(
    gptjax, small_flags, text_file, tmp_path, argv, words
):
    base = [] if argv == "gpt2" else [*small_flags, "--run-dir", "run"]
    with pytest.raises(UserError) as caught:
        gptjax("train", *base, *argv.split())
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "run").exists() and not (tmp_path / "runs").exists()


def test_a_dry_run_needs_no_text(tmp_path):
    assert settings(tmp_path, "gpt2", "--dry-run")[0].data.source is None


def test_the_two_scripts_are_the_commands(command):
    printed = command(helpers.TRAIN, "quickstart", "--print-config")
    assert json.loads(printed.stdout)["runtime"]["run_dir"] == "runs/quickstart"
    assert "usage: python generate_jax.py" in command(helpers.GENERATE, "--help").stdout
    helpers.assert_one_clear_line(command(helpers.TRAIN, "--sed", "1"), "(all flags: python train")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_saves_says_how_to_resume_and_loses_nothing(
    uninterrupted, tmp_path, cache_dir, text_file, number, code
):
    process = helpers.start(tmp_path, cache_dir, *helpers.TINY, "--run-dir", "run")
    helpers.wait_for(process, "step 15/40")
    process.send_signal(number)
    result = helpers.finish(process)
    assert result.returncode == code and "finishing the current step" in result.stderr
    step, resume = re.search(r"stopped; saved step (\d+)\. Resume: (.*)\n", result.stdout).groups()
    assert resume == f"python {helpers.TRAIN} --run-dir run" and 15 <= int(step) < 40
    result = helpers.finish(helpers.start(tmp_path, cache_dir, "--run-dir", "run"))
    assert result.returncode == 0 and f"resumed at step {step}" in result.stdout, result.stderr
    helpers.assert_same_run(uninterrupted[0], tmp_path / "run")


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_bitwise(
    uninterrupted, tmp_path, cache_dir, text_file
):
    process = helpers.start(tmp_path, cache_dir, *helpers.TINY, "--run-dir", "run")
    helpers.wait_for(process, "step 25/40")
    process.kill()
    process.communicate()
    assert helpers.logged(tmp_path / "run")[-1]["step"] < 40
    result = helpers.finish(helpers.start(tmp_path, cache_dir, "--run-dir", "run"))
    assert re.search("resumed at step (10|20|30)", result.stdout), result.stderr
    helpers.assert_same_run(uninterrupted[0], tmp_path / "run")


OTHERS = {
    "JAX_DISABLE_JIT": "1",
    "JAX_ENABLE_X64": "1",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_RANDOM_SEED_OFFSET": "5",
    "JAX_TRANSFER_GUARD": "disallow",
    "MPLBACKEND": "nope",
}


@pytest.mark.slow
def test_variables_of_other_programs_change_no_number(uninterrupted, tmp_path, command, text_file):
    result = command(helpers.TRAIN, *helpers.TINY, "--run-dir", "run", **OTHERS)
    assert result.returncode == 0 and not result.stderr, result.stderr
    helpers.assert_same_run(uninterrupted[0], tmp_path / "run")


def test_a_platform_that_is_not_there_is_one_clear_line(tmp_path, command, text_file):
    for platform in ("cuda", "nope"):
        result = command(helpers.TRAIN, *helpers.TINY, JAX_PLATFORMS=platform)
        helpers.assert_one_clear_line(result, f"JAX_PLATFORMS={platform}; unset it")


@pytest.mark.slow
def test_many_evaluation_steps_do_not_starve_each_other(tmp_path, cache_dir, text_file):
    flags = "--data.val-fraction 0.95 --max-steps 1 --batch-size 2 --sample-tokens 0".split()
    flags += ["--run-dir", "run"]
    result = helpers.finish(helpers.start(tmp_path, cache_dir, *helpers.TINY, *flags))
    assert result.returncode == 0 and "step 1: validation loss" in result.stdout, result.stderr


@pytest.mark.slow
def test_a_non_finite_loss_stops_at_the_last_good_step(tmp_path, cache_dir, text_file):
    # The rate rises until the weights overflow; every step is saved, few are evaluated.
    flags = "--learning-rate 1e36 --min-lr 0 --grad-clip 0 --warmup-steps 39 --save-interval 1"
    flags = [*helpers.TINY, "--run-dir", "run", *flags.split()]
    result = helpers.finish(helpers.start(tmp_path, cache_dir, *flags))
    helpers.assert_one_clear_line(result, "became", "in another --run-dir", code=1)
    found = re.search(r"at step (\d+)", result.stderr)
    with Checkpoints(tmp_path / "run") as checkpoints:
        step = checkpoints.latest_step
    if step is not None:
        assert step < int(found[1] if found else 40) and f"step {step} is saved" in result.stderr
        assert all(np.isfinite(x).all() for x in helpers.final_state(tmp_path / "run", step))


@pytest.mark.slow
def test_a_full_disk_is_one_clear_line(uninterrupted, text_file, command):
    """A real limit on file size stands in for a full disk: every write past it fails."""
    limited = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.argv.pop(0);"
        "sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0]);"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    saved = json.loads((uninterrupted[0] / "config.json").read_text())
    flags = [*helpers.TINY, "--run-dir", "run", "--data.dir", saved["experiment"]["data"]["dir"]]
    result = command("-c", limited, helpers.TRAIN, *flags)
    helpers.assert_one_clear_line(result, "cannot save a checkpoint", code=1)


@pytest.mark.slow
@pytest.mark.skipif(not helpers.SHAKESPEARE.is_file(), reason="Tiny Shakespeare is not here")
def test_the_large_shakespeare_setting_takes_a_step(command, tmp_path):
    few = "--max-steps 2 --eval-batches 1 --eval-full-split False --sample-tokens 0 --batch-size 4"
    cache = str(helpers.SHAKESPEARE.parent)
    result = command(
        "-m", "gptjax", "train", "shakespeare_char", *few.split(), GPTJAX_CACHE_DIR=cache
    )
    assert result.returncode == 0 and "step 2/2" in result.stdout, result.stderr
    assert os.listdir(tmp_path / "runs") == ["shakespeare_char"]


@pytest.mark.slow
def test_a_config_file_resumes_its_run_and_its_text(gptjax, text_file, tmp_path):
    (tmp_path / "own.py").write_text(
        "from gptjax.config import *\nfrom gptjax.runtime_config import *\n"
        "config = TrainConfig(ModelConfig(1, 2, 8, 16), DataConfig('text.txt'), batch_size=8,\n"
        "    max_steps=2)\nruntime = RuntimeConfig(sample_tokens=0)\n"
    )
    for said in ("(new)", "complete at step 2"):
        assert said in gptjax("train", "own.py")
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_two_names_for_a_run_are_refused(copy, tmp_path):
    with pytest.raises(UserError, match="two runs are named: run and --run-dir other"):
        settings(tmp_path, "run", "--run-dir", "other")
    assert settings(tmp_path, "run", "--run-dir", "run")[1].run_dir == "run"
