"""HellaSwag: likelihoods of endings after their contexts, and what they decide."""

import json
import re

import numpy as np
import pytest
from fuzz import damaged, read_or_refuse
from helpers import TEXT
from hypothesis import given

from gptjax.config import ModelConfig
from gptjax.data.tokenizers import CharTokenizer, Gpt2Tokenizer, SentencePieceTokenizer
from gptjax.devices import hosts
from gptjax.errors import UserError
from gptjax.evals.hellaswag import (
    Question,
    accuracies,
    ending_losses,
    evaluate_questions,
    read_questions,
)

CONFIG = ModelConfig(2, 2, 16, block_size=40, vocab_size=40)
TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz ATIBCDEFGHJ.é")
TOKENS = np.arange(40, dtype=np.int32)
LONG = np.tile(TOKENS, 2)

ROWS = [
    ("That cat", ["is on.", "A", "dog dog dog", "é"], 0),
    ("A context that is longer than the block ", ["ends", "e", "b b", "long enough"], 3),
    ("I", ["a", "b", "c", "d"], 2),
]


@pytest.fixture
def questions(tmp_path):
    rows = [
        {"ind": i, "ctx": context, "label": label, "endings": endings, "split": "val"}
        for i, (context, endings, label) in enumerate(ROWS)
    ]
    path = tmp_path / "hellaswag.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_questions(path, TOKENIZER)


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_endings_have_their_likelihood_after_the_context(losses, nats, questions, rows):
    expected, right, right_per_token = np.zeros((3, 4)), 0, 0
    for i, (context, endings, label) in enumerate(ROWS):
        lengths = [len(ending) + 1 for ending in endings]
        for j, ending in enumerate(endings):
            text = TOKENIZER.encode(f"{context} {ending}")[-41:]
            first = max(1, len(text) - lengths[j])
            expected[i, j] = sum(nats(text[:k], text[k]) for k in range(first, len(text)))
        right += min(range(4), key=lambda j: expected[i, j]) == label
        right_per_token += min(range(4), key=lambda j: expected[i, j] / lengths[j]) == label
    seen = []

    def progress(done, total):
        seen.append((done, total))

    result = evaluate_questions(
        losses, questions, CONFIG, name="h", batch_size=rows, progress=progress
    )
    found = ending_losses(losses, questions, CONFIG, batch_size=rows)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (result.acc, result.acc_norm) == (right / 3, right_per_token / 3)
    assert seen[-1] == (12, 12)
    assert result.report().split("\n") == [
        "h: 3 questions",
        f"acc                 {right / 3:.4f}",
        f"acc_norm            {right_per_token / 3:.4f}  (by likelihood per token of the ending)",
    ]


def test_endings_are_padded_to_few_lengths(losses, nats):
    """Each is a compilation. Without a context, an ending's first token is not predicted."""
    seen = []

    def counted(windows, weights):
        seen.append(weights.shape[1])
        return losses(windows, weights)

    endings = TOKENS[:17], TOKENS[:3], TOKENS[:30], TOKENS[:18]
    found = ending_losses(counted, [Question(TOKENS[:0], endings, 0)], CONFIG, batch_size=1)
    assert seen == [16, 16, 32, 32]
    expected = [sum(nats(e[:k], e[k]) for k in range(1, len(e))) for e in endings]
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


def test_the_likelier_ending_need_not_be_so_per_token():
    one, four = TOKENS[:1], TOKENS[:4]
    questions = [Question(one, (one, four, one, one), 1), Question(one, (one, one, one, one), 0)]
    # Per token: 2, 1, 3, 3 and 1, 2, 3, 4.
    losses = np.array([[2.0, 4.0, 3.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    assert accuracies(losses, questions) == (0.5, 1.0)


def test_long_endings_and_unequal_hosts_are_refused(losses, questions, monkeypatch):
    long = [Question(TOKENS[:3], (TOKENS[:2], LONG[:41], LONG[:40], LONG[:50]), 0)]
    with pytest.raises(UserError, match=r"2 endings are longer .* 40 \(the longest has 50 tokens"):
        evaluate_questions(losses, long, CONFIG, name="h", batch_size=8)
    monkeypatch.setattr(hosts, "all_equal", lambda text: False)
    with pytest.raises(UserError, match="the hosts have different questions"):
        evaluate_questions(losses, questions, CONFIG, name="h", batch_size=8)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not a HellaSwag question"),
        ("[]", "line 2 is not"),
        ('{"ctx": "a", "endings": ["a", "b", "c"], "label": 0}', "line 2 is not"),
        ('{"ctx": "a", "endings": ["a", "b", "c", 4], "label": 0}', "line 2 is not"),
        ('{"ctx": "a", "endings": "abcd", "label": 0}', "line 2 is not"),
        ('{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": 4}', "line 2 is not"),
        ('{"ctx": "", "endings": ["a", "b", "c", "d"], "label": 0}', "line 2 is not"),
        ('{"ctx": "Ω", "endings": ["a", "b", "c", "d"], "label": 0}', "line 2: the character 'Ω'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    good = '{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": "0"}'
    (tmp_path / "h.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=re.escape(words)):
        read_questions(tmp_path / "h.jsonl", TOKENIZER)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\n", "is empty"), (b"\xff", "is not UTF-8 text"), (None, "No such file")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, words):
    path = tmp_path / "h.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}.*{words}"):
        read_questions(path, TOKENIZER)


QUESTION = b'{"ctx": "a b", "endings": ["a", "b", "c", "a"], "label": 3}\n'


@pytest.fixture(scope="module")
def tokenizers():
    by_bytes = Gpt2Tokenizer({bytes([byte]): byte for byte in range(256)})
    return TOKENIZER, by_bytes, SentencePieceTokenizer.train([TEXT], 400)


@given(damaged(QUESTION * 2))
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, tokenizers, content):
    path = tmp_path_factory.mktemp("h") / "h.jsonl"
    path.write_bytes(content)
    for tokenizer in tokenizers:
        read_or_refuse(lambda tokenizer=tokenizer: read_questions(path, tokenizer), path)
