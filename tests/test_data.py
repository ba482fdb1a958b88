"""Preparing sets, opening them (nanoGPT's too), and batches as pure functions."""

import dataclasses
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, SHAKESPEARE, TEXT, command_environment
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_tokenizers import TINY_RANKS, needs_gpt2

from gptjax import corpus, data
from gptjax.config import DataConfig
from gptjax.errors import RunError, UserError
from gptjax.tokenizers import CharTokenizer, Gpt2Tokenizer

QUIET = Console(file=io.StringIO())


def prepared(tmp_path, text=TEXT, name="text.txt", **settings):
    (tmp_path / name).write_text(text)
    out = tmp_path / "set"
    data.prepare(DataConfig(source=str(tmp_path / name), **settings), out, QUIET)
    return out


# ----------------------------------------------------------------------------- prepare


@pytest.mark.parametrize("tokenizer", ["char", "sentencepiece"])
def test_a_prepared_set_decodes_to_the_text(tmp_path, tokenizer):
    out = prepared(tmp_path, tokenizer=tokenizer, sentencepiece_vocab_size=400)
    dataset = data.load(out)
    decode = dataset.tokenizer.decode
    n_train = int(len(TEXT) * 0.9)
    assert (decode(dataset.train[:]), decode(dataset.val[:])) == (TEXT[:n_train], TEXT[n_train:])
    meta = json.loads((out / "meta.json").read_text())
    assert meta["train_tokens"] == len(dataset.train)
    assert meta["vocab_size"] == dataset.tokenizer.n_vocab


@settings(max_examples=25)
@given(st.text(alphabet="ab'\u2581 \n\t\u2003é", min_size=40), st.integers(1, 30))
def test_tokens_do_not_depend_on_how_the_text_is_read(tmp_path_factory, text, size):
    """The property that makes streaming exact, for both tokenizers that merge characters."""
    import test_tokenizers

    pieces = test_tokenizers.SentencePieceTokenizer.train([TEXT], 400)
    for tokenizer in (Gpt2Tokenizer(TINY_RANKS), pieces):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "_survey", lambda *_, t=tokenizer: (len(text), t))
            patch.setattr(corpus, "READ_BYTES", size)
            out = prepared(tmp_path_factory.mktemp("t"), text)
        n_train = int(len(text) * 0.9)
        for split, part in (("train", text[:n_train]), ("val", text[n_train:])):
            got = np.fromfile(out / f"{split}.bin", "<u2")
            assert got.tolist() == tokenizer.encode(part).tolist()


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="Tiny Shakespeare is not on this machine")
def test_tiny_shakespeare_by_character_has_nanogpts_counts(tmp_path):
    data.prepare(DataConfig(source=str(SHAKESPEARE)), tmp_path / "set", QUIET)
    dataset = data.load(tmp_path / "set")
    assert (len(dataset.train), len(dataset.val)) == (1_003_854, 111_540)
    assert dataset.tokenizer.n_vocab == 65


@needs_gpt2
@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="Tiny Shakespeare is not on this machine")
def test_tiny_shakespeare_in_gpt2_tokens_has_nanogpts_counts(tmp_path):
    config = DataConfig(source=str(SHAKESPEARE), tokenizer="gpt2")
    data.prepare(config, tmp_path / "set", QUIET)
    dataset = data.load(tmp_path / "set")
    assert (len(dataset.train), len(dataset.val)) == (301_966, 36_059)


