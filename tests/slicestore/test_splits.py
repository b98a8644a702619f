"""Splits: by subject, seeded, disjoint, and sensible for the smallest cohorts."""

from __future__ import annotations

from collections import Counter

import pytest

from slicestore.errors import InputError
from slicestore.splits import split


def names(count: int) -> list[str]:
    return [f"patient {number}" for number in range(count)]


@pytest.mark.parametrize(
    ("subjects", "train", "val", "test"),
    [(0, 0, 0, 0), (1, 1, 0, 0), (2, 1, 1, 0), (3, 1, 1, 1), (4, 2, 1, 1), (5, 3, 1, 1), (9, 5, 2, 2), (20, 12, 4, 4)],
)
def test_every_part_has_a_subject_as_soon_as_there_are_three(subjects: int, train: int, val: int, test: int) -> None:
    parts = split(names(subjects), seed=0)
    assert set(parts) == set(names(subjects))
    assert Counter(parts.values()) == Counter(train=train, val=val, test=test)


def test_the_order_of_the_subjects_does_not_matter_and_the_seed_does() -> None:
    assert split(names(20), seed=1) == split(names(20)[::-1], seed=1)
    assert split(names(20), seed=1) != split(names(20), seed=2)


def test_a_split_is_the_same_on_every_machine() -> None:
    # printf 0:a | sha256sum, and so on, in ascending order: a 9df3, c be08, b e021
    assert split(["a", "b", "c"], seed=0) == {"a": "train", "c": "val", "b": "test"}


def test_a_part_without_a_fraction_gets_nobody() -> None:
    assert Counter(split(names(10), seed=0, fractions=(0.8, 0.2, 0.0)).values()) == Counter(train=8, val=2)
    assert Counter(split(names(2), seed=0, fractions=(0.8, 0.0, 0.2)).values()) == Counter(train=1, test=1)


def test_a_small_fraction_for_training_still_trains() -> None:
    assert Counter(split(names(4), seed=0, fractions=(0.1, 0.45, 0.45)).values()) == Counter(train=1, val=2, test=1)


@pytest.mark.parametrize("fractions", [(0.6, 0.2, 0.3), (1.2, -0.1, -0.1), (0.0, 0.5, 0.5)])
def test_fractions_that_are_no_split_are_refused(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(InputError, match="sum to 1"):
        split(names(5), seed=0, fractions=fractions)


def test_a_subject_named_twice_is_refused() -> None:
    with pytest.raises(InputError, match="named twice"):
        split(["a", "a"], seed=0)
