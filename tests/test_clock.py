"""Training time, with a clock that a test turns."""

import time

import pytest

from gptjax.clock import Clock


@pytest.fixture
def turn(monkeypatch):
    """Let so many seconds pass."""
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def turn(seconds):
        now[0] += seconds

    return turn


def test_speed_and_time_leave_pauses_out(turn):
    clock = Clock(5)
    turn(2)
    with clock.paused():
        turn(100)
    turn(3)
    assert clock.steps_per_second(15) == 10 / 5
    assert clock.seconds() == 5
    turn(4)
    assert clock.steps_per_second(16) == 1 / 4
    assert clock.seconds() == 9


def test_no_speed_where_no_step_was_timed(turn):
    clock = Clock(5)
    assert clock.steps_per_second(6) is None  # no time has passed
    turn(1)
    assert clock.steps_per_second(6) is None  # no step since the last call
    assert clock.steps_per_second(5) is None
    assert clock.seconds() == 1
