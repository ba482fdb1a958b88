"""Weights & Biases."""

import contextlib
import html
import json
import os
import struct
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptjax import files
from gptjax.trackers.base import Entry, Tracker

BLOCK, HEAD = 32768, 7
"""Bytes of a record file's blocks, and of the head of the file and of each part of a record."""


class Wandb(Tracker):
    """A run of the project WANDB_PROJECT (gptjax, if that is not set), recorded in RUN_DIR/wandb
    and sent to the server; only recorded where WANDB_MODE is offline, or nobody is logged in. Its
    id lies in RUN_DIR/wandb.json. A record cannot be cut, so what is taken again is left out."""

    package = "wandb"

    def open(self, run_dir: Path, step: int, settings: Mapping[str, Any]) -> None:
        import wandb

        path, run_id = run_dir / "wandb.json", uuid.uuid4().hex[:12]
        if step and path.exists():
            run_id = files.read_json(path)["id"]
        else:  # a run that begins anew is another one
            files.write_atomic(path, json.dumps({"id": run_id}) + "\n")
        folder = files.cache_dir() if files.is_remote(run_dir) else run_dir
        recorded = [
            step
            for file in folder.glob(f"wandb/offline-*-{run_id}/run-{run_id}.wandb")
            for step in steps(file.read_bytes())
        ]
        mode: Any = os.environ.get("WANDB_MODE") or "online"
        if mode == "online" and not wandb.login(prompt=False):
            mode = "offline"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "gptjax", name=run_dir.name, dir=folder,
            id=run_id, resume="allow", mode=mode, config=dict(settings), reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        self._html, self._histogram = wandb.Html, wandb.Histogram
        if self._run.offline:
            self.where = f"wandb sync {Path(self._run.dir).parent}"
            self.next_step = max(recorded, default=-1) + 1
        else:  # the server knows what has reached it
            self.where, self.next_step = self._run.url or "", self._run.step

    def log(self, entry: Entry) -> None:
        texts = {
            name: self._html(f"<pre>{html.escape(text)}</pre>", data_is_not_path=True)
            for name, text in entry.texts.items()
        }
        values = {name: self._histogram(each.tolist()) for name, each in entry.histograms.items()}
        self._run.log({**entry.numbers, **texts, **values}, step=entry.step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def steps(content: bytes) -> Iterator[int]:
    """Those that a record file has the numbers of. What is damaged is passed over."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    message = wandb_internal_pb2.Record  # type: ignore[attr-defined]
    for part in whole_records(content):
        with contextlib.suppress(DecodeError):
            record = message.FromString(part)
            if record.HasField("history"):
                yield record.history.step.num


def whole_records(content: bytes) -> Iterator[bytes]:
    """Of a record file, which a kill may have cut: a log of LevelDB's kind. (Its parts have a
    checksum, a length, and a kind: 1 whole, 2 the first, 3 in the middle, 4 the last.)"""
    at, record = HEAD, b""
    while at + HEAD <= len(content):
        if BLOCK - at % BLOCK < HEAD:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record = (record if kind in (3, 4) else b"") + content[at + HEAD : at + HEAD + length]
        at += HEAD + length
        if kind in (1, 4) and at <= len(content):
            yield record
