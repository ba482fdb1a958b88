"""Opening prepared sets, ours and nanoGPT's, whole or damaged."""

import gc
import json
import os
import pickle
import resource
import struct

import numpy as np
import pytest
from fake_gcs import FakeGcs
from fuzz import damaged, read_or_refuse
from helpers import TEXT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax import files
from gptjax.data import tokenizers
from gptjax.data.batches import batch_at
from gptjax.data.token_files import Split, load, read_tokenizer
from gptjax.data.tokenizers import CharTokenizer
from gptjax.errors import RunError, UserError


def test_a_token_file_is_closed_with_its_last_reader(tmp_path):
    (tmp_path / "x.bin").write_bytes(bytes(8))
    tokens = Split([tmp_path / "x.bin"], [4], np.dtype("<u2"))
    (descriptor,) = tokens._files._descriptors
    os.fstat(descriptor)
    del tokens
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_truncated_token_file_is_a_clear_error(tmp_path):
    path = tmp_path / "train.bin"
    np.arange(100, dtype="<u2").tofile(path)
    tokens = Split([path], [100], np.dtype("<u2"))
    assert len(tokens) == 100 and tokens[7:12].tolist() == [7, 8, 9, 10, 11]
    assert tokens[98:200].tolist() == [98, 99] and not len(tokens[5:5])
    os.truncate(path, 100)
    assert tokens[40:50].tolist() == list(range(40, 50))
    with pytest.raises(RunError, match="shorter than when it was opened"):
        tokens[40:60]


# llm.c's folders


def _llm_c(path, ids, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())


def test_llm_cs_shards_are_used_as_they_are(tmp_path, gpt2):
    ids = [50256, *gpt2.encode("some text, and more of it")]
    _llm_c(tmp_path / "fineweb_train_000002.bin", ids[3:])
    _llm_c(tmp_path / "fineweb_train_000001.bin", ids[:3])
    dataset = load(tmp_path)
    assert dataset.train[:].tolist() == ids and len(dataset.val) == 0
    assert dataset.train[2:5].tolist() == ids[2:5] and dataset.tokenizer.is_gpt2s_own
    _llm_c(tmp_path / "fineweb_val_000000.bin", ids[::-1])
    assert load(tmp_path).val[:].tolist() == ids[::-1]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("a_train.bin", {"magic": 20240801, "version": 7}, "does not begin as llm.c's files"),
        ("a_train.bin", {"version": 2}, "does not begin as llm.c's files"),
        ("a_train.bin", {"count": 9}, "a_train.bin is damaged or was replaced"),
        ("a_train.bin", {"count": -1}, "does not begin"),
        ("a_train.bin", {"ids": []}, "does not begin"),
        ("a_train.bin", {"ids": [60000]}, "holds token id 60000"),
        ("a_val.bin", {}, "has no file for training"),
    ],
)
def test_bad_shards_of_llm_c_are_refused(tmp_path, gpt2, name, changes, words):
    _llm_c(tmp_path / name, **{"ids": [1, 2, 3]} | changes)
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert words in str(caught.value)


@given(damaged(struct.pack("<256i", 20240520, 1, 4, *[0] * 253) + bytes(8)))
def test_damaged_shards_of_llm_c_are_read_or_refused(tmp_path_factory, gpt2, content):
    folder = tmp_path_factory.mktemp("t")
    (folder / "a_train.bin").write_bytes(content)
    read_or_refuse(lambda: load(folder).train[:].tolist(), folder)


# nanoGPT's folders


def nanogpt_folder(folder, meta: bytes | None):
    ids = CharTokenizer("abc").encode("abcabcabc" * 5).astype("<u2")
    for split in ("train", "val"):
        ids.tofile(folder / f"{split}.bin")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(meta)
    return folder


META = {"vocab_size": 3, "itos": dict(enumerate("abc")), "stoi": {"a": 0, "b": 1, "c": 2}}


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_nanogpts_folders_are_used_as_they_are(tmp_path, protocol):
    dataset = load(nanogpt_folder(tmp_path, pickle.dumps(META, protocol)))
    assert dataset.tokenizer.decode(dataset.val[:4]) == "abca"
    os.truncate(tmp_path / "val.bin", 4)
    assert load(tmp_path).val[:].tolist() == [0, 1]


