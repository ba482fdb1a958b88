"""The exact loss of a text, whatever the windows, and what it is counted against."""

import functools
import math
import re

import helpers
import jax
import numpy as np
import pytest
from rich.console import Console

from gptjax import model
from gptjax.config import DataConfig, ModelConfig
from gptjax.data import token_files
from gptjax.data.prepare import prepare
from gptjax.data.tokenizers import BpeTokenizer, CharTokenizer, SentencePieceTokenizer
from gptjax.devices import hosts
from gptjax.devices.strategy import get_strategy
from gptjax.errors import UserError
from gptjax.evals import perplexity
from gptjax.evals.perplexity import Text, evaluate_text, read_split, read_text
from gptjax.train_step import eval_step

CONFIG = ModelConfig(1, 2, 16, block_size=12, vocab_size=40)
TOKENS = np.random.default_rng(0).integers(0, 40, 101)
TEXT = Text("t", TOKENS, 100, 200, "")


@pytest.mark.parametrize("stride", [1, 5, None])
def test_each_token_has_the_context_that_the_stride_leaves(losses, nats, stride):
    expected = 0.0
    for target in range(1, len(TOKENS)):
        # The first window that reaches the target.
        start = max(0, math.ceil((target - 12) / (stride or 12))) * (stride or 12)
        expected += nats(TOKENS[start:target], TOKENS[target])
    seen = []
    result = evaluate_text(
        losses,
        TEXT,
        CONFIG,
        batch_size=16,
        stride=stride,
        progress=lambda *numbers: seen.append(numbers),
    )
    assert result.tokens == 100 and result.loss == pytest.approx(expected / 100, rel=1e-6)
    assert result.bits_per_character == pytest.approx(result.loss / math.log(2))
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) / 2)
    count = math.ceil(88 / (stride or 12)) + 1
    assert seen[-1] == (count, count) and len(seen) == math.ceil(count / 16)


def test_on_several_devices_the_loss_is_that_of_the_model():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(CONFIG, jax.random.key(0)))
    params = jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype("f4"), shapes)
    strategy = get_strategy("pmap", jax.devices()[:2])
    step = strategy.map_eval_step(functools.partial(eval_step, config=CONFIG))
    losses = functools.partial(step, strategy.to_devices(strategy.initialise(lambda: params)))
    result = evaluate_text(losses, TEXT, CONFIG, batch_size=16, stride=1)

    contexts = np.zeros((100, 12), np.int32)
    lengths = np.minimum(np.arange(1, 101), 12)
    for row, length in enumerate(lengths):
        contexts[row, :length] = TOKENS[row + 1 - length : row + 1]
    logits, _ = jax.jit(functools.partial(model.apply, CONFIG))(params, contexts)
    last = np.asarray(logits, np.float64)[np.arange(100), lengths - 1]
    expected = np.log(np.exp(last).sum(-1)) - last[np.arange(100), TOKENS[1:]]
    assert result.loss == pytest.approx(expected.mean(), rel=1e-5)


def test_the_report_names_the_text_and_every_number(losses):
    result = evaluate_text(losses, TEXT, CONFIG, batch_size=8, stride=4)
    lines = result.report().split("\n")
    assert lines[0] == "t: 100 tokens predicted in windows of 12, 4 apart"
    values = dict(
        re.fullmatch(r"(.+?) +([\d.]+)( nats per token)?", x).group(1, 2) for x in lines[1:]
    )
    assert values == {
        "loss": f"{result.loss:.4f}",
        "perplexity": f"{math.exp(result.loss):.4f}",
        "bits per character": f"{result.bits_per_character:.4f}",
        "bits per byte": f"{result.bits_per_byte:.4f}",
    }


def test_a_broken_model_has_no_perplexity():
    assert math.isnan(perplexity.TextResult("t", 1, math.nan, 0, 0).perplexity)
    assert math.isfinite(perplexity.TextResult("t", 1, 1e9, 0, 0).perplexity)


def test_nothing_to_predict_and_unequal_hosts_are_refused(losses, monkeypatch):
    with pytest.raises(UserError, match="one token"):
        evaluate_text(losses, TEXT._replace(tokens=TOKENS[:1]), CONFIG, batch_size=8)
    monkeypatch.setattr(hosts, "all_equal", lambda text: False)
    with pytest.raises(UserError, match="the hosts have different texts"):
        evaluate_text(losses, TEXT, CONFIG, batch_size=8)


