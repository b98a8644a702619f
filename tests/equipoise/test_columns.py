"""Rows taken apart into columns are the same rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.columns import Columns

FLOATS = st.floats(allow_subnormal=False)  # a process that has trained flushes those to 0
ROWS = [{"step": 1.0, "a": 2.0}, {"step": 2.0, "b": math.inf}, {"step": 3.0, "a": 5.0, "b": 7.0}]


@given(st.lists(st.dictionaries(st.sampled_from("abc"), FLOATS, max_size=3), max_size=8))
def test_every_row_comes_back(rows: list[dict[str, float]]) -> None:
    columns = Columns(rows)
    assert len(columns) == len(rows)
    for got, row in zip(columns, rows, strict=True):
        assert got == pytest.approx(row, abs=0, rel=0, nan_ok=True)


def test_a_curve_has_the_steps_of_the_rows_that_hold_the_signal() -> None:
    steps, values = Columns(ROWS).curve("a")
    assert steps.tolist() == [1, 3]
    assert values.tolist() == [2, 5]
    assert [len(part) for part in Columns(ROWS).curve("other")] == [0, 0]


def test_the_last_value_is_that_of_the_last_row_that_holds_the_signal() -> None:
    columns = Columns(ROWS[:2])
    assert (columns.last("a"), columns.last("b"), columns.last("other")) == (2.0, math.inf, None)


def test_numbers_that_are_not_finite_are_read_from_their_names() -> None:
    columns = Columns([{"step": 1, "a": "nan"}, {"step": 2, "a": "-inf"}, {"step": 3, "a": 4}])
    assert np.array_equal(columns.curve("a")[1], [math.nan, -math.inf, 4], equal_nan=True)


def test_rows_may_be_asked_for_from_the_end_and_by_slices() -> None:
    columns = Columns(ROWS)
    assert columns[-1] == ROWS[-1]
    assert columns[1:] == ROWS[1:]
    with pytest.raises(IndexError):
        columns[3]


def test_a_total_weighs_each_row_by_its_own_factor_or_the_usual_one() -> None:
    columns = Columns([{"t": 1.0}, {"t": 2.0, "n": 10.0}, {"n": 5.0}])
    assert columns.total("t", "n", 3.0) == 1 * 3 + 2 * 10
    assert columns.total("other", "n", 3.0) == 0
