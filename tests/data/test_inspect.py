"""What `data inspect` says, beside counts made by hand."""

import numpy as np

from gptjax.data import inspect
from gptjax.data.batches import batch_at
from gptjax.data.token_files import load


def said(dataset, **sizes):
    lines = inspect.describe(dataset, **{"seed": 1, "batch_size": 4, "block_size": 8} | sizes)
    return [line.split(maxsplit=1) for line in lines]


def test_counts_are_those_by_hand(tmp_path, make_set, byte_pairs, monkeypatch):
    monkeypatch.setattr(inspect, "AT_ONCE", 5)
    (tmp_path / "val.txt").write_text("ab~~")
    text = '{"text": "aaaaaaaaaaaa b"}\n{"text": "a long line"}\n{"text": "b\\n" }'
    folder = make_set(
        tmp_path, text, "t.jsonl", tokenizer=byte_pairs, val_source=str(tmp_path / "val.txt")
    )
    dataset = load(folder)
    found = inspect.count(dataset.train, 263, byte_pairs.eot)
    assert found.documents == 3 and found.tokens == len(dataset.train)
    assert found.of_ids[ord("a")] == 13 and found.of_ids[ord("b")] == 2
    lines = said(dataset)
    # 14, 10 (one pair of letters is a token), 2, and two ends of documents.
    assert ["training", "28 tokens, documents: 3, 1.00 bytes of text a token"] in lines
    # a occurs 13 times; b, the end of text, and " long line" less than ten times each.
    rare = sum(1 for n in found.of_ids if 0 < n < 10)
    share = sum(n for n in found.of_ids if n < 10) / found.of_ids.sum()
    (words,) = [rest for name, rest in lines if name == "rare"]
    assert words.startswith(f"{rare} ids occur less than 10 times") and f"({share:.2%} of" in words
    assert ["unknown", "50.00% of the validation tokens never occur in the training split"] in lines
    (longest, *_) = [rest for name, rest in lines if name == "long"]
    assert longest == "line   14 characters: 'aaaaaaaaaaaa b'"


def test_the_first_batch_is_that_of_training(tmp_path, make_set):
    dataset = load(make_set(tmp_path))
    rows = [rest.removeprefix("batch ") for name, rest in said(dataset) if name == "first"]
    batch = batch_at(dataset.train, 1, 0, batch_size=4, block_size=8)
    assert rows == [repr(dataset.tokenizer.decode(np.asarray(row).tolist())) for row in batch[:3]]
    assert not [name for name, _ in said(dataset, block_size=10**6) if name == "first"]
