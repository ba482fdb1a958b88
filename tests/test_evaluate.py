"""Evaluation against PyTorch, token by token: any stride, any text, HellaSwag."""

import functools
import json
import math
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from conftest import ROOT, TEXT, assert_one_clear_line, command_environment

from gptjax import data, evaluate, model, parallel, state_dict, torch_gpt, train
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.evaluate import Question
from gptjax.tokenizers import CharTokenizer

CONFIG = ModelConfig(2, 2, 16, block_size=12, vocab_size=40, scan_unroll=1)
CHARACTERS = "abcdefghijklmnopqrstuvwxyz ATIBCDEFGHJ.é"
TOKENIZER = CharTokenizer(CHARACTERS)
TOKENS = np.random.default_rng(0).integers(0, 40, 101)


@functools.cache
def weights():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init_params(CONFIG, 0))
    return jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype("f4"), shapes)


@functools.cache
def in_torch() -> torch_gpt.TorchGPT:
    tensors = state_dict.to_torch(weights(), CONFIG, "out_in")
    return torch_gpt.from_state_dict(CONFIG, tensors)


def torch_nats(context: np.ndarray, target: int) -> float:
    """Of one token after its context, alone."""
    with torch.no_grad():
        logits = in_torch()(torch.from_numpy(context).long()[None])[0, -1].double()
    return float(torch.logsumexp(logits, 0) - logits[target])


# --------------------------------------------------------------------------------- text


def losses_of_our_model() -> evaluate.Losses:
    strategy = parallel.strategy("pmap")
    params = strategy.place(strategy.build(weights))
    step = strategy.map_eval_step(functools.partial(train.eval_step, config=CONFIG))
    return functools.partial(step, params)


@pytest.mark.parametrize("stride", [1, 5, 12])
def test_the_loss_is_pytorchs_with_the_context_that_the_stride_leaves(stride):
    expected = 0.0
    for target in range(1, len(TOKENS)):
        # The first window that reaches the target.
        start = max(0, math.ceil((target - 12) / stride)) * stride
        expected += torch_nats(TOKENS[start:target], TOKENS[target])
    some = data.spans(len(TOKENS), 12, stride=stride)
    loss, count = evaluate.span_loss(losses_of_our_model(), TOKENS, some, CONFIG, 16)
    assert count == 100
    assert loss == pytest.approx(expected, rel=1e-6)


def test_characters_and_bytes_are_those_of_what_is_predicted(tmp_path):
    (tmp_path / "text.txt").write_text("éa b é.")
    text = evaluate.read_text(str(tmp_path / "text.txt"), TOKENIZER)
    assert (len(text.tokens), text.characters, text.bytes) == (7, 6, 7)
    (tmp_path / "two.jsonl").write_text('{"text": "ab"}\n{"text": "é"}\n')
    with pytest.raises(UserError, match="U\\+000A"):  # the line end between them
        evaluate.read_text(str(tmp_path / "two.jsonl"), TOKENIZER)
    joined = evaluate.read_text(str(tmp_path / "two.jsonl"), CharTokenizer(CHARACTERS[1:] + "a\n"))
    assert (len(joined.tokens), joined.characters, joined.bytes) == (4, 3, 4)


# ----------------------------------------------------------------------------- hellaswag

ROWS = [
    ("That cat", ["is on.", "A", "dog dog dog", "é"], 0),
    ("A much longer context than the block", ["ends", "e", "b b", "long enough"], 3),
    ("I", ["a", "b", "c", "d"], 2),
]


