"""Reading ahead."""

import threading

import pytest

from gptjax.data.prefetch import AHEAD, Prefetch


def test_the_next_ones_are_read_meanwhile_each_once_and_none_past_the_end():
    read, all_there = [], threading.Barrier(AHEAD, timeout=20)

    def square(number: int) -> int:
        read.append(number)
        if 0 < number <= AHEAD:
            all_there.wait()  # passes only if so many are being read at the same time
        return number**2

    with Prefetch(square, 8) as squares:
        assert [squares(number) for number in range(10)] == [number**2 for number in range(10)]
    assert sorted(read) == [*range(10)]


def test_any_number_may_be_asked_for():
    with Prefetch(lambda number: number + 1, 100) as read:
        assert [read(number) for number in (7, 3, 3, 90, 99, 0)] == [8, 4, 4, 91, 100, 1]


def test_an_error_is_raised_for_its_own_number():
    def read(number: int) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    with Prefetch(read, 9) as numbers:
        assert [numbers(0), numbers(1)] == [0, 1]
        with pytest.raises(ValueError, match="two"):
            numbers(2)
        assert numbers(3) == 3
