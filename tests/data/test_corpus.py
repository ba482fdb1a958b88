"""Finding and reading text: every source, every kind of bad file."""

import bz2
import contextlib
import gzip
import hashlib
import itertools
import json
import lzma
import sys
import types

import pytest
from fuzz import damaged, read_or_refuse
from helpers import TEXT
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data import corpus, hub, readers
from gptjax.data.corpus import Corpus
from gptjax.errors import UserError


def texts(*paths, field="text"):
    return ["".join(document) for path in paths for document in readers.read(path, field)]


def test_builtin_is_the_standard_librarys_source_in_ascii():
    found = corpus.find_files("builtin")
    assert {"argparse.py", "dataclasses.py"} <= {path.name for path in found}
    assert found == sorted(found)
    assert not [path for path in found if "site-packages" in path.parts or "test" in path.parts]


def test_files_folders_and_globs_are_found_in_order(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "sub/c.jsonl", "sub/D.NDJSON", "d.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()

    def found(source):
        return [path.name for path in corpus.find_files(str(source))]

    assert found(tmp_path) == ["a.txt", "b.txt", "D.NDJSON", "c.jsonl"]
    assert found(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert found(tmp_path / "**/*.jsonl") == ["c.jsonl"]
    assert found(tmp_path / "d.bin") == ["d.bin"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("~/a.txt") == ["a.txt"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nope.txt", "no text at 'nope.txt'"),
        ("*.md", "no text at"),
        ("https://host/a.txt", "'https://host/a.txt': expected builtin"),
        ("gs://bucket/a.txt", "on a disk of this machine"),
        ("empty", "no text at 'empty': expected builtin"),
        (None, "--data.source"),
    ],
)
def test_a_source_without_text_is_refused(tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        corpus.find_files(source)
    assert words in str(caught.value)


def test_what_is_left_out_of_a_folder_is_counted(tmp_path):
    contents = {
        "a.txt": "x", "b.TXT": "y", "c.jsonl": '{"text": "z"}', "d.json": '[{"text": "u"}]',
        "e.json": '{"text": "v"}\n{"text": "w"}', ".hidden.txt": "h",
        ".ipynb_checkpoints/a.txt": "h", "empty.txt": "", "notes.py": "", "code.py": "x = 1",
        "settings.json": '{"a": 1}', "run/config.json": "{}", "run/metrics.jsonl": "{}",
        "run/checkpoints/20.json": '{"text": "no"}', "run/checkpoints/20/d/c.txt": "no",
        "checkpoints/mine.txt": "t", "README": "x",
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(content)
    found, left_out = corpus.find(str(tmp_path))
    assert [path.name for path in found] == ["a.txt", "b.TXT", "c.jsonl", "mine.txt", "d.json",
                                               "e.json"]  # fmt: skip
    assert left_out == {"hidden": 2, "empty": 2, "of a run": 4, ".py": 1, ".json": 1,
                        "without an ending": 1}  # fmt: skip
    said = Corpus(str(tmp_path)).describe()
    assert said.startswith("files read: 3 as text, 2 as JSON lines, 1 as a JSON array; left out: 4")
    assert texts(*found) == ["x", "y", "z", "t", "u", "v", "w"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.txt", '{"text": "a"}\n{"text": "b"}'), ("t.JSONL", '{"text": "a"}\n{"text": "b"}'),
        ("t.ndjson", '\ufeff{"text": "a"}\n\n{"text": "b"}\n'),
        ("t", '\n{"text": "a"}\n{"text": "b"}'),
        ("t.json", '\ufeff [{"text": "a"},\n {"text": "b", "id": 2}]'),
    ],
)  # fmt: skip
def test_json_is_recognised_under_any_name(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert texts(tmp_path / name) == ["a", "b"]


def test_a_long_first_line_is_json_all_the_same(tmp_path):
    (tmp_path / "t").write_text(json.dumps({"text": "x" * (2 << 20)}))
    assert texts(tmp_path / "t") == ["x" * (2 << 20)]


def test_json_of_another_shape_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{\n "text": "x"\n}')
    with pytest.raises(UserError, match="neither an array of objects with a string `text` nor"):
        corpus.find_files(str(tmp_path / "a.json"))


@pytest.mark.parametrize(
    "content", ['{"text": "a"}\nprose', '{"a": 1}', "{text", "[1, 2]", '"text"', "{", "[" * 10**6]
)
def test_text_that_only_looks_like_json_stays_text(tmp_path, content):
    (tmp_path / "t.txt").write_text(content)
    assert texts(tmp_path / "t.txt") == [content]


@pytest.mark.parametrize("name", ["a.csv", "a.PDF", "a.csv.gz"])
def test_a_kind_that_is_not_read_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_text("x")
    for source in (tmp_path / name, tmp_path / "a.*"):
        with pytest.raises(UserError, match=rf"{name} is a \.\w+ file, which is not read"):
            corpus.find_files(str(source))


WRITERS = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
with contextlib.suppress(ImportError):
    import zstandard

    WRITERS[".zst"] = zstandard.compress


@pytest.mark.parametrize("suffix", WRITERS)
def test_compressed_files_are_read_as_what_they_hold(tmp_path, suffix):
    lines = b'{"text": "a"}\n{"text": "b"}\n'
    for name, content in (
        ("1.txt", b"one two"),
        ("2.jsonl", lines),
        ("3.json", b'[{"text": "c"}]'),
    ):
        # In two parts, as `cat` makes of two files.
        parts = WRITERS[suffix](content[:5]), WRITERS[suffix](content[5:])
        (tmp_path / f"{name}{suffix.upper()}").write_bytes(b"".join(parts))
    text = Corpus(str(tmp_path))
    assert ["".join(document) for document in text.documents()] == ["one two", "a", "b", "c"]
    assert text.size is None and "1 as text, 1 as JSON lines, 1 as a JSON array" in text.describe()


@given(st.sampled_from([*WRITERS]), st.data())
def test_damaged_compressed_files_are_read_or_refused(tmp_path_factory, suffix, data):
    path = tmp_path_factory.mktemp("t") / f"t.txt{suffix}"
    path.write_bytes(data.draw(damaged(WRITERS[suffix](b"some text, again and again " * 9))))
    for text in read_or_refuse(lambda: texts(path), path) or []:
        text.encode()


def _tables(folder, rows):
    """The rows as Parquet, and as Arrow's file and stream."""
    pyarrow = pytest.importorskip("pyarrow", reason="it is an extra")
    from pyarrow import feather, parquet

    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, folder / "a.parquet")
    feather.write_feather(table, str(folder / "b.feather"))
    with pyarrow.ipc.new_stream(folder / "c.arrow", table.schema) as stream:
        stream.write_table(table)
    return sorted(folder.iterdir())


def test_rows_of_tables_are_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "ROWS", 2)
    rows = [{"text": f"t{i}", "meta": {"body": f"b{i}", "n": i}, "a.b": "dot"} for i in range(5)]
    for path in _tables(tmp_path, rows):
        assert texts(path) == ["t0", "t1", "t2", "t3", "t4"]
        assert texts(path, field="meta.body") == ["b0", "b1", "b2", "b3", "b4"]
        assert texts(path, field="a.b") == ["dot"] * 5
        for field in ("body", "meta.n", "meta.body.x"):
            with pytest.raises(UserError, match=f"row 1 has no string `{field}`"):
                texts(path, field=field)
    assert "3 as a table" in Corpus(str(tmp_path)).describe()


def test_rows_have_all_their_fields_wherever_they_lie(tmp_path):
    rows = [{"a": "é", "b": [1, 2]}, {"a": "", "b": []}]
    lines = "".join(f"{json.dumps(row)}\n\n" for row in rows)
    (tmp_path / "d.json").write_text(json.dumps(rows))
    (tmp_path / "e.jsonl").write_text(f"\ufeff{lines}")
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "g").write_text(lines)  # lines of JSON, whatever the name
    found = {path: [*readers.rows(path)] for path in _tables(tmp_path, rows)}
    assert len(found) == 7
    assert all([row for _, row in each] == rows for each in found.values())
    assert {each[1][0].rpartition(", ")[2] for each in found.values()} == {
        "row 2",
        "item 2",
        "line 3",
    }
    for content, words in (("[1]", "item 1 is not a JSON object: 1"), ("", "is empty")):
        (tmp_path / "g").write_text(content)
        with pytest.raises(UserError, match=words):
            [*readers.rows(tmp_path / "g")]


@given(damaged(b'[{"a": 1}, {"a": 2}]'))
def test_damaged_rows_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("r") / "a.json"
    path.write_bytes(content)
    read_or_refuse(lambda: [*readers.rows(path)], path)


def test_a_row_without_text_is_named(tmp_path):
    for path in _tables(tmp_path, [{"text": "a"}, {"text": None}]):
        with pytest.raises(UserError, match=r"row 2 has no string `text`.*--data.text-field names"):
            texts(path)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(UserError, match="is empty"):
        texts(_tables(tmp_path, [])[0])


@given(st.integers(0, 2), st.data())
def test_damaged_tables_are_read_or_refused(tmp_path_factory, number, data):
    path = _tables(tmp_path_factory.mktemp("t"), [{"text": "a b"}, {"text": "c"}])[number]
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    for text in read_or_refuse(lambda: texts(path), path) or []:
        text.encode()


def test_any_field_of_json_may_hold_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": {"en": "x"}}\n{"body": {"en": "y"}}')
    (tmp_path / "b.json").write_text('[{"body": {"en": "z"}, "text": 3}]')
    (tmp_path / "c.txt").write_text('{"body": {"en": "w"}}')
    text = Corpus(str(tmp_path), "body.en")
    assert ["".join(document) for document in text.documents()] == ["x", "y", "z", "w"]
    with pytest.raises(UserError, match=r"with a string `body`: .*en"):
        texts(tmp_path / "a.jsonl", field="body")


@pytest.mark.parametrize(
    ("module", "name"), [("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet"), ("datasets", None)]
)
def test_a_missing_extra_is_one_line(tmp_path, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(hub.Split, "identity", lambda self: [])
    (tmp_path / (name or "x")).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"takes {module}: pip install 'gptjax\[data\]'"):
        [*Corpus(str(tmp_path / name) if name else "hf://a/b:train").pieces("|")]


def test_a_split_on_the_hub_is_streamed_at_one_commit(tmp_path, monkeypatch):
    """By `datasets` itself, from a folder in place of the Hub."""
    datasets = pytest.importorskip("datasets", reason="it is an extra")
    import huggingface_hub

    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n')
    load, asked = datasets.load_dataset, []

    def local(name, subset, **how):
        asked.append((name, subset, how.pop("revision")))
        return load(str(tmp_path), subset, **how)

    info = types.SimpleNamespace(sha="abc123")
    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name: info)
    text = Corpus("hf://owner/name:train")
    assert [*text.pieces("|")] == ["a", "|", "b", "|", "c"] and text.size is None
    assert asked == [("owner/name", None, "abc123")]
    assert text.identity() == [["hf://owner/name:train", "abc123"], "text"]
    with pytest.raises(UserError, match=r"cannot read hf://owner/name:nope: .*nope"):
        [*Corpus("hf://owner/name:nope").pieces("|")]
    with pytest.raises(UserError, match="row 1 has no string `body`"):
        [*Corpus("hf://owner/name:train", "body").pieces("|")]


