"""What is checked before a run begins."""

import dataclasses
import shutil

import pytest
from rich.console import Console

import gptjax
from gptjax import launch
from gptjax.config import DataConfig
from gptjax.data import prepare
from gptjax.errors import RunError, UserError
from gptjax.run_lock import RunLock


def test_the_vocabulary_may_be_known_before_the_text():
    config = gptjax.TrainConfig()
    assert launch.known_vocabulary(config, None) is None  # one of characters
    for changes, count in (
        ({"data.tokenizer": "gpt2"}, 50257),
        ({"data.tokenizer": "sentencepiece"}, 4096),
        ({"model.vocab_size": 7}, 7),
    ):
        assert launch.known_vocabulary(config.replace(changes), None) == count


def test_a_run_in_use_is_refused(tiny, train_tiny, tmp_path):
    shutil.copytree(tiny.run_dir, tmp_path / "run")
    lock = RunLock(tmp_path / "run")
    assert lock.acquire() is None
    try:
        with pytest.raises(UserError, match=r"run is in use by process \d+ on .*; wait for it"):
            train_tiny(tiny.config, tmp_path / "run")
    finally:
        lock.close()
    assert train_tiny(tiny.config, tmp_path / "run").events == ["start", "end"]


def test_other_data_than_the_weights_tokenizer_are_refused(tiny, train_tiny, tmp_path):
    (tmp_path / "text.txt").write_text("abc" * 100)
    data = DataConfig(str(tmp_path / "text.txt"), dir=str(tmp_path / "set"))
    prepare.prepare(data, tmp_path / "set", Console(quiet=True))
    config = dataclasses.replace(tiny.config, data=data, init_from=str(tiny.run_dir))
    with pytest.raises(UserError, match="made with another char tokenizer than the char one"):
        train_tiny(config, tmp_path / "run")


def test_what_does_not_fit_the_data_is_refused(tiny, train_tiny, tmp_path):
    for changes, words in (
        ({"model.block_size": 100_000}, "--model.block-size 21838 or less"),
        ({"model.vocab_size": 50}, r"model.vocab_size 50 is not the 44 ids of the char"),
        ({"data.dir": str(tmp_path / "gone")}, r"no folder .*gone \(--data.dir\)"),
        ({"batch_size": 12}, r"does not divide over 8 device\(s\) x 1 accumulation"),
    ):
        with pytest.raises(UserError, match=words):
            train_tiny(tiny.config.replace(changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_cannot_be_is_named(tiny, train_tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file is a file; expected a folder \(--run-dir\)"):
        train_tiny(tiny.config, tmp_path / "file")
    with pytest.raises(RunError, match="file/run: Not a directory"):
        train_tiny(tiny.config, tmp_path / "file" / "run")


def test_a_model_that_cannot_fit_is_refused_before_it_is_made(tiny, train_tiny, tmp_path):
    config = tiny.config.replace({"model.n_embd": 65536, "model.n_layer": 100})
    with pytest.raises(
        UserError, match=r"parameters do not fit: each device needs \d{5}\.\d\d GiB"
    ):
        train_tiny(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
