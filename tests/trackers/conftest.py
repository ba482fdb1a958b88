"""The tiny run, with a tracker by its real library."""

import pytest

import gptjax
from gptjax.errors import RunError


class Crash(gptjax.Callback):
    """Ends the run as step 7 is reported, three steps after its last checkpoint."""

    def on_step(self, trainer, row):
        if row["step"] == 7:
            raise RunError("a crash")


@pytest.fixture
def tracked(tiny, train_tiny):
    """Train in `run_dir`, with samples; what the user is told. With `crash` to step 6 only, where
    step 4 is the last that is saved."""

    def run(name, run_dir, *, crash=False, **runtime):
        said = []

        class Notes(gptjax.Callback):
            def on_note(self, trainer, text):
                said.append(text)

        display, trackers = gptjax.ProgressDisplay(), gptjax.Trackers()
        callbacks = [display, gptjax.Samples(display), Notes(), *[Crash()] * crash, trackers]
        more = {"track": (name,), "log_interval": 1, "sample_tokens": 4} | runtime
        try:
            train_tiny(tiny.config, run_dir, callbacks=callbacks, **more)
            assert not crash
        except RunError as error:
            assert crash and str(error) == "a crash"
        finally:
            trackers.close()
            display.close()
        return said

    return run
