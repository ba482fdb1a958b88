"""Files and folders, on a disk and in a bucket (a server on this machine stands in for it)."""

import io
import json
import os
import re
import socket
import sys
import time
import types
from pathlib import Path
from unittest import mock

import pytest
from fake_gcs import FakeGcs
from helpers import GENERATE, TIMED, TINY, TRAIN, assert_one_clear_line, finish, logged, start

from gptjax import files
from gptjax.errors import UserError

BUCKET = ["--run-dir", "gs://bucket/run"]


def test_a_path_is_a_folder_wherever_the_home_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert files.path("~/runs/a b") == Path("/home/me/runs/a b")
    assert files.path("runs/x:y") == Path("runs/x:y") and not files.is_remote(files.path("runs"))
    monkeypatch.setenv("GPTJAX_CACHE_DIR", "")
    assert files.cache_dir() == Path("/home/me/.cache/gptjax")


def test_only_buckets_of_google_are_known(monkeypatch):
    with pytest.raises(UserError, match="s3:// is not supported; use a folder or gs://BUCKET"):
        files.path("s3://bucket/run")
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install gcsfs"):
        files.path("gs://bucket/run")


@pytest.mark.parametrize("name", ["gs://", "gs:///run"])
def test_a_bucket_has_a_name(name):
    with pytest.raises(UserError, match=f"{name} names no bucket; expected gs://BUCKET/"):
        files.path(name)


def test_a_bucket_out_of_reach_is_told_at_once(monkeypatch):
    with socket.socket() as nobody:  # bound, but it does not listen
        nobody.bind(("127.0.0.1", 0))
        server = f"127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{server}")
        began = time.monotonic()
        with pytest.raises(UserError, match=rf"cannot reach gs://far at {server}: .*refused"):
            files.path("gs://far/run")
    assert time.monotonic() - began < 20


def test_a_bucket_that_is_forbidden_is_told_so(monkeypatch):
    with FakeGcs() as gcs:
        for name, value in gcs.environment.items():
            monkeypatch.setenv(name, value)
        gcs.forbidden = "secret"
        with pytest.raises(UserError, match=r"cannot reach gs://secret at .*: Forbidden"):
            files.path("gs://secret/run")
        assert files.path("gs://open/run").name == "run"


def test_a_text_is_decoded_by_one_rule(tmp_path, monkeypatch):
    path = tmp_path / "text"
    for content, text in [
        (b"\xef\xbb\xbfa\r\nb\rc\n", "a\r\nb\rc\n"),  # no mark at the start; line ends stay
        ("ä☃".encode(), "ä☃"),
        (b"", ""),
    ]:
        path.write_bytes(content)
        assert files.read_text(path) == text
        stdin = types.SimpleNamespace(buffer=io.BytesIO(content))
        monkeypatch.setattr(sys, "stdin", stdin)
        assert files.read_stdin("it") == text
    for content, why in [
        (b"ab\xff", "byte 0xff at 2"),
        ("ab".encode("utf-16"), "byte 0x00 at 3"),
        (b"a\0", "byte 0x00 at 1"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"text is not UTF-8 text .{why}"):
            files.read_text(path)


def test_what_never_ends_is_refused(monkeypatch):
    monkeypatch.setattr(files, "LONGEST_TEXT", 1000)
    with pytest.raises(UserError, match="/dev/zero is larger than 1,000 bytes, or never ends"):
        files.read_text(Path("/dev/zero"))
    with open("/dev/zero", "rb") as zeros:
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=zeros))
        with pytest.raises(UserError, match="it is larger than"):
            files.read_stdin("it")


def test_a_user_without_a_home_has_a_cache_and_a_clear_error(monkeypatch):
    monkeypatch.setattr(Path, "home", mock.Mock(side_effect=RuntimeError))
    monkeypatch.delenv("GPTJAX_CACHE_DIR", raising=False)
    assert files.cache_dir().name == f"gptjax-{os.getuid()}"
    with pytest.raises(UserError, match="no such home directory"):
        files.path("~no.such.user/x")
    assert files.path("./~x") == Path("./~x") and files.path("a~") == Path("a~")


