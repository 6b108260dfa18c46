"""A schedule is None before it begins, then half a cosine, then its end."""

from __future__ import annotations

import math

import pytest

from olive.qat import CosineSchedule


def test_values_along_the_cosine() -> None:
    schedule = CosineSchedule(0.04, 0.01, first=10, last=20)
    assert schedule(0) is None and schedule(9) is None
    assert schedule(10) == pytest.approx(0.04)
    assert schedule(15) == pytest.approx(0.025)
    assert schedule(12) == pytest.approx(0.01 + 0.03 * (1 + math.cos(0.2 * math.pi)) / 2)
    assert schedule(20) == pytest.approx(0.01) and schedule(1000) == pytest.approx(0.01)
    values = [schedule(step) for step in range(10, 21)]
    assert values == sorted(values, reverse=True)


def test_it_may_begin_at_once_and_rise() -> None:
    schedule = CosineSchedule(0.0, 1.0, first=0, last=2)
    assert [schedule(step) for step in range(4)] == pytest.approx([0.0, 0.5, 1.0, 1.0])


@pytest.mark.parametrize(("first", "last"), [(3, 3), (4, 3), (-1, 3)])
def test_ends_in_another_order_are_refused(first: int, last: int) -> None:
    with pytest.raises(ValueError, match=f"first: expected at least 0 and below last=3, got {first}"):
        CosineSchedule(0.1, 0.2, first, last)