def test_processes_that_prepare_the_same_set_at_once_do_not_disturb_each_other(tmp_path):
    (tmp_path / "text.txt").write_text("some text to prepare\n" * 30)
    config = DataConfig(source=str(tmp_path / "text.txt"))
    failed = []

    def prepare(out):
        try:
            data.prepare(config, out, Console(quiet=True))
        except UserError as error:  # "exists already", where it came too late
            if not out.exists():
                failed.append(error)

    for number in range(15):
        out = tmp_path / "sets" / str(number)
        threads = [threading.Thread(target=prepare, args=[out]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        data.load(out)
    assert not failed and len(os.listdir(tmp_path / "sets")) == 15


def test_a_token_file_cut_short_after_it_was_opened_is_a_clear_error(tmp_path):
    path = tmp_path / "train.bin"
    np.arange(100, dtype="<u2").tofile(path)
    tokens = data.TokenFile(path, np.dtype("<u2"))
    assert len(tokens) == 100 and tokens[7:12].tolist() == [7, 8, 9, 10, 11]
    assert tokens[98:200].tolist() == [98, 99] and not len(tokens[5:5])
    os.truncate(path, 100)
    assert tokens[40:50].tolist() == list(range(40, 50))
    with pytest.raises(RunError, match="shorter than when it was opened"):
        tokens[40:60]


def test_documents_are_separated(tmp_path):
    lines = [{"text": "one two"}, {"text": "three"}, {"text": "x" * 20}]
    text = "\n".join(map(json.dumps, lines))
    by_char = data.load(prepared(tmp_path, text, "t.jsonl", val_fraction=0.5))
    assert (
        by_char.tokenizer.decode([*by_char.train[:], *by_char.val[:]])
        == "one two\nthree\n" + "x" * 20
    )
    with pytest.MonkeyPatch.context() as patch:
        tiny = Gpt2Tokenizer(TINY_RANKS)
        patch.setattr(data, "_survey", lambda *_: (32, tiny))
        config = DataConfig(source=str(tmp_path / "t.jsonl"), tokenizer="gpt2")
        data.prepare(config, tmp_path / "bpe", QUIET)
    tokens = data.load(tmp_path / "bpe")
    ids = [*tokens.train[:], *tokens.val[:]]
    ends = [i for i, token in enumerate(ids) if token == tiny.eot]
    assert len(ends) == 2
    assert tiny.decode(ids[: ends[0]]) == "one two"


def test_a_large_vocabulary_gets_uint32(tmp_path):
    text = "".join(map(chr, range(0x10000, 0x10000 + 70_000))) * 2
    out = prepared(tmp_path, text)
    dataset = data.load(out)
    assert dataset.train.dtype == np.uint32
    assert dataset.tokenizer.decode([*dataset.train[:], *dataset.val[:]]) == text


def test_preparing_killed_midway_leaves_nothing_that_looks_whole(tmp_path, cache_dir):
    with (tmp_path / "big.txt").open("w") as file:
        for _ in range(1500):
            file.write(TEXT)
    begin = [sys.executable, "-m", "gptjax.data", "big.txt", "--out", "set", "--tokenizer"]
    process = subprocess.Popen(
        [*begin, "sentencepiece", "--sentencepiece-vocab-size", "400"],
        cwd=tmp_path,
        env=command_environment(cache_dir),
    )
    while not list(tmp_path.glob(".set.*/train.bin")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "set").exists()
    subprocess.run([*begin, "char"], cwd=tmp_path, env=command_environment(cache_dir), check=True)
    assert len(data.load(tmp_path / "set").train) == int(1500 * len(TEXT) * 0.9)


def test_sentencepiece_hears_short_documents_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SENTENCEPIECE_SAMPLE", 2000)
    heard = []

    def train(sample, vocab_size):
        heard.extend(sample)
        return CharTokenizer("".join(sorted(set(TEXT))))

    monkeypatch.setattr(data.SentencePieceTokenizer, "train", train)
    lines = [json.dumps({"text": f"document number {n} of many, all short"}) for n in range(1000)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    config = DataConfig(str(tmp_path / "t.jsonl"), tokenizer="sentencepiece")
    data._survey(config, [tmp_path / "t.jsonl"], 40_000, lambda n: None, None)
    assert 1500 < sum(map(len, heard)) < 2500
    assert all(text.endswith("all short") for text in heard)
    assert max(map(int, (text.split()[2] for text in heard))) > 900  # from all over the file


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(RunError, match="cannot write"):
        data.prepare(DataConfig(str(tmp_path / "text.txt")), tmp_path / "file" / "set", QUIET)


def test_an_existing_folder_is_never_overwritten(tmp_path):
    prepared(tmp_path)
    before = (tmp_path / "set" / "train.bin").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        prepared(tmp_path, "other text " * 50)
    assert (tmp_path / "set" / "train.bin").read_bytes() == before


def test_a_failed_write_is_one_clear_line_and_cleans_up(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*: No space left on device"):
        prepared(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_text_too_short_for_two_splits_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected at least 2 of each"):
        prepared(tmp_path, "abcdefgh")


def test_a_changed_text_or_setting_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my text.txt").write_text(TEXT)
    config = DataConfig(source="my text.txt")
    first = data.default_dir(config)
    assert first == data.default_dir(config) and first.name.startswith("my_text-char-")
    assert first != data.default_dir(dataclasses.replace(config, val_fraction=0.2))
    (tmp_path / "my text.txt").write_text(TEXT + "more")
    assert first != data.default_dir(config)


@pytest.mark.parametrize("tokenizer", ["char", "sentencepiece"])
def test_a_hundred_megabytes_are_tokenised_in_bounded_memory(tmp_path, cache_dir, tokenizer):
    with (tmp_path / "big.txt").open("w") as file:
        for _ in range((100_000_000 if tokenizer == "char" else 30_000_000) // len(TEXT)):
            file.write(TEXT)
    script = (
        "import re, sys; from gptjax import data; data.main(sys.argv[1:]);"
        "print(int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) // 1024)"
    )
    run = [sys.executable, "-c", script, "big.txt", "--out", "set", "--tokenizer", tokenizer]
    run += ["--sentencepiece-vocab-size", "400"]
    result = subprocess.run(
        run, cwd=tmp_path, env=command_environment(cache_dir), check=True, capture_output=True
    )
    assert int(result.stdout.split()[-1]) < 400  # MB; the text alone has 100, its tokens 200


# -------------------------------------------------------------------------------- load


def nanogpt_folder(tmp_path, meta: bytes | None):
    ids = CharTokenizer("abc").encode("abcabcabc" * 5).astype("<u2")
    for split in ("train", "val"):
        ids.tofile(tmp_path / f"{split}.bin")
    if meta is not None:
        (tmp_path / "meta.pkl").write_bytes(meta)
    return tmp_path


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_nanogpts_folders_are_used_as_they_are(tmp_path, protocol):
    itos = dict(enumerate("abc"))
    meta = {"vocab_size": 3, "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    dataset = data.load(nanogpt_folder(tmp_path, pickle.dumps(meta, protocol)))
    assert dataset.tokenizer.decode(dataset.val[:4]) == "abca"


@needs_gpt2
def test_nanogpts_folders_without_meta_hold_gpt2_tokens(tmp_path):
    assert data.load(nanogpt_folder(tmp_path, None)).tokenizer.n_vocab == 50257


class Evil:
    def __reduce__(self):
        return os.mkdir, ("the-pickle-ran",)


@pytest.mark.parametrize(
    "meta",
    [pickle.dumps(Evil()), pickle.dumps({"itos": Evil()}), pickle.dumps([1]), b"", b"garbage",
     pickle.dumps({"itos": {0: "ab", 1: "ab"}}), pickle.dumps({"itos": {1: "a"}})],
)  # fmt: skip
def test_a_pickle_that_is_not_plain_is_refused_and_never_run(tmp_path, monkeypatch, meta):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"is not nanoGPT's plain meta\.pkl"):
        data.load(nanogpt_folder(tmp_path, meta))
    assert not (tmp_path / "the-pickle-ran").exists()


def damage_nothing(folder):
    (folder / "val.bin").unlink()


def damage_length(folder):
    os.truncate(folder / "train.bin", 100)


def damage_odd(folder):
    os.truncate(folder / "train.bin", 101)


def damage_meta(folder):
    (folder / "meta.json").write_text('{"dtype": "float64"}')


def damage_counts(folder):
    (folder / "meta.json").write_text('{"dtype": "uint16", "train_tokens": "x", "val_tokens": 3}')


def damage_val(folder):
    (folder / "meta.json").unlink()
    (folder / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(map(chr, range(99))))}))
    os.truncate(folder / "val.bin", 2)


def damage_ids(folder):
    tokens = np.fromfile(folder / "train.bin", "<u2")
    tokens[1000] = 60_000
    tokens.tofile(folder / "train.bin")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_nothing, "expected train.bin and val.bin"),
        (damage_length, "holds 50 tokens, but meta.json says"),
        (damage_odd, "101 bytes are not whole uint16 tokens"),
        (damage_meta, "expected an object with dtype uint16 or uint32"),
        (damage_counts, "expected whole numbers train_tokens"),
        (damage_val, "holds one token"),
        (damage_ids, "holds token id 60000, beyond the"),
    ],
)
def test_a_damaged_set_is_refused_with_the_reason(tmp_path, damage, words):
    folder = prepared(tmp_path)
    damage(folder)
    with pytest.raises(UserError) as caught:
        data.load(folder)
    assert words in str(caught.value)