@pytest.mark.parametrize("source", ["hf://", "hf://a", "hf://a/b/c/d:train", "hf://a b/c:train"])
def test_a_split_that_is_misspelled_is_refused(source):
    with pytest.raises(UserError, match="expected hf://OWNER/NAME:SPLIT"):
        Corpus(source)


@given(st.text(alphabet="ab é\n\t\u2003'", min_size=1), st.integers(1, 9))
def test_pieces_join_to_the_text_and_end_after_words(tmp_path_factory, text, size):
    path = tmp_path_factory.mktemp("t") / "t.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "READ_BYTES", size)
        (document,) = readers.read(path)
        pieces = list(document)
    assert "".join(pieces) == text
    for before, after in itertools.pairwise(pieces):
        assert not before[-1].isspace() and after[0] in " \n"


def test_text_without_white_space_is_cut_anyway(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "READ_BYTES", 10)
    monkeypatch.setattr(readers, "LONGEST_PIECE", 30)
    (tmp_path / "t.txt").write_text("x" * 100)
    (document,) = readers.read(tmp_path / "t.txt")
    pieces = list(document)
    assert "".join(pieces) == "x" * 100 and max(map(len, pieces)) <= 40


def test_a_long_run_of_white_space_is_read_in_linear_time(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "READ_BYTES", 10_000)
    path = tmp_path / "t.txt"
    for text in ("a" + " \n" * 200_000 + "b c", "1.234,56\r\n" * 200_000, "w\t " * 200_000):
        path.write_bytes(text.encode())
        assert texts(path) == [text]