def test_a_nanogpt_folder_of_32_bit_tokens_is_recognised(tmp_path):
    folder = nanogpt_folder(tmp_path, pickle.dumps(META))
    expected = [load(folder).train[:].tolist(), load(folder).val[:].tolist()]
    for name in ("train", "val"):
        tokens = np.fromfile(folder / f"{name}.bin", "<u2")
        tokens.astype("<u4").tofile(folder / f"{name}.bin")
    assert [load(folder).train[:].tolist(), load(folder).val[:].tolist()] == expected


def test_nanogpts_folders_without_meta_hold_gpt2_tokens(tmp_path, gpt2):
    assert load(nanogpt_folder(tmp_path, None)).tokenizer.n_vocab == gpt2.n_vocab


class Evil:
    def __reduce__(self):
        return os.mkdir, ("the-pickle-ran",)


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        (pickle.dumps(Evil()), "it asks for posix.mkdir"),
        (pickle.dumps({"itos": Evil()}), "it asks for posix.mkdir"),
        (pickle.dumps([1]), ""),
        (b"", ""),
        (b"garbage", ""),
        (pickle.dumps({"itos": {0: "ab", 1: "ab"}}), "not single characters"),
        (pickle.dumps({"itos": {1: "a"}}), ""),
        (b"\x80\x04}r\xff\xff\xff\x7f.", "itos"),  # a memo of 2**31 entries
        (b"\x80\x04}N" + b"\x85" * 10**6 + b"Ns.", "more than dicts"),  # a million nested tuples
        (b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b".", "more than dicts"),  # 64 GiB of bytes
    ],
)
def test_a_hostile_pickle_is_refused_and_never_run(tmp_path, monkeypatch, meta, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"is not nanoGPT's plain meta\.pkl: .*{words}"):
        load(nanogpt_folder(tmp_path, meta))
    assert not (tmp_path / "the-pickle-ran").exists()


def test_hugging_faces_tokenizer_json_is_not_ours(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    assert read_tokenizer(tmp_path) is None
    assert read_tokenizer(tmp_path / "nowhere") is None


# damage

N_TRAIN = int(len(TEXT) * 0.9)


def missing_split(folder):
    (folder / "val.bin").unlink()


def nothing(folder):
    for file in folder.iterdir():
        file.unlink()


def sharded(folder, shard_tokens=500, **meta):
    for split in ("train", "val"):
        tokens = np.fromfile(folder / f"{split}.bin", "<u2")
        (folder / f"{split}.bin").unlink()
        for i in range(0, len(tokens), shard_tokens):
            name = f"{split}-{i // shard_tokens:05d}.bin"
            tokens[i : i + shard_tokens].tofile(folder / name)
    known = json.loads((folder / "meta.json").read_text())
    meta = known | {"shard_tokens": shard_tokens} | meta
    (folder / "meta.json").write_text(json.dumps(meta))


def missing_shard(folder):
    sharded(folder)
    (folder / "train-00003.bin").unlink()


def shorter_shard(folder):
    sharded(folder)
    os.truncate(folder / "train-00001.bin", 400)


def endless_shards(folder):
    sharded(folder, train_tokens=10**15)


def shards_of_nothing(folder):
    sharded(folder, 500)
    meta = json.loads((folder / "meta.json").read_text()) | {"shard_tokens": 0}
    (folder / "meta.json").write_text(json.dumps(meta))


def shorter(folder):
    os.truncate(folder / "train.bin", 100)


def odd_length(folder):
    os.truncate(folder / "train.bin", 101)


def empty(folder):
    os.truncate(folder / "train.bin", 0)


def missing_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def no_json(folder):
    (folder / "meta.json").write_text("{")


def other_dtype(folder):
    (folder / "meta.json").write_text('{"dtype": "float64"}')


def no_count(folder):
    (folder / "meta.json").write_text('{"dtype": "uint16", "train_tokens": "x", "val_tokens": 3}')


def one_token(folder):
    (folder / "meta.json").unlink()
    (folder / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(map(chr, range(99))))}))
    os.truncate(folder / "val.bin", 2)