@pytest.fixture
def hellaswag(tmp_path):
    path = tmp_path / "hellaswag.jsonl"
    rows = [
        {"ind": i, "ctx": context, "label": label, "endings": endings, "split": "val"}
        for i, (context, endings, label) in enumerate(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_hellaswag_endings_have_pytorchs_likelihood_and_decide_as_it_does(hellaswag):
    questions = evaluate.read_hellaswag(hellaswag, TOKENIZER)
    losses = evaluate.hellaswag_losses(losses_of_our_model(), questions, CONFIG, rows=8)
    expected, plain, normalised = np.zeros((3, 4)), 0, 0
    for i, (context, endings, label) in enumerate(ROWS):
        lengths = [len(ending) + 1 for ending in endings]
        for j, ending in enumerate(endings):
            text = TOKENIZER.encode(f"{context} {ending}")[-13:]
            first = max(1, len(text) - lengths[j])
            expected[i, j] = sum(torch_nats(text[:k], text[k]) for k in range(first, len(text)))
        plain += min(range(4), key=lambda j: expected[i, j]) == label
        normalised += min(range(4), key=lambda j: expected[i, j] / lengths[j]) == label
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert evaluate.accuracies(losses, questions) == (plain / 3, normalised / 3)


def test_an_ending_longer_than_the_block_is_refused():
    questions = [Question(TOKENS[:3], (TOKENS[:2], TOKENS[:13], TOKENS[:12], TOKENS[:20]), 0)]
    with pytest.raises(UserError, match=r"2 endings are longer .* 12 \(the longest has 20 tokens"):
        evaluate.hellaswag_losses(losses_of_our_model(), questions, CONFIG, rows=8)


def test_the_likelier_ending_need_not_be_the_likelier_per_token():
    one, four = np.zeros(1, int), np.zeros(4, int)
    questions = [Question(one, (one, four, one, one), 1), Question(one, (one, one, one, one), 0)]
    # Per token: 2, 1, 3, 3 and 1, 2, 3, 4.
    losses = np.array([[2.0, 4.0, 3.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    assert evaluate.accuracies(losses, questions) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not HellaSwag's"),
        ("[]", "line 2 is not HellaSwag's"),
        ('{"ctx": "a", "endings": ["a", "b", "c"], "label": 0}', "line 2 is not HellaSwag's"),
        ('{"ctx": "a", "endings": ["a", "b", "c", 4], "label": 0}', "line 2 is not HellaSwag's"),
        ('{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": 4}', "line 2 is not HellaSwag's"),
        ('{"ctx": "", "endings": ["a", "b", "c", "d"], "label": 0}', "line 2 is not HellaSwag's"),
        ('{"ctx": "Ω", "endings": ["a", "b", "c", "d"], "label": 0}', "line 2: the character 'Ω'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    good = '{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": "0"}'
    (tmp_path / "h.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=re.escape(words)):
        evaluate.read_hellaswag(tmp_path / "h.jsonl", TOKENIZER)


# ------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache_dir):
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text(TEXT)
    flags = (
        "--data.source text.txt --model.n-layer 1 --model.n-head 2 --model.n-embd 16"
        " --model.block-size 16 --batch-size 8 --max-steps 30 --eval-interval 10 --eval-full-split"
        " --sample-tokens 0 --run-dir run"
    )
    subprocess.run(
        [sys.executable, ROOT / "train_jax.py", *flags.split()],
        cwd=folder, env=command_environment(cache_dir), check=True, capture_output=True,
    )  # fmt: skip
    return folder / "run"


def printed(out: str, name: str) -> float:
    return float(re.search(rf"^{name} +([\d.]+)", out, re.MULTILINE)[1])


def test_the_validation_split_has_the_loss_that_training_logged(run, command):
    result = command("-m", "gptjax.evaluate", run, "--split", "val", "--checkpoint", "latest")
    assert result.returncode == 0, result.stderr
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    loss = last["val_loss"]
    assert printed(result.stdout, "loss") == round(loss, 4)
    assert printed(result.stdout, "perplexity") == pytest.approx(math.exp(loss), rel=1e-4)
    # One token a character, one byte each.
    for unit in ("bits per character", "bits per byte"):
        assert printed(result.stdout, unit) == pytest.approx(loss / math.log(2), abs=1e-4)


def test_a_text_on_any_number_of_devices_and_hellaswag(run, command, tmp_path):
    (tmp_path / "t.txt").write_text(TEXT[:1000])
    said = {
        command("-m", "gptjax.evaluate", run, "--text", "t.txt", "--stride", 4,
                "--num-devices", n).stdout for n in (1, 4)
    }  # fmt: skip
    assert len(said) == 1 and "999 tokens predicted in windows of 16, 4 apart" in said.pop()
    # The empty ending is the likeliest, and the right one in one of the two.
    rows = [{"ctx": "now is", "endings": ["", "winter", "of", "our"], "label": n} for n in (0, 2)]
    (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = command("-m", "gptjax.evaluate", run, "--hellaswag", "h.jsonl").stdout
    assert "2 questions" in out and printed(out, "acc") == 0.5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["on what? give one of --text, --split and --hellaswag"]),
        (["--split", "val", "--text", "t.txt"], ["on what?"]),
        (["--split", "val", "--stride", "17"], ["--stride 17 exceeds the block_size 16"]),
        (["--split", "val", "--batch-size", "3", "--num-devices", "2"], ["does not divide over 2"]),
        (["--text", "nope.txt"], ["no text at 'nope.txt'"]),
        (["--hellaswag", "nope.jsonl"], ["cannot read nope.jsonl"]),
    ],
)
def test_bad_input_is_one_clear_line(run, command, flags, words):
    assert_one_clear_line(command("-m", "gptjax.evaluate", run, *flags), *words)


def test_a_split_counts_the_text_and_not_what_stands_between_documents(monkeypatch):
    class Bytes:
        eot = 0

        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    tokens = np.frombuffer("né\0日本\0x".encode(), np.uint8)
    for part in (1, 2, 3, 100):
        monkeypatch.setattr(evaluate, "DECODED", part)
        assert evaluate._spelled(tokens, Bytes()) == (5, 10)


def test_data_that_are_gone_or_others_are_named(run, command):
    moved = run.parent / "data"
    hidden = moved.rename(run.parent / "hidden")
    try:
        result = command("-m", "gptjax.evaluate", run, "--split", "val")
        assert_one_clear_line(result, "no longer at", "name a text with --text")
    finally:
        hidden.rename(moved)
    (val,) = moved.glob("*/val.bin")
    tokens = val.read_bytes()
    try:
        val.write_bytes(tokens[::-1][1:] + b"\0")
        result = command("-m", "gptjax.evaluate", run, "--split", "val")
        assert_one_clear_line(result, "are not those of the run")
    finally:
        val.write_bytes(tokens)