def test_a_byte_order_mark_is_not_text_and_line_ends_stay(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeffa\r\nb".encode())
    assert texts(path) == ["a\r\nb"]


def test_jsonl_gives_one_document_a_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "one\\nline", "id": 1}\n\n{"text": "zwölf"}\n')
    assert texts(path) == ["one\nline", "zwölf"]
    assert [*Corpus(str(path)).pieces("|")] == ["one\nline", "|", "zwölf"]
    path.write_text(json.dumps({"text": "x \ud800 y"}))
    assert texts(path) == ["x ? y"]  # half a surrogate pair, which UTF-8 cannot spell


@given(st.lists(st.lists(st.text("ab \n", min_size=1), min_size=1), min_size=1), st.integers(1, 9))
def test_a_word_may_end_a_document_within_a_file(tmp_path_factory, documents, size):
    folder = tmp_path_factory.mktemp("t")
    for number, parts in enumerate(documents):  # a word is never cut, with white space around it
        text = "\n<|e|>\n".join(parts)
        (folder / f"{number:03}.txt").write_text(text, newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "READ_BYTES", size)
        found = "".join(Corpus(str(folder), end_of_text="<|e|>").pieces("|"))
    assert found == "|".join("\n|\n".join(parts) for parts in documents)
    (folder / "000.txt").write_text("<|e|>a<|e|><|e|>b<|e|>")
    assert "".join(Corpus(str(folder / "000.txt"), end_of_text="<|e|>").pieces("|")) == "a|b"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\xef\xbb\xbf", "is empty"),
        ("a.txt", b"abc\0def", "is not UTF-8 text (byte 0x00 at 3)"),
        ("a.txt", b"abc \xff\xfe", "is not UTF-8 text (byte 0xff at 4)"),
        ("a.txt", b"abcdefg\xc3\xc3", "is not UTF-8 text (byte 0xc3 at 7)"),
        ("a.txt", "é".encode()[:1], "is not UTF-8 text (byte 0xc3 at 0)"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": "x"}\n{', "line 2 is not a JSON object in UTF-8 with a string"),
        ("a.jsonl", b'\n{"body": "x", "id": 1}', 'with a string `text`: {"body": "x", "id": 1}'),
        ("a.jsonl", b'["text"]', "line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": 3}', 'with a string `text`: {"text": 3}'),
        ("a.jsonl", b"\xff", "line 1 is not a JSON object in UTF-8"),
        ("a.json", b'[{"text": "x"}, {"body": 1}]', "item 2 of its array is not an object with a"),
        ("a.json", b"[1", "is not valid JSON"),
        ("a.json", b"[]", "is empty"),
    ],
)
@pytest.mark.parametrize("size", [4, readers.READ_BYTES])
def test_a_bad_file_is_named_with_the_position(tmp_path, monkeypatch, name, content, words, size):
    monkeypatch.setattr(readers, "READ_BYTES", size)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        texts(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and words in str(caught.value)


@given(st.binary(max_size=30) | damaged("aé中😀\ufeff \n".encode() * 3), st.integers(1, 9))
def test_text_is_read_exactly_where_it_is_utf8_without_nul(tmp_path_factory, content, size):
    path = tmp_path_factory.mktemp("t") / "t.txt"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "READ_BYTES", size)
        found = read_or_refuse(lambda: texts(path), path)
    text = "" if b"\0" in content else content.decode(errors="replace").removeprefix("\ufeff")
    assert found == ([text] if text and text.encode() in content else None)


DOCUMENT = b'{"text": "a b", "id": 3}\n'


@given(damaged(DOCUMENT * 2))
def test_damaged_jsonl_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("t") / "t.jsonl"
    path.write_bytes(content)
    for text in read_or_refuse(lambda: texts(path), path) or []:
        text.encode()


def test_shakespeare_offline_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(corpus, "SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    with pytest.raises(UserError, match=f"{tmp_path}/tinyshakespeare.txt .*; put the file from"):
        corpus.find_files("shakespeare")


def test_shakespeare_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "source.txt").write_text(TEXT)
    monkeypatch.setattr(corpus, "SHAKESPEARE_URL", (tmp_path / "source.txt").as_uri())
    with pytest.raises(UserError, match="is not Tiny Shakespeare"):
        corpus.find_files("shakespeare")
    digest = hashlib.sha256(TEXT.encode()).hexdigest()
    monkeypatch.setattr(corpus, "SHAKESPEARE_SHA256", digest)
    (tmp_path / "cache" / "tinyshakespeare.txt").unlink()
    assert corpus.find_files("shakespeare")[0].read_text() == TEXT
    (tmp_path / "source.txt").unlink()
    assert corpus.find_files("shakespeare")[0].read_text() == TEXT