def unknown_id(folder):
    tokens = np.fromfile(folder / "train.bin", "<u2")
    tokens[1000] = json.loads((folder / "meta.json").read_text())["vocab_size"]
    tokens.tofile(folder / "train.bin")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (missing_split, "val.bin is missing; copy it again or prepare the set again"),
        (nothing, "expected meta.json, train.bin and val.bin in it"),
        (missing_shard, "train-00003.bin is missing"),
        (shorter_shard, "train-00001.bin is damaged or was replaced: it has 400 bytes, not 500"),
        (endless_shards, "train-00043.bin is damaged or was replaced"),
        (shards_of_nothing, "(and shard_tokens, if there are shards)"),
        (
            shorter,
            f"was replaced: it has 100 bytes, not {N_TRAIN:,} uint16 tokens",
        ),
        (odd_length, f"it has 101 bytes, not {N_TRAIN:,} uint16 tokens"),
        (empty, f"it has 0 bytes, not {N_TRAIN:,} uint16 tokens"),
        (missing_tokenizer, "and a tokenizer.json beside it; prepare"),
        (no_json, "is not valid JSON"),
        (other_dtype, "expected dtype uint16 or uint32"),
        (no_count, "whole numbers train_tokens and val_tokens"),
        (one_token, "val.bin is damaged or was replaced: it has 2 bytes, not 2 uint16 tokens"),
        (unknown_id, "holds token id 44, but its char tokenizer has 44 ids"),
    ],
)
def test_a_damaged_set_is_refused_with_the_reason(tmp_path, make_set, damage, words):
    folder = make_set(tmp_path)
    damage(folder)
    with pytest.raises(UserError) as caught:
        load(folder)
    assert words in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("shard_tokens", [97, 500, 10**9])
def test_shards_are_read_as_one(tmp_path, make_set, shard_tokens):
    folder = make_set(tmp_path)
    whole = load(folder)
    expected = whole.train[:]
    sharded(folder, shard_tokens)
    split = load(folder)
    assert split.fingerprint == whole.fingerprint
    for start, stop in ((0, len(expected)), (0, 1), (96, 98), (500, 1000), (499, 1001), (7, 7)):
        assert np.array_equal(split.train[start:stop], expected[start:stop])
    batches = [batch_at(tokens, 1, 2, batch_size=64, block_size=120) for tokens in
               (split.train, expected)]  # fmt: skip
    assert np.array_equal(*batches)


@pytest.fixture
def bucket(tmp_path, make_set, monkeypatch):
    """A set of shards on a disk, and what stands in for a bucket, which has it too."""
    fsspec = pytest.importorskip("gcsfs", reason="buckets take gcsfs").GCSFileSystem
    folder = make_set(tmp_path)
    sharded(folder)
    with FakeGcs() as gcs:
        for name, value in gcs.environment.items():
            monkeypatch.setenv(name, value)
        fsspec.clear_instance_cache()
        for file in folder.iterdir():
            gcs.put(f"bucket/a/set/{file.name}", file.read_bytes(), {})
        yield folder, gcs
    fsspec.clear_instance_cache()


def test_a_set_in_a_bucket_is_that_on_the_disk(bucket):
    there, here = load(files.path("gs://bucket/a/set")), load(bucket[0])
    assert there.fingerprint == here.fingerprint
    assert there.tokenizer.state() == here.tokenizer.state()
    batches = [batch_at(tokens, 1, 2, batch_size=300, block_size=120) for tokens in
               (there.train, here.train)]  # fmt: skip
    assert np.array_equal(*batches)


def test_a_set_that_is_not_in_the_bucket_is_told(bucket):
    with pytest.raises(UserError, match="gs://bucket/a/other is not a prepared data set"):
        load(files.path("gs://bucket/a/other"))


def test_a_bucket_that_refuses_is_told_so(bucket):
    folder = files.path("gs://bucket/a/set")
    bucket[1].forbidden = "bucket"
    with pytest.raises(UserError, match="cannot read gs://bucket/a/set: Forbidden"):
        load(folder)


def test_more_shards_than_files_may_be_open_is_told_so(tmp_path, make_set):
    folder = make_set(tmp_path)
    sharded(folder, 97)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, hard))
    try:
        with pytest.raises(UserError, match=r"has \d+ shards, .*ulimit -n.*larger --shard-tokens"):
            load(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_long_read_is_taken_in_parts(tmp_path, monkeypatch):
    np.arange(100, dtype="<u2").tofile(tmp_path / "x.bin")
    tokens, real = Split([tmp_path / "x.bin"], [100], np.dtype("<u2")), os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: real(file, min(size, 7), at))
    assert tokens[3:97].tolist() == list(range(3, 97))
    with pytest.raises(ValueError, match="steps of 2"):
        tokens[::2]


