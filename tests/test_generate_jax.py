"""The sampling command, on a run made by the training command."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TEXT, assert_one_clear_line, command_environment
from test_tokenizers import needs_gpt2

from generate_jax import Sample
from gptjax.tokenizers import CharTokenizer

GENERATE = ROOT / "generate_jax.py"


@pytest.fixture(
    scope="module", params=["char", "sentencepiece", pytest.param("gpt2", marks=needs_gpt2)]
)
def run(request, tmp_path_factory, cache_dir):
    """A short run of each tokenizer, moved away from its text and its data."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text(TEXT)
    flags = (
        "--data.source text.txt --data.sentencepiece-vocab-size 400 --model.n-layer 2"
        " --model.n-head 2 --model.n-embd 16 --model.block-size 32 --batch-size 8 --max-steps 60"
        " --eval-interval 30 --sample-tokens 0 --learning-rate 1e-2 --run-dir run"
    )
    subprocess.run(
        [sys.executable, ROOT / "train_jax.py", *flags.split(), "--data.tokenizer", request.param],
        cwd=folder, env=command_environment(cache_dir), check=True, capture_output=True,
    )  # fmt: skip
    moved = tmp_path_factory.mktemp("moved") / request.param
    shutil.move(folder / "run", moved)
    shutil.rmtree(folder)
    return moved


def test_a_run_directory_alone_gives_samples_that_its_seed_repeats(run, command):
    flags = ["--run-dir", run, "--prompt", "RICHARD:\n", "--max-new-tokens", 80]
    first, again = (command(GENERATE, *flags, "--num-samples", 3) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout
    samples = first.stdout.split("---------------\n")[:-1]
    assert len(set(samples)) == 3
    assert all(sample.startswith("RICHARD:\n") and len(sample) > 40 for sample in samples)
    other = command(GENERATE, *flags, "--num-samples", 3, "--seed", 7)
    assert other.stdout != first.stdout
    assert len(first.stderr.splitlines()) == 1 and "80 tokens x 3" in first.stderr


def test_streaming_prints_the_same_text(run, command):
    flags = ["--run-dir", run, "--prompt", "RICHARD:\n", "--max-new-tokens", 60, "--top-p", 0.9]
    flags += ["--num-samples", 2]
    assert command(GENERATE, *flags).stdout == command(GENERATE, *flags, "--stream").stdout


def test_the_prompt_may_come_from_a_file_or_standard_input(run, command, tmp_path):
    (tmp_path / "prompt.txt").write_text("HASTINGS:\n")
    flags = ["--run-dir", run, "--max-new-tokens", 10, "--temperature", 0, "--prompt-file"]
    from_file = command(GENERATE, *flags, "prompt.txt")
    from_stdin = command(GENERATE, *flags, "-", stdin="HASTINGS:\n")
    assert from_file.stdout == from_stdin.stdout
    assert from_file.stdout.startswith("HASTINGS:\n")


def test_a_stop_text_ends_the_sample_before_it(run, command):
    flags = ["--run-dir", run, "--prompt", "now", "--max-new-tokens", 300]
    whole = command(GENERATE, *flags).stdout
    assert "\n\n" in whole[3:] or run.name == "gpt2"  # 60 steps do not teach 50,257 tokens
    for more in ([], ["--stream"]):
        stopped = command(GENERATE, *flags, *more, "--stop", "\\n\\n").stdout
        assert stopped == "now" + whole.removesuffix("\n")[3:].split("\n\n")[0] + "\n"


@pytest.mark.parametrize("how", ["exact", "half", "stop"])
def test_every_overflow_goes_past_the_block_or_stops_there(run, command, how):
    flags = ["--run-dir", run, "--prompt", "now", "--max-new-tokens", 100, "--overflow", how]
    flags += ["--ignore-end-of-text"]
    result = command(GENERATE, *flags)
    assert result.returncode == 0
    made = int(result.stderr.split(" tokens x")[0].split()[-1])
    assert made == 100 if how != "stop" else made <= 32


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", ""], ["the prompt is empty"]),
        (["--prompt-file", "nope.txt"], ["cannot read --prompt-file nope.txt"]),
        (["--prompt-file", "bad.txt"], ["bad.txt is not UTF-8"]),
        (["--temperature", "-1", "--top-p", "2", "--num-samples", "0"],
         ["--temperature -1.0", "--top-p 2.0", "--num-samples must be at least 1"]),
        (["--seed", str(2**32), "--top-k", str(2**31)], ["--seed must be", "--top-k must"]),
        (["--prompt", b"now \xff"], ["--prompt is not UTF-8"]),
        (["--checkpoint", "12345"], ["no checkpoint '12345'", "there are: 30, 60"]),
        (["--device", "tpu"], ["JAX finds no tpu here"]),
        (["--tempature", "1"], ["--tempature", "perhaps --temperature"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(run, command, tmp_path, flags, words):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    assert_one_clear_line(command(GENERATE, "--run-dir", run, *flags), *words)


def test_an_unknown_character_is_named_or_skipped_where_there_are_such(run, command):
    flags = ["--run-dir", run, "--prompt", "now Ω", "--max-new-tokens", 5]
    result = command(GENERATE, *flags)
    if run.name == "char":
        assert_one_clear_line(result, "'Ω'", "--unknown skip")
        result = command(GENERATE, *flags, "--unknown", "skip")
    assert result.returncode == 0 and result.stdout.startswith("now Ω")


def test_a_missing_run_is_one_clear_line(command):
    assert_one_clear_line(command(GENERATE, "--run-dir", "nope"), "no run in nope")


# ------------------------------------------------------------------------------ a sample


def sample_of(pieces, stops=(), eot=None):
    sample = Sample(CharTokenizer("abcde"), stops, eot)
    shown = []
    for piece in pieces:
        sample.extend(np.array(piece))
        shown.append(sample.settled())
    return sample, shown


def test_a_stop_text_is_found_across_chunks_and_never_shown():
    sample, shown = sample_of([[0], [1], [2], [3], [4]], stops=["bcd"])
    assert (sample.text, sample.ended) == ("a", True)
    assert shown == ["a", "a", "a", "a", "a"]


def test_what_looked_like_a_stop_text_is_shown_once_it_is_none():
    _, shown = sample_of([[1], [2], [4], [0]], stops=["bcd"])
    assert shown == ["", "", "bce", "bcea"]


def test_the_end_of_text_token_ends_a_sample_unless_ignored():
    assert sample_of([[0, 1, 4, 2]], eot=4)[0].text == "ab"
    assert sample_of([[0, 1, 4, 2]])[0].text == "abec"
