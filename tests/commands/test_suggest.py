"""gptjax suggest: what it prints, and that its command is what it says."""

import re
import shlex

import pytest

from gptjax import config_io, guidance
from gptjax.commands import suggest, train
from gptjax.config import DataConfig, ModelConfig
from gptjax.errors import UserError


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Two small sizes, hardly any time."""
    monkeypatch.setattr(guidance, "SMALL", [ModelConfig(1, 2, 16, 16, bias=False)])
    monkeypatch.setattr(guidance, "LARGE", [ModelConfig(2, 2, 32, 16, bias=False)])
    monkeypatch.setattr(guidance, "PROBE_SECONDS", 0.05)
    monkeypatch.setattr(guidance, "OTHER_SECONDS", 0.0)


def command(out):
    (line,) = re.findall(r"^    (gptjax train .*)$", out, re.M)
    return shlex.split(line)[1:]


@pytest.mark.slow
def test_the_command_trains_what_is_suggested(gptjax, text_file, tmp_path, monkeypatch):
    out = gptjax("suggest", "--data", "text.txt", "--hours", "0.0004")
    for words in ("training tokens (char, ", "tokens/s (", "heads, ", "arXiv:2305.16264",
                  "arXiv:2203.15556", "dropout  ", " evaluations of ", "memory     "):  # fmt: skip
        assert words in out
    words = command(out)
    monkeypatch.chdir(tmp_path)
    config, runtime, *_ = train.read_settings(words[1:], "gptjax train")
    assert runtime.run_dir == "runs/text" and config.data.source == "text.txt"
    wide, steps = re.search(r"heads, (\d+) wide.*?: ([\d,]+) steps", out, re.S).groups()
    assert (config.model.n_embd, config.max_steps) == (int(wide), int(steps.replace(",", "")))
    assert config.optimizer.kind == "muon" and config.optimizer.beta1 == 0.8
    printed = gptjax(*words, "--max-steps", "2")
    assert "step 2: validation loss" in printed
    # A second suggestion names a folder that is free.
    again = gptjax("suggest", "--data", "text.txt", "--hours", "0.0004")
    assert command(again)[-1] == "runs/text-2"


def test_a_prepared_set_will_do(gptjax, text_file, tmp_path, monkeypatch):
    gptjax("data", "text.txt", "--out", "sets/mine")
    words = command(gptjax("suggest", "--data.dir", "sets/mine", "--hours=0.0004", "--device=cpu"))
    monkeypatch.chdir(tmp_path)
    config, runtime, *_ = train.read_settings(words[1:], "gptjax train")
    assert (config.data.dir, config.data.source) == ("sets/mine", None)
    assert (runtime.device, runtime.run_dir) == ("cpu", "runs/mine")


def test_all_that_differs_from_the_quickstart_is_in_the_command(text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = DataConfig("text.txt", tokenizer="gpt2", val_fraction=0.2)
    model = ModelConfig(12, 12, 768, 1024, vocab_size=50257, bias=False, dtype="float32")
    expected = guidance.train_config(model, data, batch_size=64, steps=5000, dropout=0.1)
    runtime = config_io.load_config("gpt2")[1]
    words = shlex.split(suggest.command(expected, runtime))
    found, found_runtime, *_ = train.read_settings(words[words.index("train") + 1 :], "")
    assert found.replace({"model.vocab_size": 50257, "model.dtype": "float32"}) == expected
    assert found_runtime.replace(run_dir=None) == runtime.replace(run_dir=None)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "no text; name one: gptjax suggest --data my.txt --hours 2"),
        ("--data nope.txt", "no text at 'nope.txt'"),
        ("--data text.txt --hours 0", "hours 0.0 must be a number above 0"),
        ("--data text.txt --hours inf", "hours inf must be"),
        ("--data.dir nope", "no folder nope"),
        ("--data text.txt --hours 1e-9", "too short"),
        ("text.txt", "unexpected argument 'text.txt'"),
    ],
)
def test_bad_input_is_refused(gptjax, text_file, argv, words):
    with pytest.raises(UserError) as caught:
        gptjax("suggest", *argv.split())
    assert words in str(caught.value)
