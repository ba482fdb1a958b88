"""gptjax generate: what it prints, in which order, and what it refuses."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys

import helpers
import pytest

from gptjax import run
from gptjax.commands import flags
from gptjax.errors import UserError


@pytest.fixture(scope="module")
def moved(trained, tmp_path_factory):
    """A copy of the run without its text and data."""
    return shutil.copytree(trained[0], tmp_path_factory.mktemp("moved") / "run")


def samples(out):
    return out.split("---------------\n")[:-1]


TWO = ["--num-samples", 2]  # the same for all, because another number is compiled anew


def test_the_runs_folder_alone_gives_samples_of_its_seed(moved, gptjax, capsys):
    argv = ["generate", moved, "--prompt", "now", "--max-new-tokens", 12, *TWO]
    first, again = gptjax(*argv), gptjax(*argv)
    assert first == again and len(set(samples(first))) == 2
    assert all(s.startswith("now") and len(s) == 3 + 12 + 1 for s in samples(first))
    assert gptjax(*argv, "--seed", 7) != first
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and f"[{moved}, step 30: 12 tokens x 2 in " in said[0]


def test_it_prints_what_the_api_generates(moved, gptjax):
    model = run.load(moved)
    for options in ({"temperature": 0.0}, {"top_k": 3, "top_p": 0.5}):
        argv = [f"--{name}={value}" for name, value in options.items()]
        argv += ["--run-dir", moved, "--max-new-tokens=9", "--prompt=now", *TWO]
        texts = model.generate("now", max_new_tokens=9, num_samples=2, **options)
        assert samples(gptjax("generate", *argv)) == [f"now{text}\n" for text in texts]


def test_beams_are_searched_and_the_best_printed(moved, gptjax):
    argv = ["generate", moved, "--prompt", "now", "--max-new-tokens", 6, "--num-beams", 2, *TWO]
    found = run.load(moved).beam_search("now", max_new_tokens=6, num_beams=2)
    assert gptjax(*argv) == "".join(f"now{text}\n[score {score:.4f}]\n" for score, text in found)
    assert len(found) == 2 and found[0][0] > found[1][0]
    with pytest.raises(UserError, match="--num-beams does not go with --temperature, --top-k"):
        gptjax(*argv, "--temperature", "0.5", "--top-k", "3")
    with pytest.raises(UserError, match="of 1 beams there cannot be 2 samples"):
        gptjax(*argv, "--num-beams", "1")
    for wrong in ({"num_beams": 0}, {"length_penalty": float("nan")}):
        with pytest.raises(UserError, match=r"num_beams \d must be at least 1, length_penalty"):
            run.load(moved).beam_search(**wrong)
    with pytest.raises(UserError, match="--length-penalty goes with --num-beams"):
        gptjax("generate", moved, "--length-penalty", "2")


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_streaming_prints_the_same_text(moved, gptjax, count):
    argv = ["generate", moved, "--max-new-tokens", 12, "--prompt", "now", "--stop", "e"]
    argv += ["--num-samples", count]
    assert gptjax(*argv, "--stream") == gptjax(*argv)


def test_the_prompt_comes_from_a_file_or_standard_input(moved, gptjax, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("HASTING:\n")
    argv = ["generate", moved, "--max-new-tokens", 3, *TWO, "--prompt-file"]
    from_file = gptjax(*argv, "prompt.txt")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"HASTING:\n")))
    assert gptjax(*argv, "-") == from_file and from_file.startswith("HASTING:\n")


FEW = ["--max-new-tokens", 5, "--overflow", "half"]


def test_prompts_of_a_file_are_continued_in_order_as_alone(moved, gptjax, tmp_path, monkeypatch):
    lines = ["now is", "RICHARD:", "the winter of our"]
    alone = [gptjax("generate", moved, "--prompt", line, *FEW, *TWO) for line in lines]
    (tmp_path / "prompts.txt").write_text("\n\n".join(lines) + "\r\n")
    assert gptjax("generate", moved, "--prompts", "prompts.txt", *FEW, *TWO) == "".join(alone)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    assert gptjax("generate", moved, "--prompts", "-", *FEW, *TWO) == "".join(alone)


def test_a_line_of_json_for_each_sample(moved, gptjax, tmp_path):
    lines = [json.dumps({"prompt": text, "id": 3}) for text in ("now\nis", "RICHARD:")]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    argv = ["generate", moved, *FEW, "--json", "--logprobs", 1]
    found = [json.loads(x) for x in gptjax(*argv, "--prompts", "p.jsonl").splitlines()]
    assert [each["prompt"] for each in found] == ["now\nis", "RICHARD:"]
    single = json.loads(gptjax(*argv, "--prompt", "now\\nis"))
    assert single == found[0] and len(single["logprobs"]["tokens"]) == 5
    assert "now\nis" + single["text"] + "\n" == gptjax(
        "generate", moved, *FEW, "--prompt", "now\\nis"
    )


def test_a_table_of_log_probabilities_follows_the_text(moved, gptjax):
    argv = ["generate", moved, "--prompt", "now", *FEW, "--temperature", 0]
    text, told = gptjax(*argv), gptjax(*argv, "--logprobs", 2)
    assert told.startswith(text + "\n")
    rows = told.removeprefix(text).splitlines()[1:]
    assert len(rows) == 5
    for row, letter in zip(rows, text[3:], strict=False):
        value = row.split()[0]
        likeliest = row.partition(repr(letter))[2].strip()  # greedy: the token itself
        assert float(value) < 0 and likeliest.startswith(f"{letter!r} {value}")


def test_a_stop_text_ends_the_sample_before_it(moved, gptjax):
    argv = ["generate", moved, "--prompt", "now", "--max-new-tokens", 13, "--seed", 3]
    text = samples(gptjax(*argv, *TWO))[0].removesuffix("\n")
    for at in (5, 8):  # the first of several counts
        stop = text[at : at + 2].replace("\n", "\\n")
        stopped = samples(gptjax(*argv, *TWO, "--stop", "Q", stop))[0].removesuffix("\n")
        found = text.index(text[at : at + 2], 3)
        assert stopped == text[:found]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt", ""], ["the prompt is empty"]),
        (["--prompt-file", "nope.txt"], ["cannot read --prompt-file nope.txt: No such file"]),
        (["--prompt-file", "bad.txt"], ["bad.txt is not UTF-8"]),
        (["--temperature", "-1", "--top-p", "2", "--num-samples", "0"],
         ["temperature -1.0", "top_p 2.0", "num_samples 0 must be at least 1"]),
        (["--seed", 2**32, "--top-k", 2**31, "--stop", ""],
         ["seed 4", "top_k 2", "a stop text must not be empty"]),
        (["--num-samples", 10**8], ["100,000,000 samples need", "lower num_samples"]),
        (["--prompt", "now \udcff"], ["--prompt is not UTF-8"]),
        (["--stop", "now \udcff"], ["--stop is not UTF-8"]),
        (["--checkpoint", "12345"], ["no checkpoint '12345'", "there are: 20, 30"]),
        (["--device", "tpu"], ["JAX finds no tpu here"]),
        (["--tempature", "1"], ["unknown flag --tempature; did you mean --temperature"]),
        (["--prompt", "now Ω"], ["'Ω'", "--unknown skip"]),
        (["--prompts", "p.txt"], ["prompt 2: ", "'Ω'", "--unknown skip"]),
        (["--prompts", "empty.txt"], ["--prompts empty.txt has no prompts"]),
        (["--prompts", "p.jsonl"], ['p.jsonl, line 2: expected an object with a text "prompt"']),
        (["--prompts", "p.txt", "--prompt", "a"], ["exclude each other"]),
        (["--json", "--stream"], ["--stream, --sharded and --max-new-tokens 0 do not go with"]),
        (["--logprobs", "11", "--rows", "0"], ["logprobs 11 is outside", "rows 0 must be"]),
    ],
)  # fmt: skip
def test_bad_input_is_named(moved, gptjax, tmp_path, argv, words):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "p.txt").write_text("now\nΩ\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "now"}\n{"text": "now"}\n')
    with pytest.raises(UserError) as caught:
        gptjax("generate", moved, *argv)
    for word in words:
        assert word in str(caught.value)


def test_line_ends_tabs_and_backslashes_are_spelled_as_in_c():
    assert flags.unescape(r"a\nb\t\\n \x") == "a\nb\t\\n \\x"


def test_a_stop_text_is_not_taken_for_the_run(moved, gptjax):
    with pytest.raises(UserError, match="name the run before: gptjax generate RUN --stop"):
        gptjax("generate", "--stop", "e", moved)


def test_unknown_characters_are_skipped_on_request(moved, gptjax):
    argv = ["generate", moved, "--prompt", "now Ω", "--max-new-tokens", 3, *TWO]
    assert gptjax(*argv, "--unknown", "skip").startswith("now Ω")


def test_a_missing_run_is_named(gptjax):
    with pytest.raises(UserError, match="no run in nope"):
        gptjax("generate", "nope")
    with pytest.raises(UserError, match="no run in runs/quickstart"):
        gptjax("generate")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exact", "half", "stop"])
def test_every_overflow_goes_past_the_block_or_ends(moved, gptjax, capsys, how):
    argv = ["generate", moved, "--prompt", "now", "--max-new-tokens", 40, "--overflow", how]
    text = gptjax(*argv, "--ignore-end-of-text")
    made = 40 if how != "stop" else 14  # the last token drawn needs no room in the block of 16
    assert len(text) == 3 + made + 1 and f"{made} tokens x 1" in capsys.readouterr().err


@pytest.mark.slow
def test_for_ever_ends_with_ctrl_c(moved, gptjax, cache_dir):
    argv = ["--run-dir", str(moved), "--prompt", "now"]
    process = subprocess.Popen(
        [sys.executable, helpers.GENERATE, *argv, "--max-new-tokens", "0", "--overflow", "half"],
        env=helpers.command_environment(cache_dir), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    begun = process.stdout.read(200)
    process.send_signal(signal.SIGINT)
    assert helpers.finish(process).returncode == 130
    flags = ["--max-new-tokens", 230, "--overflow", "half"]
    assert gptjax("generate", *argv, *flags).startswith(begun)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2"])
def test_a_run_of_any_tokenizer_needs_only_its_folder(
    gptjax, small_flags, text_file, tmp_path, kind
):
    if kind == "gpt2" and not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("GPT-2's merges are not on this machine (TIKTOKEN_CACHE_DIR)")
    flags = ["--data.tokenizer", kind, "--data.sentencepiece-vocab-size", "400"]
    gptjax("train", *small_flags, *flags, "--run-dir", "run")
    shutil.rmtree(tmp_path / "data")
    text_file.unlink()
    argv = ["generate", "run", "--prompt", "now is Ω", "--max-new-tokens", 12]
    assert gptjax(*argv).startswith("now is Ω")
    assert gptjax(*argv) == gptjax(*argv, "--stream")
