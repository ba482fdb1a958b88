"""history.jsonl: when a run began, resumed and stopped, on what machine, and what it wrote."""

import hashlib
import json
import time
from typing import Any

import jax
import numpy as np

import gptjax
from gptjax import files, machine
from gptjax.data import tokenizers
from gptjax.data.token_files import Dataset
from gptjax.devices import setup
from gptjax.errors import RunError, UserError, first_line
from gptjax.run_logs import read_history
from gptjax.trainer import Callback, Trainer

BLOCKS, BLOCK = 16, 4096
"""So many blocks of so many tokens of the validation text have their bytes counted."""


class History(Callback):
    """Writes RUN_DIR/history.jsonl, events with the `step` and `time` (seconds since 1970) at which
    they happened: "start" (of a process: the machine, versions, the tokenizer, the data's
    fingerprint and `bytes_per_token`), "sample" and "end" (none, where the process was killed)."""

    def on_start(self, trainer: Trainer) -> None:
        self._path = trainer.checkpoints.run_dir / "history.jsonl"
        self._events = list[dict[str, Any]]()
        self._saved = trainer.start.step
        if not setup.is_main_host():
            return
        # Never a reason not to train: what is damaged, or of a run that begins anew, is kept aside.
        try:
            found = read_history(self._path)
        except UserError:
            found = None
        if trainer.start.step and found is not None:
            self._events = found
        elif self._path.exists() and not files.is_remote(self._path):
            self._path.replace(self._path.with_name("history.before.jsonl"))
        dataset, tokenizer = trainer.dataset, trainer.dataset.tokenizer
        digest = hashlib.sha256(tokenizers.to_json(tokenizer).encode()).hexdigest()[:8]
        self._add(
            "start", trainer.start.step, machine=machine.describe(), devices=setup.describe(),
            gptjax=gptjax.__version__, jax=jax.__version__, data=dataset.fingerprint[:12],
            tokenizer=f"{tokenizer.kind}, {tokenizer.n_vocab:,} ids ({digest})",
            bytes_per_token=bytes_per_token(dataset),
        )  # fmt: skip

    def on_save(self, trainer: Trainer, step: int) -> None:
        self._saved = step

    def on_sample(self, trainer: Trainer, step: int, text: str) -> None:
        self._add("sample", step, text=text)

    def on_end(self, trainer: Trainer) -> None:
        early = {"stopped_early": True} if trainer.stopped_early else {}
        self._add("end", self._saved, signal=trainer.stopped_by, **early)

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


def bytes_per_token(dataset: Dataset) -> float:
    """UTF-8 bytes in a token of the validation text (or else the training text), on average. The
    token that ends a document is one too, and has none."""
    val, tokenizer = dataset.val if len(dataset.val) else dataset.train, dataset.tokenizer
    count = total = 0
    for start in range(0, len(val), max(BLOCK, len(val) // BLOCKS)):
        tokens = np.asarray(val[start : start + BLOCK])
        text = tokenizer.decode(tokens[tokens != tokenizer.eot].tolist())
        count, total = count + len(tokens), total + len(text.encode())
    return total / count
