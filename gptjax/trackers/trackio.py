"""Trackio, Hugging Face's."""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptjax import files
from gptjax.trackers.base import Entry, Tracker
from gptjax.trackers.tensorboard import indented


class Trackio(Tracker):
    """A run of the project TRACKIO_PROJECT (gptjax, if that is not set), where trackio keeps them:
    in TRACKIO_DIR, or a Space (TRACKIO_SPACE_ID). Its name, the run's with a number, lies in
    RUN_DIR/trackio.json. A record cannot be cut, so what is taken again is left out."""

    package = "trackio"

    def open(self, run_dir: Path, step: int, settings: Mapping[str, Any]) -> None:
        import trackio

        path = run_dir / "trackio.json"
        record = {"name": f"{run_dir.name}-{uuid.uuid4().hex[:6]}"}
        if step and path.exists():
            record = files.read_json(path)
        else:  # a run that begins anew is another one
            files.write_atomic(path, json.dumps(record) + "\n")
        project = os.environ.get("TRACKIO_PROJECT") or "gptjax"
        self._run = trackio.init(
            project, name=record["name"], resume="allow", config=dict(settings), embed=False
        )
        self._markdown, self._histogram = trackio.Markdown, trackio.Histogram
        self.next_step = self._run._next_step

    def log(self, entry: Entry) -> None:
        texts = {name: self._markdown(indented(text)) for name, text in entry.texts.items()}
        values = {name: self._histogram(each) for name, each in entry.histograms.items()}
        self._run.log({**entry.numbers, **texts, **values}, step=entry.step)

    def close(self, failed: bool) -> None:
        self._run.finish()
