"""HellaSwag: likelihoods of endings after their contexts, and what they decide."""

import functools
import itertools
import json
import re

import numpy as np
import pytest
from fuzz import damaged, read_or_refuse
from helpers import TEXT
from hypothesis import given

from gptjax.config import ModelConfig
from gptjax.data.tokenizers import CharTokenizer, Gpt2Tokenizer, SentencePieceTokenizer
from gptjax.errors import UserError
from gptjax.evals.hellaswag import (
    Question,
    accuracies,
    evaluate_questions,
    read_questions,
)

CONFIG = ModelConfig(2, 2, 16, block_size=40, vocab_size=40)
TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz ATIBCDEFGHJ.é")

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


def test_the_likeliest_ending_is_the_answer(found_scores, nats, questions):
    right, right_per_token = 0, 0
    for context, endings, label in ROWS:
        expected, per_token = [], []
        for ending in endings:
            text = TOKENIZER.encode(f"{context} {ending}")[-41:]
            first = max(1, len(text) - len(ending) - 1)
            expected.append(sum(nats(text[:k], text[k]) for k in range(first, len(text))))
            per_token.append(expected[-1] / (len(ending) + 1))
        right += int(np.argmin(expected)) == label
        right_per_token += int(np.argmin(per_token)) == label
    result = evaluate_questions(found_scores, questions, CONFIG, name="h", batch_size=8)
    assert (result.acc, result.acc_norm, result.acc_bytes) == (right / 3, right_per_token / 3, None)
    assert result.report().split("\n") == [
        "h: 3 questions in the completion style",
        f"acc                 {right / 3:.4f}",
        f"acc_norm            {right_per_token / 3:.4f}  (by likelihood per token of the ending)",
    ]


def test_what_is_divided_by_may_decide():
    sizes = {"acc_norm": (1, 4, 1, 1), "acc_bytes": (9, 4, 1, 1)}
    questions = [Question((), sizes, 1), Question((), dict.fromkeys(sizes, (1, 1, 1, 1)), 0)]
    # Per character 2, 1, 3, 3; per byte 2/9, 1, 3, 3; of the second question always 1, 2, 3, 4.
    nats = np.array([[2.0, 4.0, 3.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    assert accuracies(nats, questions) == {"acc": 0.5, "acc_norm": 1.0, "acc_bytes": 0.5}


HARNESS = {
    "activity_label": "Baking",
    "ctx_a": " A cat [title] sat.",
    "ctx_b": "then IT [step] ran",
    "endings": ["away [title] far ", "é", "[a] [b] in", "a  b   c"],
    "label": "3",
}


def test_the_harness_style_cleans_the_texts(tmp_path):
    """By hand; `test_the_texts_are_those_of_the_harness` has its own code say it."""
    path = tmp_path / "h.jsonl"
    path.write_text(json.dumps(HARNESS))
    tokenizer = Gpt2Tokenizer({bytes([byte]): byte for byte in range(256)})
    (question,) = read_questions(path, tokenizer, "harness")
    assert {tokenizer.decode(context) for context, _ in question.endings} == {
        "Baking: A cat. sat. Then it ran"
    }
    endings = [tokenizer.decode(tokens) for _, tokens in question.endings]
    assert endings == [" away. far", " é", "  in", " a b  c"]
    assert question.sizes == {"acc_norm": (9, 1, 3, 6), "acc_bytes": (9, 2, 3, 6)}
    assert question.label == 3
    path.write_text('{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": 0}')
    with pytest.raises(UserError, match=r"line 1 is not .* `activity_label`, `ctx_a`, `ctx_b`, "):
        read_questions(path, tokenizer, "harness")


def test_the_texts_are_those_of_the_harness(tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra harness")
    import datasets
    from lm_eval.tasks.hellaswag.utils import process_docs

    path = tmp_path / "h.jsonl"
    path.write_text(json.dumps(HARNESS))
    tokenizer = Gpt2Tokenizer({bytes([byte]): byte for byte in range(256)})
    (question,) = read_questions(path, tokenizer, "harness")
    (expected,) = process_docs(datasets.Dataset.from_list([HARNESS]))
    whole = [tokenizer.decode(np.concatenate(text)) for text in question.endings]
    assert whole == [f"{expected['query']} {ending}" for ending in expected["choices"]]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[]", "line 2 is not a JSON object"),
        ('{"ctx": "a", "endings": ["a", "b", "c"], "label": 0}', "line 2 is not"),
        (
            '{"ctx": "a", "endings": ["a", "b", "c", 4], "label": 0}',
            "line 2 is not a HellaSwag question",
        ),
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


QUESTION = (
    b'{"activity_label": "a", "ctx_a": "a", "ctx_b": "b", "ctx": "a b",'
    b' "endings": ["a", "b", "c", "a"], "label": 3}\n'
)


@pytest.fixture(scope="module")
def tokenizers():
    by_bytes = Gpt2Tokenizer({bytes([byte]): byte for byte in range(256)})
    return TOKENIZER, by_bytes, SentencePieceTokenizer.train([TEXT], 400)


@given(damaged(QUESTION * 2))
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, tokenizers, content):
    path = tmp_path_factory.mktemp("h") / "h.jsonl"
    path.write_bytes(content)
    for each in itertools.product(tokenizers, ("completion", "harness")):
        read_or_refuse(functools.partial(read_questions, path, *each), path)
