"""The card says what is known of a model, and its command trains the same."""

import dataclasses
import shlex

from small_models import random_params

from gptjax.commands import train
from gptjax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptjax.data.tokenizers import CharTokenizer
from gptjax.interop import convert, model_card
from gptjax.interop.weights import Weights

MODEL = ModelConfig(
    2, 2, 16, block_size=12, vocab_size=3, bias=False, activation="relu", n_inner=24,
    attention_pattern=("dense", "banded"), dtype="float32",
)  # fmt: skip
CONFIG = TrainConfig(
    MODEL, DataConfig("/home/me/all `x` texts.txt"), OptimizerConfig(3e-4, kind="muon"),
    batch_size=5, max_steps=70, init_from="/home/me/runs/gpt2",
)  # fmt: skip
CHARS = CharTokenizer("abc")


def card(**fields):
    return model_card.text(Weights(CONFIG, {}, step=40, **fields), CHARS, "tiny", "hf")


def test_the_command_gives_the_same_settings(tmp_path):
    config = dataclasses.replace(CONFIG, init_from=None)
    words = shlex.split(model_card.command(config))
    assert words[:2] == ["gptjax", "train"]
    found, *_ = train.read_settings(words[2:], "gptjax train", str(tmp_path))
    assert found.data.source == "all ?x? texts.txt"  # no path of this machine
    model = dataclasses.replace(found.model, vocab_size=3)
    assert dataclasses.replace(found, model=model, data=CONFIG.data) == config


def test_a_mix_and_other_files_are_named_without_their_folders(tmp_path):
    mix = ("/home/me/a b.txt=0.7", "/home/me/books/=0.3")
    data = DataConfig(None, mix=mix, val_source="/home/me/held.txt", dir="/home/me/data/x")
    config = dataclasses.replace(CONFIG, init_from=None, data=data)
    words = shlex.split(model_card.command(config))
    found, *_ = train.read_settings(words[2:], "gptjax train", str(tmp_path))
    assert found.data.mix == ("a b.txt=0.7", "books=0.3") and found.data.source is None
    assert found.data.val_source == "held.txt" and found.data.dir is None
    weights = Weights(config, {}, step=40, data_fingerprint="0" * 64)
    text = model_card.text(weights, CHARS, "tiny", "hf")
    assert "- Data: `a b.txt=0.7 books=0.3` (tokens" in text and "/home/me" not in text


def test_the_command_names_what_a_fine_tuned_model_began_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert.write_run(Weights(TrainConfig(MODEL), random_params(MODEL)), CHARS, tmp_path / "gpt2")
    tuned = CONFIG.replace({"model.block_size": 8, "model.dropout": 0.25})
    words = shlex.split(model_card.command(tuned))
    found, *_ = train.read_settings(words[2:], "gptjax train", "runs")
    assert found.init_from == str(tmp_path / "gpt2")
    data, origin = CONFIG.data, CONFIG.init_from
    assert dataclasses.replace(found, data=data, init_from=origin) == tuned


def test_a_card_states_data_tokens_and_loss():
    text = card(data_fingerprint="0123456789abcdef", val_loss=1.5)
    assert text.startswith("---\npipeline_tag: text-generation\nlibrary_name: transformers\n")
    for words in (
        "# tiny\n", "max_new_tokens=6)", "`gpt2`", "`all ?x? texts.txt`", "`0123456789ab`",
        "40 of 5 sequences",
        "2,400 tokens", "1.5000 nats per token (perplexity 4.482)", "gptjax train --",
    ):  # fmt: skip
        assert words in text
    assert "/home/me" not in text


def test_a_card_does_not_claim_what_is_not_known():
    text = card()
    assert "not known" in text and "tokens in all" not in text and "Command: `" not in text
    assert "not measured" in card(data_fingerprint="0" * 64)
