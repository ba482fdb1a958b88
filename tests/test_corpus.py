"""Finding and reading text: every source, every kind of bad file."""

import hashlib
import itertools
import json

import pytest
from conftest import TEXT, assert_one_clear_line
from hypothesis import given
from hypothesis import strategies as st

from gptjax import corpus
from gptjax.errors import UserError


def texts(*files):
    return ["".join(document) for document in corpus.read_documents(list(files))]


def test_the_builtin_corpus_is_this_pythons_own_source_in_ascii():
    files = corpus.find_files("builtin")
    names = {path.name for path in files}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert files == sorted(files)
    assert not [path for path in files if "site-packages" in path.parts or "test" in path.parts]


def test_files_folders_and_globs_are_found_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.jsonl", "d.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    find = lambda source: [p.name for p in corpus.find_files(str(source))]  # noqa: E731
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    assert find(tmp_path) == ["a.txt", "b.txt", "c.jsonl"]
    assert find(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert find(tmp_path / "**/*.jsonl") == ["c.jsonl"]
    assert find(tmp_path / "d.bin") == ["d.bin"]
    for nothing in ("nope.txt", tmp_path / "*.md"):
        with pytest.raises(UserError, match="no text at"):
            find(nothing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.txt or \.jsonl"):
        find(tmp_path / "empty")


@given(st.text(alphabet="ab é\n\t\u2003'"), st.integers(1, 9))
def test_pieces_join_to_the_text_and_end_after_words(tmp_path_factory, text, size):
    if not text:
        return
    path = tmp_path_factory.mktemp("t") / "t.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "READ_BYTES", size)
        (document,) = corpus.read_documents([path])
        pieces = list(document)
    assert "".join(pieces) == text
    for before, after in itertools.pairwise(pieces):
        assert not before[-1].isspace() and after[0] in " \n"


def test_a_text_without_white_space_is_cut_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "READ_BYTES", 10)
    monkeypatch.setattr(corpus, "LONGEST_PIECE", 30)
    (tmp_path / "t.txt").write_text("x" * 100)
    (document,) = corpus.read_documents([tmp_path / "t.txt"])
    pieces = list(document)
    assert "".join(pieces) == "x" * 100 and max(map(len, pieces)) <= 40


def test_a_long_blank_run_is_read_in_a_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "READ_BYTES", 10_000)
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


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"abc\0def", "looks binary (a NUL byte at 3)"),
        ("a.txt", b"abc \xff\xfe", "is not UTF-8 (byte 0xff at 4)"),
        ("a.txt", "é".encode()[:1], "is not UTF-8 (byte 0xc3 at 0)"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": "x"}\n{', "line 2 is not JSON"),
        ("a.jsonl", b'\n{"body": "x", "id": 1}', "line 2 has no string field `text` (it has body"),
        ("a.jsonl", b'["text"]', "line 1 has no string field"),
        ("a.jsonl", b'{"text": 3}', "line 1 has no string field `text` (it has text: 3)"),
        ("a.jsonl", b"\xff", "line 1 is not JSON in UTF-8"),
    ],
)
def test_a_bad_file_is_named_with_the_place_of_the_fault(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        texts(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and words in str(caught.value)


def test_the_fault_s_place_counts_from_the_file_s_start(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "READ_BYTES", 4)
    (tmp_path / "a.txt").write_bytes(b"abcdefg\xc3\xc3")
    with pytest.raises(UserError, match="byte 0xc3 at 7"):
        texts(tmp_path / "a.txt")


def test_shakespeare_offline_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(corpus, "SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    with pytest.raises(UserError, match=f"put the file from .* at {tmp_path}/tinyshakespeare.txt"):
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


def test_surrogates_spelled_in_json_become_encodable_text(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"text": "x \ud800 y"}))
    (text,) = texts(path)
    assert text.encode().decode() == text


def test_the_command_reports_a_bad_text_in_one_line(command, tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xff")
    assert_one_clear_line(command("-m", "gptjax.data", "t.txt"), "t.txt", "not UTF-8")
