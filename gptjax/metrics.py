"""metrics.jsonl: one JSON object a line, for every step that is reported."""

import contextlib
import json
import os
import time

from gptjax import config_io, files
from gptjax.devices import setup
from gptjax.errors import RunError, UserError, first_line
from gptjax.run_logs import FIELDS, read_metrics
from gptjax.trainer import Callback, Row, Trainer

BUCKET_INTERVAL = 15
"""Seconds between two writes of metrics.jsonl to a bucket."""


class MetricsLog(Callback):
    """Writes RUN_DIR/metrics.jsonl. A resumed run goes on in it: rows of steps that will be taken
    again are dropped first, and its seconds count on. A run that has lost its checkpoints is
    refused (UserError)."""

    def on_start(self, trainer: Trainer) -> None:
        self._path = trainer.checkpoints.run_dir / "metrics.jsonl"
        self._remote = files.is_remote(self._path)
        start = trainer.start
        # The row of a step that is to be evaluated again is not there yet, or will be replaced.
        last = start.step - (1 if start.unfinished else 0)
        rows = read_metrics(self._path) if self._path.exists() else []
        reached = rows[-1]["step"] if rows and not start.step else 0
        runtime = trainer.runtime
        with contextlib.suppress(UserError, OSError):  # as it was, rather than as it will be
            path = self._path.with_name("config.json")
            runtime = config_io.run_settings(files.read_json(path), str(path))[1]
        interval = runtime.save_interval or runtime.eval_interval
        # The folder is there from the start. The second save waits for the first one, and steps
        # after it are logged later still.
        folder_gone = not self._remote and not trainer.checkpoints.directory.exists()
        if reached and (folder_gone or reached > 2 * interval):
            raise UserError(
                f"{self._path.parent} has been trained to step {reached}, as its"
                " metrics.jsonl says, but it has no checkpoint: put its checkpoints back, or name"
                " another --run-dir"
            )
        if reached and not self._remote:  # nothing is lost where the run begins anew
            self._path.replace(self._path.with_name("metrics.before.jsonl"))
        self._rows = [row for row in rows if start.step and row["step"] <= last]
        self._seconds_before = float(self._rows[-1].get("seconds") or 0) if self._rows else 0.0
        # Never known of a run that an earlier version began.
        self._began: float | None = self._rows[0].get("time") if self._rows else None
        self._is_new = not self._rows
        self._write()

    def on_step(self, trainer: Trainer, row: Row) -> None:
        """On a disk at once. A file in a bucket can only be replaced, and not often: there when
        BUCKET_INTERVAL has passed, and before a checkpoint."""
        if "seconds" not in row:
            return
        now, seconds = time.time(), row["seconds"] + self._seconds_before
        row = row | {"seconds": seconds, "time": now}
        if self._is_new and self._began is None:
            self._began = now
        if self._began is not None and now > self._began:
            row["goodput"] = seconds / (now - self._began)
        if not self._remote:
            self._write(row)
            return
        self._rows.append(row)
        if time.monotonic() > self._replaced + BUCKET_INTERVAL:
            self._write()

    def on_save(self, trainer: Trainer, step: int) -> None:
        """The log is never behind a checkpoint."""
        if self._remote:
            self._write()

    def on_end(self, trainer: Trainer) -> None:
        self.on_save(trainer, 0)

    def _write(self, new: Row | None = None) -> None:
        """Append a row to the file; None: replace the file by all rows."""
        self._replaced = time.monotonic()
        if not setup.is_main_host():
            return
        try:
            if new is None:
                files.write_atomic(self._path, "".join(map(_line, self._rows)))
                return
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(new))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise RunError(f"cannot write {self._path}: {reason}") from None


def _line(row: Row) -> str:
    return json.dumps({field: row.get(field) for field in FIELDS}) + "\n"
