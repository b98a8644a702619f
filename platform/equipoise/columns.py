"""A run's rows, column by column: many runs fit into memory, and a signal's curve is at hand.

Knows rows as a record holds them; knows nothing of what signals mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

Row = dict[str, float]


class Columns(Sequence[Row]):
    """Rows that need not hold the same signals; each row is put together when it is asked for."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take rows apart; values may be the names of numbers that are not finite, as JSON holds them."""
        layouts: dict[tuple[str, ...], tuple[list[int], list[list[Any]]]] = {}  # of which there are few
        self._count = 0
        for row in rows:
            where, values = layouts.setdefault(tuple(row), ([], []))
            where.append(self._count)
            values.append(list(row.values()))
            self._count += 1
        parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for names, (where, values) in layouts.items():
            held, table = np.array(where, np.int32), np.array(values, np.float64)
            for number, name in enumerate(names):
                parts.setdefault(name, []).append((held, table[:, number]))
        self._columns = {name: _joined(each) for name, each in parts.items()}

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        number = range(self._count)[index]
        row: Row = {}
        for name, (where, values) in self._columns.items():
            at = int(np.searchsorted(where, number))
            if at < len(where) and where[at] == number:
                row[name] = float(values[at])
        return row

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(self._count))

    def names(self) -> set[str]:
        """All signals that any row holds."""
        return set(self._columns)

    def last(self, name: str) -> float | None:
        """The last value of a signal; None if there is none. May be NaN or infinite."""
        return float(self._columns[name][1][-1]) if name in self._columns else None

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps `(n,)` and values `(n,)` float64 of the rows that hold a signal."""
        if name not in self._columns:
            return np.empty(0), np.empty(0)
        where, values = self._columns[name]
        return self._columns["step"][1][where], values

    def total(self, name: str, times: str, otherwise: float) -> float:
        """The sum of a signal times another one, where a row holds that, else times a number."""
        if name not in self._columns:
            return 0.0
        where, values = self._columns[name]
        factors = np.full(self._count, otherwise)
        if times in self._columns:
            held, given = self._columns[times]
            factors[held] = given
        return float((values * factors[where]).sum())


def _joined(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and values of a signal that rows of several layouts hold, in the order of the rows."""
    if len(parts) == 1:
        return parts[0]
    where, values = (np.concatenate(each) for each in zip(*parts, strict=True))
    order = np.argsort(where)
    return where[order], values[order]