def test_a_written_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    for text in ("old", "new é"):
        files.write_atomic(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["file.json"]

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        files.write_atomic(path, "half")
    assert path.read_text(encoding="utf-8") == "new é"


@pytest.mark.parametrize(
    ("content", "words"),
    [(b'{"a": 1', "is not valid JSON"), (b'{"a": 1, "a": 2}', "names 'a' twice"),
     (b"\xff", "is not UTF-8"), (b"[" * 100_000, "is not valid JSON"), (None, "cannot read")],
)  # fmt: skip
def test_a_file_that_is_no_json_is_named(tmp_path, content, words):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        files.read_json(path)
    assert str(path) in str(caught.value)


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "[b]"
    with pytest.raises(KeyError), files.new_folder(path) as scratch:
        (scratch / "half").touch()
        raise KeyError
    assert not os.listdir(path.parent)
    with files.new_folder(path) as scratch:
        (scratch / "file").touch()
        assert not path.exists()
    assert os.listdir(path.parent) == ["[b]"] and os.listdir(path) == ["file"]
    with pytest.raises(OSError), files.new_folder(path) as scratch:
        (scratch / "other").touch()
    assert os.listdir(path) == ["file"]


def test_only_leftovers_of_ended_processes_are_removed(tmp_path):
    path = tmp_path / "data"
    (tmp_path / ".data.dead").mkdir()
    (tmp_path / ".other.dead").mkdir()
    with files.new_folder(path) as first:
        assert not (tmp_path / ".data.dead").exists() and (tmp_path / ".other.dead").exists()
        with files.new_folder(path) as second:
            assert first.exists() and second != first


@pytest.fixture
def gcs():
    pytest.importorskip("gcsfs", reason="buckets take gcsfs")
    with FakeGcs() as server:
        yield server


def checkpoints(gcs) -> tuple[set[str], set[str]]:
    """(finished, unfinished) steps."""
    found = [name.split("/") for name in gcs.objects if re.search(r"/checkpoints/\d+/", name)]
    marked = {parts[3] for parts in found if parts[4:] == ["commit_success.txt"]}
    return marked, {parts[3] for parts in found} - marked


def metrics(gcs) -> list[dict]:
    """metrics.jsonl without its timing fields."""
    rows = map(json.loads, gcs.objects["bucket/run/metrics.jsonl"][1].splitlines())
    return [{k: r[k] for k in r if k not in TIMED} for r in rows]


@pytest.mark.slow
def test_a_run_in_a_bucket_killed_while_saving_goes_on(
    gcs, uninterrupted, tmp_path, text_file, cache_dir, command
):
    gcs.stall = "checkpoints/30/commit_success.txt"
    process = start(tmp_path, cache_dir, *TINY, *BUCKET, **gcs.environment)
    assert gcs.stalled.wait(120)
    process.kill()
    finish(process)
    gcs.stall = None
    assert checkpoints(gcs)[1] == {"30"} and "20" in checkpoints(gcs)[0]
    result = command(TRAIN, *BUCKET, **gcs.environment)
    assert result.returncode == 0 and "resumed at step 20" in result.stdout, result.stderr
    assert {"30", "40"} <= checkpoints(gcs)[0] and not checkpoints(gcs)[1]
    assert metrics(gcs) == logged(uninterrupted[0])
    sample = command(GENERATE, *BUCKET, "--max-new-tokens", "20", **gcs.environment)
    assert sample.returncode == 0 and len(sample.stdout) > 20, sample.stderr
    assert set(os.listdir(tmp_path)) == {"text.txt", "data"}  # no folder "gs:"


@pytest.mark.slow
def test_data_in_a_bucket_train_as_those_on_a_disk(gcs, uninterrupted, tmp_path, command):
    prepared = next((uninterrupted[0].parent / "data").iterdir())
    for file in prepared.iterdir():
        gcs.put(f"bucket/sets/mine/{file.name}", file.read_bytes(), {})
    flags = ["--data.source", "None", "--data.dir", "gs://bucket/sets/mine", "--run-dir", "run"]
    result = command(TRAIN, *TINY, *flags, **gcs.environment)
    assert result.returncode == 0 and "gs://bucket/sets/mine: " in result.stdout, result.stderr
    assert logged(tmp_path / "run") == logged(uninterrupted[0])
    flags = ["--run-dir", "run", "--split", "val"]
    result = command("-m", "gptjax", "evaluate", *flags, **gcs.environment)
    assert result.returncode == 0 and "nats per token" in result.stdout, result.stderr


@pytest.mark.slow
def test_a_corrupted_checkpoint_in_a_bucket_is_set_aside(gcs, tmp_path, text_file, cache_dir):
    short = [*TINY, *BUCKET, "--max-steps", "20", "--lr-decay-steps", "40"]
    assert finish(start(tmp_path, cache_dir, *short, **gcs.environment)).returncode == 0
    for name, (generation, content) in gcs.objects.items():
        if re.search(r"/checkpoints/20/.*/d/", name):
            gcs.objects[name] = generation, content[: len(content) // 2]
    more = [*BUCKET, "--max-steps", "30"]
    result = finish(start(tmp_path, cache_dir, *more, **gcs.environment))
    assert result.returncode == 0 and "resumed at step 10" in result.stdout, result.stderr
    assert "checkpoints/20" in result.stdout
    assert any(name.startswith("bucket/run/damaged-20/") for name in gcs.objects)


@pytest.mark.slow
def test_a_bucket_that_refuses_writes_is_one_clear_line(gcs, tmp_path, text_file, cache_dir):
    gcs.refuse = "checkpoints"
    result = finish(start(tmp_path, cache_dir, *TINY, *BUCKET, **gcs.environment))
    result.stderr = result.stderr[result.stderr.index("error: ") :]  # tensorstore tells its token
    assert_one_clear_line(result, "cannot save a checkpoint in gs://bucket/run", code=1)


@pytest.mark.slow
def test_no_run_in_a_bucket_is_one_clear_line(gcs, command):
    result = command(GENERATE, *BUCKET, **gcs.environment)
    assert_one_clear_line(result, "no run in gs://bucket/run")