def test_the_fingerprint_follows_the_tokens_not_the_place(tmp_path):
    folder = prepared(tmp_path)
    first = data.load(folder).fingerprint
    folder = folder.rename(tmp_path / "moved")
    assert data.load(folder).fingerprint == first
    tokens = np.fromfile(folder / "train.bin", "<u2")
    tokens[-1] = (tokens[-1] + 1) % 10
    tokens.tofile(folder / "train.bin")
    assert data.load(folder).fingerprint != first


# ----------------------------------------------------------------------------- batches

TOKENS = np.arange(1000, dtype=np.uint16)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    batch = lambda seed, step: data.batch_at(TOKENS, seed, step, batch_size=8, block_size=16)  # noqa: E731
    assert np.array_equal(batch(1, 2), batch(1, 2))
    some = data.batch_at(TOKENS, 1, 2, batch_size=8, block_size=16, rows=slice(2, 5))
    assert np.array_equal(some, batch(1, 2)[2:5])
    seen = [batch(seed, step).tobytes() for seed in range(3) for step in range(3)]
    assert len(set(seen)) == 9
    assert batch(0, 0).shape == (8, 17) and batch(0, 0).dtype == np.int32
    assert (np.diff(batch(0, 0), axis=1) == 1).all()  # each row is a stretch of the text


