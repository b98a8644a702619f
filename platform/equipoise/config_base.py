"""A frozen group of settings whose leaves have dotted paths, types and a fingerprint.

Knows how settings are reached, checked and named; knows none of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

Leaf = float | int | bool | str


class Config:
    """A frozen dataclass whose leaves can be reached by dotted paths."""

    def __post_init__(self) -> None:
        """Hold every leaf to its declared type.

        Raises:
            ValueError: a leaf is of another type, is not finite, or is not among its choices.
        """
        for name, kind in _hints(type(self)).items():
            object.__setattr__(self, name, _held(f"{type(self).__name__}.{name}", getattr(self, name), kind))

    def at(self, path: str, value: Leaf) -> Self:
        """A copy with one leaf changed.

        Raises:
            KeyError: no leaf is called `path`; the message lists those that are.
            ValueError: the value breaks a rule.
        """
        return self.having({path: value})

    def having(self, changes: Mapping[str, Leaf]) -> Self:
        """A copy with several leaves changed at once; what only holds between settings must hold of all of them.

        Raises:
            KeyError: as `at`.
            ValueError: as `at`.
        """
        names = [f.name for f in dataclasses.fields(typing.cast(Any, self))]
        own: dict[str, Any] = {}
        groups: dict[str, dict[str, Leaf]] = {}
        for path, value in changes.items():
            head, _, rest = path.partition(".")
            if head not in names:
                raise KeyError(f"{type(self).__name__} has no setting {head!r}; it has {', '.join(names)}")
            if isinstance(getattr(self, head), Config) != bool(rest):
                kind = "a leaf" if rest else "a group"
                raise KeyError(f"{path!r} does not end at a setting: {head!r} is {kind}")
            if rest:
                groups.setdefault(head, {})[rest] = value
            else:
                own[head] = value
        own |= {head: getattr(self, head).having(inner) for head, inner in groups.items()}
        changed: Self = dataclasses.replace(typing.cast(Any, self), **own)
        return changed

    def flat(self) -> dict[str, Leaf]:
        """Every leaf by its dotted path, in declaration order."""
        return dict(self._leaves())

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data, for JSON."""
        return dataclasses.asdict(typing.cast(Any, self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            KeyError: a key is unknown, as in a record of another version.
        """
        hints = _hints(cls)
        if unknown := set(data) - set(hints):
            raise KeyError(f"{cls.__name__} has no setting {', '.join(sorted(unknown))}; it has {', '.join(hints)}")
        return cls(**{k: hints[k].from_dict(v) if _is_group(hints[k]) else v for k, v in data.items()})

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that name these settings on any machine."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]

    def _leaves(self, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
        for name in _hints(type(self)):
            value = getattr(self, name)
            if isinstance(value, Config):
                yield from value._leaves(f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Config)


_HINTS: dict[Any, dict[str, Any]] = {}
"""By class: reading annotations is slow, and a study asks for them thousands of times."""


def _hints(cls: type[Config]) -> dict[str, Any]:
    if cls not in _HINTS:
        hints = typing.get_type_hints(cls)
        _HINTS[cls] = {f.name: hints[f.name] for f in dataclasses.fields(typing.cast(Any, cls))}
    return _HINTS[cls]


def _held(where: str, value: Any, kind: Any) -> Any:
    """The value, as its declared type; an int where a float is declared becomes one, so that names agree."""
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    if choices:
        if value not in choices:
            raise ValueError(f"{where} = {value!r}: must be one of {', '.join(map(repr, choices))}")
        return next(choice for choice in choices if choice == value)  # 8.0 is 8, so that names agree
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(kind, types.GenericAlias) or not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} = {value!r}: must be of type {getattr(kind, '__name__', kind)}")
    if kind is float and not abs(value) < float("inf"):
        raise ValueError(f"{where} = {value!r}: must be finite")
    return value


def require(where: str, value: object, holds: bool, rule: str) -> None:
    """Refuse a setting whose rule does not hold.

    Raises:
        ValueError: it does not; the message names the setting, its value and the rule.
    """
    if not holds:
        raise ValueError(f"{where} = {value!r}: {rule}")