def test_a_shard_that_goes_away_is_named(bucket):
    tokens = load(files.path("gs://bucket/a/set")).train
    held = bucket[1].objects["bucket/a/set/train-00002.bin"]
    bucket[1].objects["bucket/a/set/train-00002.bin"] = held[0], held[1][:700]
    for start in (1300, 1360):
        with pytest.raises(RunError, match=r"gs://bucket/a/set/train-00002\.bin is shorter than"):
            tokens[start : start + 60]
    del bucket[1].objects["bucket/a/set/train-00002.bin"]
    with pytest.raises(RunError, match=r"read gs://bucket/a/set/train-00002\.bin: it is no longer"):
        tokens[1300:1400]
    assert len(tokens[:1000]) == 1000


def test_the_fingerprint_follows_the_tokens_not_the_path(tmp_path, make_set):
    folder = make_set(tmp_path)
    first = load(folder).fingerprint
    folder = folder.rename(tmp_path / "moved")
    assert load(folder).fingerprint == first
    tokens = np.fromfile(folder / "train.bin", "<u2")
    tokens[-1] = (tokens[-1] + 1) % 10
    tokens.tofile(folder / "train.bin")
    assert load(folder).fingerprint != first


def test_fingerprints_are_those_of_the_first_edition(tmp_path):
    """Its checkpoints name them. A long split is sampled, from its beginning to its end."""
    nanogpt_folder(tmp_path, pickle.dumps(META))
    assert (
        load(tmp_path).fingerprint
        == "e46421f345c9a28d97c426e4649ef839c6ff85fb27c31da8cfe7e74b67080140"
    )
    with (tmp_path / "train.bin").open("r+b") as file:
        file.truncate(100_000_002)  # a file with a hole takes no room
        for position in range(0, 100_000_000, 250_000):
            file.seek(position)
            file.write(b"\x02\0")
    assert (
        load(tmp_path).fingerprint
        == "df4bae57b1e6a60819a55dc09f3443e1f8268dfa0913a9075667b64f186933a6"
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_set, byte_pairs, sentence_pieces):
    """One of each kind."""
    root = tmp_path_factory.mktemp("folders")
    make_set(root)
    for name, tokenizer in (
        ("char", CharTokenizer("\n abc")),
        ("gpt2", byte_pairs),
        ("sentencepiece", sentence_pieces),
    ):
        (root / name).mkdir()
        (root / name / "tokenizer.json").write_text(tokenizers.to_json(tokenizer))
    for name, protocol in (("pickled", 5), ("pickled-ascii", 0)):
        (root / name).mkdir()
        (root / name / "meta.pkl").write_bytes(pickle.dumps(META, protocol))
    return root


FILES = [
    *("set/meta.json", "set/tokenizer.json", "set/val.bin", "pickled/meta.pkl"),
    *("pickled-ascii/meta.pkl", "char/tokenizer.json", "gpt2/tokenizer.json"),
    "sentencepiece/tokenizer.json",
]


@settings(max_examples=40, suppress_health_check=[*HealthCheck])
@given(drawn=st.data())
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_or_refused(folders, name, drawn):
    path = folders / name

    def read():
        if path.parent.name == "set":
            load(path.parent)
        elif tokenizer := read_tokenizer(path.parent):  # what is read as a tokenizer works
            tokenizer.encode("ab \n\u2581\0é\ud800", skip_unknown=True)
            tokenizer.decode(range(min(tokenizer.n_vocab, 1000)))

    whole = path.read_bytes()
    read()
    try:
        path.write_bytes(drawn.draw(damaged(whole)))
        read_or_refuse(read, path.parent)
    finally:
        path.write_bytes(whole)


def test_pieces_that_are_not_distinct_are_refused(tmp_path):
    state = {"kind": "gpt2", "pieces": "YQ== YQ=="}  # tiktoken would panic
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="not distinct"):
        read_tokenizer(tmp_path)
