"""A trace of some training steps, for TensorBoard or xprof."""

from typing import Any

import jax

from gptjax import files
from gptjax.errors import RunError, first_line
from gptjax.trainer import Callback, Row, Trainer


class Profile(Callback):
    """Traces the steps that `runtime.profile_steps` names into RUN_DIR/profile, on every host; one
    or two before and after them are in it too, because the devices are ahead of what is reported.
    """

    def on_start(self, trainer: Trainer) -> None:
        self._first, self._last = trainer.runtime.profiled()
        self._running = self._traced = False
        if trainer.start.step:
            self._reached(trainer, trainer.start.step)

    def on_step(self, trainer: Trainer, row: Row) -> None:
        self._reached(trainer, row["step"])

    def _reached(self, trainer: Trainer, step: int) -> None:
        if self._running and step >= self._last:
            self._stop(trainer)
        elif not self._running and self._first - 1 <= step < self._last:
            folder = self._folder(trainer)
            try:
                jax.profiler.start_trace(folder)
            except Exception as error:  # of XLA's profiler, in no documented form
                raise RunError(f"--profile-steps: {first_line(error)}") from None
            self._running = self._traced = True

    def on_end(self, trainer: Trainer) -> None:
        if self._running:
            self._stop(trainer)
        elif self._last and not self._traced:
            _say(
                trainer, f"steps {trainer.runtime.profile_steps} were not taken: nothing is traced"
            )

    def _folder(self, trainer: Trainer) -> Any:
        run_dir = trainer.checkpoints.run_dir
        return f"{run_dir}/profile" if files.is_remote(run_dir) else run_dir / "profile"

    def _stop(self, trainer: Trainer) -> None:
        self._running = False
        try:
            jax.profiler.stop_trace()
        except Exception as error:  # as above: a full disk, say
            raise RunError(f"--profile-steps: {first_line(error)}") from None
        where = self._folder(trainer)
        _say(trainer, f"steps are traced in {where}: open it with tensorboard or xprof")


def _say(trainer: Trainer, note: str) -> None:
    for callback in trainer.callbacks:
        callback.on_note(trainer, note)
