"""TensorBoard's event files, by tensorboardX."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptjax.trackers.base import Entry, Tracker

FLUSH_SECONDS = 1
"""What is newer than that a kill may lose."""


class TensorBoard(Tracker):
    """Event files in RUN_DIR/tensorboard. A resumed run begins another file there, which says from
    which step on the ones before it do not count."""

    package = "tensorboardX"

    def open(self, run_dir: Path, step: int, settings: Mapping[str, Any]) -> None:
        import tensorboardX

        folder = f"{run_dir}/tensorboard"
        self.next_step = step + 1 if step and (run_dir / "tensorboard").exists() else 0
        # tensorboardX names files by whole seconds; they are read in the order of their names.
        self._writer = tensorboardX.SummaryWriter(
            folder, purge_step=self.next_step, flush_secs=FLUSH_SECONDS,
            filename_suffix=f".{time.time_ns()}",
        )  # fmt: skip
        self.where = f"tensorboard --logdir {folder}"
        if not self.next_step:
            lines = (f"    {name} = {value!r}" for name, value in settings.items())
            self._writer.add_text("settings", "\n".join(lines), 0)

    def log(self, entry: Entry) -> None:
        for name, number in entry.numbers.items():
            self._writer.add_scalar(name, number, entry.step)
        for name, text in entry.texts.items():
            self._writer.add_text(name, indented(text), entry.step)
        for name, values in entry.histograms.items():
            self._writer.add_histogram(name, values, entry.step)

    def close(self, failed: bool) -> None:
        self._writer.close()


def indented(text: str) -> str:
    """As Markdown shows it unchanged."""
    return "\n".join(f"    {line}" for line in text.split("\n"))
