"""LAMBADA: the last word of a passage, by arithmetic."""

import functools
import json
import math

import numpy as np
import pytest
from fuzz import damaged, read_or_refuse
from hypothesis import given

from gptjax.config import ModelConfig
from gptjax.data.tokenizers import CharTokenizer, Gpt2Tokenizer
from gptjax.errors import UserError
from gptjax.evals.continuations import Continuation
from gptjax.evals.lambada import evaluate_passages, read_passages

CONFIG = ModelConfig(2, 2, 16, block_size=24, vocab_size=40)
LETTERS = CharTokenizer("abcdefghijklmnopqrstuvwxyz .\n")
BYTES = Gpt2Tokenizer({bytes([byte]): byte for byte in range(256)})
PASSAGES = ["a fox met a hen", "it  was\n\nlong ago, in a far  land".replace(",", ""), "a b"]


def test_only_the_last_word_is_predicted(found_scores, nats, tmp_path):
    path = tmp_path / "l.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    passages = read_passages(path, LETTERS)
    expected = []
    for text, count in zip(PASSAGES, (4, 6, 2), strict=True):  # with the spaces before the word
        ids = LETTERS.encode(text)[-25:]
        expected.append(sum(nats(ids[:k], ids[k]) for k in range(len(ids) - count, len(ids))))
    found = evaluate_passages(found_scores, passages, CONFIG, name="l", batch_size=2)
    assert found.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)
    assert found.acc == 0
    assert found.report().split("\n") == [
        "l: 3 passages",
        f"perplexity          {found.perplexity:.4f}  (of the last word)",
        "acc                 0.0000  (the last word is the likeliest, token by token)",
    ]


def test_a_word_is_right_if_all_its_tokens_are_the_likeliest(tmp_path):
    path = tmp_path / "l.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a bb", "a bc", "a cc")))

    def likes_b(windows, places):
        counts = places >= 0
        asked = np.take_along_axis(windows, places + 1, axis=1)
        wrong = counts & (asked == LETTERS.encode("c"))
        return np.stack([counts.sum(-1), wrong.sum(-1)], axis=-1)

    found = evaluate_passages(likes_b, read_passages(path, LETTERS), CONFIG, name="l", batch_size=4)
    assert (found.acc, found.perplexity) == (1 / 3, pytest.approx(math.exp(3)))


def test_a_perplexity_is_a_number_however_large():
    found = evaluate_passages(
        lambda *_: np.full((1, 2), 1e9), [Continuation([1], [2])], CONFIG, name="l", batch_size=1
    )
    assert math.isfinite(found.perplexity)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"text": "word"}', "line 1 is not a LAMBADA passage"),
        ('{"text": "word "}', "line 1 is not a LAMBADA passage"),
        ('{"text": 3}', "line 1 is not a LAMBADA passage"),
        ('{"text": "a Ω"}', "line 1: the character 'Ω'"),
        ("a text", "line 1 is not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, words):
    (tmp_path / "l.jsonl").write_text(row)
    with pytest.raises(UserError, match=words):
        read_passages(tmp_path / "l.jsonl", LETTERS)


@given(damaged(b'{"text": "a b c"}\n' * 2))
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("l") / "l.jsonl"
    path.write_bytes(content)
    for tokenizer in (LETTERS, BYTES):
        read_or_refuse(functools.partial(read_passages, path, tokenizer), path)
