"""A trace of the steps that were asked for, in the format of TensorBoard and xprof."""

import shutil

import jax
import pytest

import gptjax
from gptjax.errors import ConfigError
from gptjax.profile import Profile
from gptjax.runtime_config import RuntimeConfig


class Notes(gptjax.Callback):
    def __init__(self):
        self.said = []

    def on_note(self, trainer, text):
        self.said.append(text)


@pytest.mark.parametrize("steps", ["3:5", "10:99"])
def test_the_steps_asked_for_are_traced(tiny, train_tiny, tmp_path, steps):
    notes = Notes()
    train_tiny(tiny.config, tmp_path, callbacks=[Profile(), notes], profile_steps=steps)
    (file,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    traced = {dict(event.stats)["step_num"] for event in events if event.name == "train"}
    first, last = map(int, steps.split(":"))
    assert set(range(first + 1, min(last, 12))) <= traced <= set(range(first - 1, last + 2))
    assert len(notes.said) == 1 and str(tmp_path / "profile") in notes.said[0]


def test_a_resumed_run_is_traced_from_its_first_step(tiny, train_tiny, tmp_path):
    shutil.copytree(tiny.run_dir, tmp_path / "run")
    longer, notes = tiny.config.replace(max_steps=16), Notes()
    runtime = {"callbacks": [Profile(), notes], "profile_steps": "13:14"}
    train_tiny(longer, tmp_path / "run", **runtime)
    assert len(list(tmp_path.glob("run/profile/plugins/profile/*/*.xplane.pb"))) == 1
    train_tiny(longer.replace(max_steps=18), tmp_path / "run", **runtime)
    assert notes.said[1:] == ["steps 13:14 were not taken: nothing is traced"]


def test_nothing_is_traced_unless_asked_for(tiny, train_tiny, tmp_path):
    train_tiny(tiny.config, tmp_path, callbacks=[Profile()])
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("steps", ["", "3", "5:3", "0:2", "a:b"])
def test_steps_that_are_none_are_refused(steps):
    with pytest.raises(ConfigError, match=r"profile_steps .* such as 10:15"):
        RuntimeConfig(profile_steps=steps)
