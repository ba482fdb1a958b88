"""Text into token files: exact, streaming, and never half."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from helpers import ROOT, SHAKESPEARE, TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from gptjax import files
from gptjax.config import DataConfig
from gptjax.data import corpus, prepare, readers, tokenizers, writing
from gptjax.data.token_files import load
from gptjax.data.tokenizers import CharTokenizer, SentencePieceTokenizer
from gptjax.errors import RunError, UserError

QUIET = Console(quiet=True)

needs_shakespeare = pytest.mark.skipif(
    not SHAKESPEARE.is_file(), reason="Tiny Shakespeare is not on this machine"
)


def everything(dataset) -> list[int]:
    return [*dataset.train[:], *dataset.val[:]]


@pytest.mark.parametrize("kind", ["char", "sentencepiece"])
def test_a_prepared_set_decodes_to_the_text(tmp_path, make_set, kind):
    folder = make_set(tmp_path, kind=kind)
    dataset = load(folder)
    decode = dataset.tokenizer.decode
    n_train = int(len(TEXT) * 0.9)
    assert (decode(dataset.train[:]), decode(dataset.val[:])) == (TEXT[:n_train], TEXT[n_train:])
    assert json.loads((folder / "meta.json").read_text()) == {
        "source": str(tmp_path / "text.txt"),
        "tokenizer": kind,
        "vocab_size": dataset.tokenizer.n_vocab,
        "dtype": "uint16",
        "characters": len(TEXT),
        "train_tokens": len(dataset.train),
        "val_tokens": len(dataset.val),
    }


@settings(max_examples=25)
@given(st.text(alphabet="ab'\u2581 \n\t\u2003é", min_size=40), st.integers(3, 30))
def test_tokens_do_not_depend_on_how_the_text_is_read(
    tmp_path_factory, make_set, byte_pairs, sentence_pieces, text, size
):
    """The property that makes streaming exact, for both tokenizers that merge characters."""
    for tokenizer in (byte_pairs, sentence_pieces):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(readers, "READ_BYTES", size)
            folder = make_set(tmp_path_factory.mktemp("t"), text, tokenizer=tokenizer)
        n_train = int(len(text) * 0.9)
        for split, part in (("train", text[:n_train]), ("val", text[n_train:])):
            ids = np.fromfile(folder / f"{split}.bin", "<u2")
            assert ids.tolist() == tokenizer.encode(part).tolist()


@pytest.mark.parametrize("shard_tokens", [None, 100])
def test_a_text_may_be_for_training_as_a_whole(tmp_path, make_set, byte_pairs, shard_tokens):
    for tokenizer in (None, byte_pairs):
        folder = tmp_path / ("pairs" if tokenizer else "char")
        dataset = load(make_set(folder, val=0, tokenizer=tokenizer, shard_tokens=shard_tokens))
        assert len(dataset.val) == 0 and dataset.val[:].tolist() == []
        assert dataset.tokenizer.decode(dataset.train[:]) == TEXT


def test_validation_may_have_a_text_of_its_own(tmp_path, make_set, byte_pairs, sentence_pieces):
    (tmp_path / "held_out.jsonl").write_text('{"text": "other né"}\n{"text": "text"}')
    for tokenizer in (None, byte_pairs, sentence_pieces):
        folder = tmp_path / (tokenizer.kind if tokenizer else "char")
        held_out = str(tmp_path / "held_out.jsonl")
        dataset = load(make_set(folder, val_source=held_out, tokenizer=tokenizer))
        decode, encode = dataset.tokenizer.decode, dataset.tokenizer.encode
        assert decode(dataset.train[:]) == TEXT
        between = encode("\n") if tokenizer is None else [tokenizer.eot]
        expected = [*encode("other né"), *between, *encode("text")]
        assert dataset.val[:].tolist() == expected


def test_a_mix_is_one_set_of_several_texts(tmp_path, byte_pairs):
    (tmp_path / "a.txt").write_text("first " * 20)
    (tmp_path / "b.txt").write_text("zebra " * 10)
    mix = (f"{tmp_path}/a.txt=3", f"{tmp_path}/b.txt=1")
    config = DataConfig(None, mix=mix, val_fraction=0.25)
    assert config.weights == [0.75, 0.25]
    for tokenizer in (None, byte_pairs):
        folder = tmp_path / ("pairs" if tokenizer else "char")
        prepare.prepare(config, folder, QUIET, tokenizer, shard_tokens=50)
        dataset = load(folder)
        decode = dataset.tokenizer.decode
        assert decode(dataset.train[:]) == "first " * 15 + ("zebra " * 8)[:45]
        assert decode(dataset.val[:]) == "first " * 5 + ("zebra " * 10)[45:]
        (a, first), (b, second) = dataset.parts
        assert (a, b) == (f"{tmp_path}/a.txt", f"{tmp_path}/b.txt")
        assert decode(dataset.train[:first]) == "first " * 15 and first + second == len(
            dataset.train
        )
    named = prepare.default_dir(config)
    assert named.name.startswith("a+b-char-".replace("+", "_"))
    assert prepare.default_dir(config.replace({"mix": mix[::-1]})) != named
    # The weights are of the batches, not of the tokens.
    assert prepare.default_dir(config.replace({"mix": (mix[0], mix[1] + "0")})) == named
    meta = json.loads((folder / "meta.json").read_text())
    for parts in ([["a", 1]], [["a"]], "a", [[1, 2]]):
        (folder / "meta.json").write_text(json.dumps(meta | {"parts": parts}))
        with pytest.raises(UserError, match=r"meta.json is damaged"):
            load(folder)


@needs_shakespeare
def test_shakespeare_by_character_has_nanogpts_counts(tmp_path):
    prepare.prepare(DataConfig(source=str(SHAKESPEARE)), tmp_path / "set", QUIET)
    dataset = load(tmp_path / "set")
    assert (len(dataset.train), len(dataset.val)) == (1_003_854, 111_540)
    assert dataset.tokenizer.n_vocab == 65


@needs_shakespeare
def test_shakespeare_in_gpt2_tokens_has_nanogpts_counts(tmp_path, gpt2):
    config = DataConfig(source=str(SHAKESPEARE), tokenizer="gpt2")
    prepare.prepare(config, tmp_path / "set", QUIET)
    dataset = load(tmp_path / "set")
    assert (len(dataset.train), len(dataset.val)) == (301_966, 36_059)


@pytest.mark.parametrize("shard_tokens", [1000, 3001, 10**9])
def test_shards_hold_the_same_tokens_with_one_file_name_each(tmp_path, make_set, shard_tokens):
    whole = load(make_set(tmp_path))
    source = DataConfig(str(tmp_path / "text.txt"), "char")
    prepare.prepare(source, tmp_path / "shards", QUIET, shard_tokens=shard_tokens)
    sharded = load(tmp_path / "shards")
    assert sharded.fingerprint == whole.fingerprint and everything(sharded) == everything(whole)
    sizes = files.sizes(tmp_path / "shards")
    for split, tokens in (("train", whole.train), ("val", whole.val)):
        full, rest = divmod(len(tokens), shard_tokens)
        expected = [shard_tokens] * full + [rest] * bool(rest)
        names = [f"{split}-{number:05d}.bin" for number in range(len(expected))]
        assert [sizes.pop(name) // 2 for name in names] == expected
    assert {*sizes} == {"meta.json", "tokenizer.json"}


def test_documents_are_separated(tmp_path, make_set, byte_pairs):
    lines = [{"text": "one two"}, {"text": "three"}, {"text": "x" * 20}]
    text = "\n".join(map(json.dumps, lines))
    by_char = load(make_set(tmp_path, text, "t.jsonl", val=0.5))
    assert by_char.tokenizer.decode(everything(by_char)) == "one two\nthree\n" + "x" * 20
    (tmp_path / "pairs").mkdir()
    ids = everything(load(make_set(tmp_path / "pairs", text, "t.jsonl", tokenizer=byte_pairs)))
    ends = [i for i, token in enumerate(ids) if token == byte_pairs.eot]
    assert len(ends) == 2
    assert byte_pairs.decode(ids[: ends[0]]) == "one two"


def test_an_end_of_text_in_the_text_is_noticed_and_may_be_meant(tmp_path, byte_pairs):
    (tmp_path / "t.txt").write_text("one<|endoftext|>two <|endoftext|>three\n" * 9)
    config, console = DataConfig(str(tmp_path / "t.txt")), Console(record=True, width=200)
    prepare.prepare(config, tmp_path / "a", console, byte_pairs)
    said = console.export_text()
    assert "<|endoftext|> in 18 places" in said and "--data.end-of-text '<|endoftext|>'" in said
    assert byte_pairs.eot not in everything(load(tmp_path / "a"))
    meant = config.replace(end_of_text="<|endoftext|>")
    prepare.prepare(meant, tmp_path / "b", console, byte_pairs)
    ids = everything(load(tmp_path / "b"))
    assert ids.count(byte_pairs.eot) == 18 and "note" not in console.export_text()
    assert byte_pairs.decode(ids[: ids.index(byte_pairs.eot)]) == "one"


def test_a_large_vocabulary_gets_uint32(tmp_path, make_set):
    text = "".join(map(chr, range(0x10000, 0x10000 + 70_000))) * 2
    dataset = load(make_set(tmp_path, text))
    assert dataset.train.dtype == np.uint32
    assert dataset.tokenizer.decode(everything(dataset)) == text


def test_sentencepiece_learns_from_all_of_the_text(
    tmp_path, make_set, sentence_pieces, monkeypatch
):
    """Short documents are sampled whole, every so often."""
    monkeypatch.setattr(prepare, "SENTENCEPIECE_SAMPLE", 2000)
    sampled = []

    def train(sample, vocab_size):
        sampled.extend(sample)
        return sentence_pieces

    monkeypatch.setattr(SentencePieceTokenizer, "train", train)
    lines = [json.dumps({"text": f"document number {n} of many, all short"}) for n in range(1000)]
    make_set(tmp_path, "\n".join(lines), "t.jsonl", kind="sentencepiece")
    assert 1000 < sum(map(len, sampled)) < 2500
    assert all(text.endswith("all short") for text in sampled)
    assert max(int(text.split()[2]) for text in sampled) > 900


def test_unknown_characters_are_refused_with_their_context(tmp_path, make_set):
    with pytest.raises(UserError, match=r"'w' \(U\+0077, in 'now'"):
        make_set(tmp_path, "now is", tokenizer=CharTokenizer("no is"))


# writing


def test_concurrent_processes_do_not_disturb_each_other(tmp_path):
    (tmp_path / "text.txt").write_text("some text to prepare\n" * 30)
    config = DataConfig(source=str(tmp_path / "text.txt"))
    failed = []

    def work(out):
        try:
            prepare.prepare(config, out, QUIET)
        except UserError as error:  # "exists already", if it came late
            if not out.exists():
                failed.append(error)

    for number in range(8):
        out = tmp_path / "sets" / str(number)
        threads = [threading.Thread(target=work, args=[out]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        load(out)
    assert not failed and len(os.listdir(tmp_path / "sets")) == 8


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path, make_set, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(RunError, match="No space left on device"):
        patch.setattr(os, "fsync", full)
        make_set(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    config = DataConfig(str(tmp_path / "text.txt"))
    with pytest.raises(RunError, match="cannot write"):
        prepare.prepare(config, tmp_path / "text.txt" / "set", QUIET)
    monkeypatch.setattr(files, "is_remote", lambda path: True)
    with pytest.raises(UserError, match="written to disk"):
        prepare.prepare(config, tmp_path / "set", QUIET)


def test_an_existing_folder_is_never_overwritten(tmp_path, make_set):
    make_set(tmp_path)
    before = (tmp_path / "set" / "train.bin").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        make_set(tmp_path, "other text " * 50)
    assert (tmp_path / "set" / "train.bin").read_bytes() == before


def test_a_text_too_short_for_two_splits_is_refused(tmp_path, make_set):
    with pytest.raises(UserError, match="expected at least 2 of each"):
        make_set(tmp_path, "abcdefgh")


SCRIPT = """
import re, sys
from pathlib import Path
from rich.console import Console
from gptjax.config import DataConfig
from gptjax.data.prepare import prepare
config = DataConfig("big.txt", tokenizer=sys.argv[1], sentencepiece_vocab_size=400)
prepare(config, Path("set"), Console(quiet=True))
print(int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


def start(folder, kind: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, kind],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_preparation_leaves_nothing_that_looks_whole(tmp_path):
    """Nor anything that another set takes for its own."""
    (tmp_path / "big.txt").write_text(TEXT * 1500)
    process = start(tmp_path, "sentencepiece")
    while not list(tmp_path.glob(".set.*/train.bin")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "set").exists()
    process = start(tmp_path, "char")
    process.communicate()
    assert process.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.txt", "set"]
    assert len(load(tmp_path / "set").train) == int(1500 * len(TEXT) * 0.9)


class Killed(BaseException):
    """Leaves all as a kill does."""


@settings(max_examples=15)
@given(st.integers(1, 40), st.none() | st.integers(5, 60), st.sampled_from(["", "val", "mix"]))
def test_a_killed_preparation_goes_on_to_the_same_set(
    tmp_path_factory, byte_pairs, saves, shard_tokens, kind
):
    """Killed after any of its records, with more written than the record counts."""
    folder = tmp_path_factory.mktemp("t")
    lines = [json.dumps({"text": f"document {i} " * (i % 7 + 1)}) for i in range(20)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.jsonl").write_text("\n".join(lines[::-1]))
    a, b = f"{folder}/a.jsonl", f"{folder}/b.jsonl"
    more = {"val": {"val_source": b}, "mix": {"source": None, "mix": (f"{a}=1", f"{b}=2")}}
    config = DataConfig(**{"source": a} | more.get(kind, {}))
    tokenizer = byte_pairs if kind != "mix" else None
    prepare.prepare(config, folder / "whole", QUIET, tokenizer, shard_tokens)
    save, left = writing.Record.save, saves

    def save_or_die(record, *args):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        save(record, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "INTERVAL", -1.0)
        patch.setattr(writing.Record, "save", save_or_die)
        patch.setattr(files.shutil, "rmtree", lambda *args, **how: None)
        with contextlib.suppress(Killed):
            prepare.prepare(config, folder / "set", QUIET, tokenizer, shard_tokens)
    killed = not (folder / "set").exists()
    if killed:
        begun = max((len(p.read_bytes()) for p in folder.glob(".set.*/train*.bin")), default=0)
        prepare.prepare(config, folder / "set", QUIET, tokenizer, shard_tokens)
        assert begun or saves == 1
    names = sorted(path.name for path in (folder / "whole").iterdir())
    assert sorted(path.name for path in (folder / "set").iterdir()) == names
    for name in names:
        assert (folder / "set" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
    assert not [*folder.glob(".*")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), [("char", 100_000_000), ("sentencepiece", 30_000_000)])
def test_a_long_text_is_tokenised_in_bounded_memory(tmp_path, kind, size):
    (tmp_path / "big.txt").write_text(TEXT * (size // len(TEXT)))
    out, _ = start(tmp_path, kind).communicate()
    assert int(out.split()[-1]) < 400  # MB; the text alone has 100, its tokens 200


# the default folder


def test_another_text_setting_or_tokenizer_gets_another_folder(tmp_path, monkeypatch, byte_pairs):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my text.txt").write_text(TEXT)

    def folder(kind="char", given=None, **settings):
        config = DataConfig("my text.txt", kind, **settings)
        return prepare.default_dir(config, given)

    first = folder()
    assert first == folder(sentencepiece_vocab_size=9) and first.parts[0] == "data"
    assert first.name.startswith("my_text-char-")
    assert folder("sentencepiece").name.startswith("my_text-sentencepiece4096-")
    others = [folder("gpt2"), folder("sentencepiece"), folder(val_fraction=0.2)]
    others += [folder(end_of_text="<|e|>"), folder(text_field="body")]
    others += [folder(val_fraction=0.0), folder(val_source=str(tmp_path / "my text.txt"))]
    others += [folder(given=tokenizer) for tokenizer in (byte_pairs, CharTokenizer("ab"))]
    (tmp_path / "my text.txt").write_text(TEXT + "more")
    others.append(folder())
    assert len({first, *others}) == 11


def test_the_default_folder_is_that_of_the_first_edition(tmp_path, monkeypatch):
    """Sets that it prepared are found again."""
    monkeypatch.setattr(corpus, "find", lambda *_: ([], Counter()))
    names = [
        str(prepare.default_dir(DataConfig("t.txt", tokenizer=kind), tokenizer))
        for kind in ("char", "gpt2", "sentencepiece")
        for tokenizer in (None, CharTokenizer("ab"))
    ]
    digests = ["50df0a52", "37eb39d9", "1c07d0ce", "63c4565b", "ef4d0a92", "c62b6da7"]
    assert [name[-8:] for name in names] == digests


def test_a_set_is_recognised_by_its_tokenizer(tmp_path, make_set, byte_pairs):
    folder = make_set(tmp_path)
    own = tokenizers.from_json((folder / "tokenizer.json").read_text(), "here")
    assert prepare.is_made_with(folder, own)
    assert not prepare.is_made_with(folder, byte_pairs)
    assert not prepare.is_made_with(tmp_path / "nothing", own)
