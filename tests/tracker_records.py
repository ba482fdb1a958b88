"""What trackers have written, by readers of other programs: TensorBoard's own, SQL, and for wandb's
files, which have none, one of ours."""

import json
import sqlite3
import struct
import time

BLOCK, HEADER = 32768, 7
"""Bytes. A record file is a log of LevelDB's kind, after a head of seven bytes."""


def _records(path):
    """The messages of a record file."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts = path.read_bytes(), HEADER, b""
    assert content[:4] == b":W&B"
    while at + HEADER <= len(content):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + HEADER])
        if kind not in (1, 2, 3, 4):
            break
        parts += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if at > len(content):
            break
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def history_steps(path):
    items = (r.history.item for r in _records(path) if r.HasField("history"))
    return [int(x.value_json) for item in items for x in item if x.nested_key == ["_step"]]


def read_wandb(run_dir):
    """(the history's rows, ids of the run, its first settings) of all record files."""
    rows, ids, settings = [], set(), {}
    paths = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    ends = time.monotonic() + 20  # its process writes the last file's end when we have gone on
    while not any(r.HasField("exit") for r in _records(paths[-1])) and time.monotonic() < ends:
        time.sleep(0.05)
    for path in paths:
        for record in _records(path):
            if record.HasField("history"):
                rows.append(
                    {
                        item.key or "/".join(item.nested_key): json.loads(item.value_json)
                        for item in record.history.item
                    }
                )
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.run.config.update
                }
                settings = settings or config
    return rows, ids, settings


def read_tensorboard(run_dir):
    """({tag: [(step, value), ...]} of numbers, the same of texts, tags of histograms)."""
    from tensorboard.backend.event_processing import event_accumulator as accumulator

    events = accumulator.EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0})
    events.Reload()
    tags = events.Tags()
    numbers = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    texts = {
        tag: [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(tag)]
        for tag in tags["tensors"]
    }
    return numbers, texts, tags["histograms"]


def read_trackio(folder, project):
    """{run: [(step, values), ...]}, and the settings of each run."""
    with sqlite3.connect(folder / f"{project}.db") as database:
        runs = {}
        for name, step, values in database.execute(
            "SELECT run_name, step, metrics FROM metrics ORDER BY id"
        ):
            runs.setdefault(name, []).append((step, json.loads(values)))
        configs = dict(database.execute("SELECT run_name, config FROM configs"))
    return runs, {name: json.loads(text) for name, text in configs.items()}


def column(rows, name):
    return [(step, values[name]) for step, values in rows if values.get(name) is not None]
