"""Which subject trains, validates and tests.

Knows names and a seed; knows nothing of volumes, labels or stores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from math import floor
from typing import Literal, get_args

from slicestore.errors import InputError

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = get_args(Part)


def split(
    subjects: Collection[str], *, seed: int, fractions: tuple[float, float, float] = (0.6, 0.2, 0.2)
) -> Mapping[str, Part]:
    """Give each subject to one part; call it once per domain.

    Every part whose fraction is not 0 gets a subject while there are enough; with fewer subjects the earlier parts do
    (one subject trains, two train and validate), and it is the caller's to say that a part is empty. The order is
    that of a hash of seed and name: it depends neither on the machine nor on the order given, and two domains with
    the same set of names get the same split, so that a patient scanned in both is not trained on in one and tested in
    the other.

    Raises:
        InputError: fractions that are negative or do not sum to 1, no fraction for training, or a subject named twice.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6 or fractions[0] == 0:
        raise InputError(
            "split fractions",
            found=fractions,
            rule="train, val and test sum to 1 and train is not 0",
            remedy="for example (0.6, 0.2, 0.2)",
        )
    if len(set(subjects)) < len(subjects):
        raise InputError(
            "split", found="a subject named twice", rule="a subject is in one part", remedy="name every subject once"
        )
    order = sorted(subjects, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    parts = [part for part, count in zip(PARTS, _counts(len(order), fractions), strict=True) for _ in range(count)]
    return dict(zip(order, parts, strict=True))


def _counts(subjects: int, fractions: tuple[float, ...]) -> list[int]:
    """Subjects of each part: at least one where the fraction is not 0, then by largest remainder."""
    counts = [max(1, floor(subjects * f + 1e-9)) if f else 0 for f in fractions]
    while sum(counts) > subjects:
        most = max(counts)
        counts[len(counts) - 1 - counts[::-1].index(most)] -= 1  # of equals the later part yields
    while sum(counts) < subjects:
        lack = [subjects * f - count for f, count in zip(fractions, counts, strict=True)]
        counts[lack.index(max(lack))] += 1
    return counts
