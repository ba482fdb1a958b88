"""history.jsonl: when a run began, resumed and stopped, on what machine, and what it wrote."""

import hashlib
import json
import platform
import time
from typing import Any

import jax

import gptjax
from gptjax import files, machine
from gptjax.data import tokenizers
from gptjax.devices import setup
from gptjax.errors import RunError, first_line
from gptjax.run_logs import read_history
from gptjax.trainer import Callback, Trainer

MEASURED_TOKENS = 100_000
"""Of the validation text, whose bytes are counted."""


class History(Callback):
    """Writes RUN_DIR/history.jsonl, events with the `step` and `time` (seconds since 1970) at which
    they happened: "start" (of a process: the machine, versions, the tokenizer, and bytes of text in
    a token of the validation text), "sample" and "end"."""

    def on_start(self, trainer: Trainer) -> None:
        self._path = trainer.checkpoints.run_dir / "history.jsonl"
        self._events = read_history(self._path) if trainer.start.step else []
        self._saved = trainer.start.step
        if not setup.is_main_host():
            return
        tokenizer, tokens = trainer.dataset.tokenizer, trainer.dataset.val[:MEASURED_TOKENS]
        text = tokenizer.decode(tokens.tolist())
        digest = hashlib.sha256(tokenizers.to_json(tokenizer).encode()).hexdigest()[:8]
        self._add(
            "start", trainer.start.step, machine=machine.describe(), devices=setup.describe(),
            gptjax=gptjax.__version__, jax=jax.__version__, python=platform.python_version(),
            tokenizer=f"{tokenizer.kind}, {tokenizer.n_vocab:,} ids ({digest})",
            bytes_per_token=len(text.encode()) / len(tokens),
        )  # fmt: skip

    def on_save(self, trainer: Trainer, step: int) -> None:
        self._saved = step

    def on_sample(self, trainer: Trainer, step: int, text: str) -> None:
        self._add("sample", step, text=text)

    def on_end(self, trainer: Trainer) -> None:
        self._add("end", self._saved, signal=trainer.stopped_by)

    def _add(self, event: str, step: int, **more: Any) -> None:
        """Replaces the file as a whole: in a bucket there is no other way, and it stays small."""
        if not setup.is_main_host():
            return
        self._events.append({"event": event, "step": step, "time": time.time()} | more)
        try:
            files.write_atomic(self._path, "".join(json.dumps(e) + "\n" for e in self._events))
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise RunError(f"cannot write {self._path}: {reason}") from None