# reading


def test_characters_and_bytes_are_those_of_what_is_predicted(tmp_path):
    tokenizer = CharTokenizer("abé .\n")
    (tmp_path / "text.txt").write_text("éa b é.")
    text = read_text(str(tmp_path / "text.txt"), tokenizer)
    assert (len(text.tokens), text.characters, text.bytes) == (7, 6, 7)
    (tmp_path / "two.jsonl").write_text('{"text": "ab"}\n{"text": "é"}\n')
    text = read_text(str(tmp_path / "two.jsonl"), tokenizer)
    assert (len(text.tokens), text.characters, text.bytes) == (4, 3, 4)
    with pytest.raises(UserError, match="U\\+000A"):  # the line end between them
        read_text(str(tmp_path / "two.jsonl"), CharTokenizer("abé"))


class Bytes:
    """A token is a byte, and 0 ends a text."""

    eot = 0

    def encode(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def token_bytes(self):
        return [b"", *(bytes([byte]) for byte in range(1, 256))]


@pytest.mark.parametrize("at_a_time", [1, 2, 3, 100])
def test_a_character_of_several_tokens_is_counted_once(monkeypatch, at_a_time):
    monkeypatch.setattr(perplexity, "READ", at_a_time)
    tokens = np.frombuffer("né\0日本\0x".encode(), np.uint8)
    assert perplexity.text_size(tokens, Bytes()) == (5, 10)


def test_what_the_first_token_begins_does_not_count(tmp_path):
    """It is not predicted; of the bytes that follow in its character it tells nothing."""
    for content, size in (("éa", (1, 2)), ("aé", (1, 2)), ("日本", (1, 5))):
        (tmp_path / "t.txt").write_text(content)
        assert read_text(str(tmp_path / "t.txt"), Bytes())[2:4] == size


def test_bytes_are_those_of_the_text_without_the_first_token(tmp_path):
    """An emoji is several tokens; a U+FFFD of the text is three bytes as any other character."""
    text = "Größe \U0001f600\U0001f9d1\u200d\U0001f680 \ufffd 日本語 naïve\n" * 3
    (tmp_path / "t.txt").write_text(text)
    for tokenizer in (
        CharTokenizer("".join(sorted({*text}))),
        BpeTokenizer.train([helpers.TEXT], 300),
        SentencePieceTokenizer.train([helpers.TEXT], 400),
    ):
        read = read_text(str(tmp_path / "t.txt"), tokenizer)
        first = tokenizer.token_bytes()[read.tokens[0]]
        assert first and text.encode().startswith(first)
        assert read.bytes == len(text.encode()) - len(first)
        assert read.characters == len(text) - 1


def test_documents_are_joined_by_the_end_of_text_token(tmp_path):
    (tmp_path / "two.jsonl").write_text('{"text": "ab"}\n{"text": "é"}\n')
    text = read_text(str(tmp_path / "two.jsonl"), Bytes())
    assert bytes(text.tokens.tolist()) == "ab\0é".encode()
    assert (text.characters, text.bytes) == (2, 3)


def test_a_split_is_that_of_the_run_or_refused(tmp_path):
    (tmp_path / "t.txt").write_text("é abc" * 20)
    folder = tmp_path / "set"
    prepare(DataConfig(str(tmp_path / "t.txt"), val_fraction=0.2), folder, Console(quiet=True))
    dataset = token_files.load(folder)
    train, val = (
        read_split(folder, split, dataset.tokenizer, dataset.fingerprint)
        for split in ("train", "val")
    )
    assert (len(train.tokens), train.characters, train.bytes) == (80, 79, 94)
    assert (len(val.tokens), val.characters, val.bytes) == (20, 19, 22)
    assert train.name == "the train split" and val.tokens[:].tolist() == dataset.val[:].tolist()
    with pytest.raises(UserError, match="are not those of the run; name a text with --text"):
        read_split(folder, "val", dataset.tokenizer, "another")
    with pytest.raises(UserError, match=r"no longer at .*; say where"):
        read_split(tmp_path / "gone", "val", dataset.tokenizer, dataset.fingerprint)