def test_batches_cover_the_text_evenly_to_its_last_token():
    draws = [data.batch_at(TOKENS, 0, step, batch_size=64, block_size=16) for step in range(400)]
    starts = np.concatenate(draws)[:, 0]
    counts = np.bincount(starts, minlength=984)
    assert len(counts) == 984 and counts.min() > 0  # 984 = 1000 - 16 possible starts
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert abs(chi_square - 983) < 5 * np.sqrt(2 * 983)


@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 7), st.data())
def test_windows_cover_every_target_exactly_once_with_the_context_of_the_stride(
    n, block, rows, drawn
):
    tokens = np.arange(n)
    stride = drawn.draw(st.integers(1, block))
    some = data.spans(n, block, stride=stride)
    for start, end, first in some:
        assert end - start <= block + 1 and start < first < end
        assert start == 0 or first - start > block - stride
    targets = []
    for at in range(0, len(some), rows):
        windows, weights = data.windows_at(tokens, some[at : at + rows], block, rows)
        assert windows.shape == (rows, block + 1) and weights.shape == (rows, block)
        targets += windows[:, 1:][weights > 0].tolist()
    assert targets == list(range(1, n))


def test_fewer_windows_are_evenly_spaced_and_always_the_same():
    few = data.spans(100_001, 10, at_most=5)
    assert [span.start for span in few] == [0, 24990, 49990, 74990, 99990]
    assert [span.start for span in data.spans(51, 10, at_most=99)] == [0, 10, 20, 30, 40]


def test_the_command_prepares_and_says_how_to_train(command, text_file, tmp_path):
    result = command("-m", "gptjax.data", text_file, "--out", "mine")
    assert result.returncode == 0 and not result.stderr
    assert "python train_jax.py --data.dir mine" in result.stdout
    assert data.load(tmp_path / "mine").tokenizer.kind == "char"
    assert ROOT not in (tmp_path / "mine").parents
