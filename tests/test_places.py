"""Where a run lives: a folder, or a bucket (a server on this machine stands in for it)."""

import json
import os

import pytest
from conftest import ROOT, assert_one_clear_line
from fake_gcs import FakeGcs
from runs import TINY, TRAIN, finish, logged, start

from gptjax import places
from gptjax.errors import UserError

BUCKET = ["--run-dir", "gs://bucket/run"]


@pytest.fixture
def gcs():
    with FakeGcs() as server:
        yield server


def checkpoints(gcs) -> tuple[set[str], set[str]]:
    """(finished, unfinished) steps."""
    found = [name.split("/") for name in gcs.objects if "/checkpoints/" in name]
    marked = {parts[3] for parts in found if parts[4:] == ["commit_success.txt"]}
    return marked, {parts[3] for parts in found} - marked


def metrics(gcs) -> list[dict]:
    """metrics.jsonl without its timing fields."""
    rows = map(json.loads, gcs.objects["bucket/run/metrics.jsonl"][1].splitlines())
    return [{k: r[k] for k in r if k not in ("seconds", "tokens_per_second")} for r in rows]


def test_a_run_in_a_bucket_killed_while_saving_goes_on_and_is_sampled_there(
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
    sample = command(ROOT / "generate_jax.py", *BUCKET, "--max-new-tokens", "20", **gcs.environment)
    assert sample.returncode == 0 and len(sample.stdout) > 20, sample.stderr
    assert set(os.listdir(tmp_path)) == {"text.txt", "data"}  # no folder "gs:"


def test_a_damaged_checkpoint_in_a_bucket_is_put_aside(gcs, tmp_path, text_file, cache_dir):
    short = [*TINY, *BUCKET, "--max-steps", "20", "--lr-decay-steps", "40"]
    assert finish(start(tmp_path, cache_dir, *short, **gcs.environment)).returncode == 0
    name = "bucket/run/checkpoints/20/_CHECKPOINT_METADATA"
    generation, content = gcs.objects[name]
    gcs.objects[name] = generation, content.replace(b"dropout", b"dropin", 1)
    more = [*BUCKET, "--max-steps", "30"]
    result = finish(start(tmp_path, cache_dir, *more, **gcs.environment))
    assert result.returncode == 0 and "resumed at step 10" in result.stdout, result.stderr
    assert "checkpoints/20 is damaged" in result.stdout
    assert any(name.startswith("bucket/run/damaged-20/") for name in gcs.objects)


def test_a_bucket_that_may_not_be_written_is_one_clear_line(gcs, tmp_path, text_file, cache_dir):
    gcs.refuse = "checkpoints"
    result = finish(start(tmp_path, cache_dir, *TINY, *BUCKET, **gcs.environment))
    result.stderr = result.stderr[result.stderr.index("error: ") :]  # tensorstore tells its token
    assert_one_clear_line(result, "cannot save a checkpoint in gs://bucket/run", code=1)


def test_no_run_in_a_bucket_is_one_clear_line(gcs, command):
    result = command(ROOT / "generate_jax.py", *BUCKET, **gcs.environment)
    assert_one_clear_line(result, "no run in gs://bucket/run")


def test_gs_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(places.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install gcsfs"):
        places.place("gs://bucket/run")


def test_a_replaced_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "file.json"
    for text in ("old", "new é"):
        places.replace_file(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["file.json"]


def test_a_lock_belongs_to_one_and_ends_with_it(tmp_path):
    first, second = places.RunLock(tmp_path), places.RunLock(tmp_path)
    assert first.acquire() is None
    assert f"process {os.getpid()} on" in second.acquire()
    del first
    assert places.RunLock(tmp_path).acquire() is None
