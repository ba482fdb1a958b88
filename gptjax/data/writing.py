"""Writing a set's token files, and the record from which a killed process's work goes on."""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptjax import files
from gptjax.data.token_files import file_name
from gptjax.errors import UserError

RECORD = "progress.json"
INTERVAL = 10.0
"""Seconds of work that a kill may cost."""


class Writer:
    """Writes a split, in shards if they are wanted. Each file is on the disk when it ends."""

    def __init__(
        self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int | None, written: int = 0
    ):
        """`written`: tokens that are there already; what lies beyond is cut off. Raises OSError."""
        self._folder, self._split, self._dtype = folder, split, dtype
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self.written = written
        if used := written % shard_tokens if shard_tokens else written:
            self._file = self._path().open("r+b")
            self._file.truncate(used * dtype.itemsize)
            self._file.seek(0, os.SEEK_END)

    def write(self, ids: np.ndarray) -> None:
        """Raises OSError."""
        size = self._shard_tokens
        while len(ids):
            if self._file is None:
                self._file = self._path().open("wb")
            left = size - self.written % size if size else len(ids)
            self._file.write(ids[:left].astype(self._dtype).tobytes())
            self.written += len(ids[:left])
            ids = ids[left:]
            if size and self.written % size == 0:
                self._end_file()

    def sync(self) -> None:
        """What has been written is on the disk then. Raises OSError."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def _path(self) -> Path:
        size = self._shard_tokens
        return self._folder / file_name(self._split, self.written // size if size else None)

    def _end_file(self) -> None:
        if self._file:
            self.sync()
            self._file.close()
            self._file = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        if failure is None:
            self._end_file()
            if not self.written:
                self._path().touch()
        elif self._file:
            self._file.close()


@dataclasses.dataclass
class Record:
    """How far a set has come."""

    recipe: str
    """What decides on the set."""
    totals: list[int | None]
    """Characters of each text, where they are known."""
    shares: list[int | None]
    """So many of them are for training; None: all."""
    text: int = 0
    """The one in progress."""
    pieces: int = 0
    """Of it, that are done."""
    characters: int = 0
    """In all texts so far."""
    marks: int = 0
    """Of end-of-text tokens that are spelled in them."""
    counts: list[int] = dataclasses.field(default_factory=list)
    """Training tokens of each text that is done."""
    train: int = 0
    val: int = 0
    """Tokens written."""

    def __post_init__(self) -> None:
        self._saved = time.monotonic()

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._saved > INTERVAL

    def save(self, folder: Path, train: Writer, val: Writer) -> None:
        """After what it counts. Raises OSError."""
        train.sync()
        val.sync()
        self.train, self.val = train.written, val.written
        files.write_atomic(folder / RECORD, json.dumps(dataclasses.asdict(self)))
        self._saved = time.monotonic()


def load(folder: Path, recipe: str) -> Record | None:
    """That of a killed process which was making the same set here; None: there is none, and the
    folder is empty now."""
    try:
        found: Any = Record(**files.read_json(folder / RECORD))
        if found.recipe == recipe:
            return found
    except (UserError, TypeError):
        pass  # it has none, or one of another version
    for path in folder.iterdir():
        path.unlink()
    return None
