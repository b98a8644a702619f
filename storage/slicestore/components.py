"""Which one of several volumes in a file or folder is meant.

Knows how a choice is asked for and refused; knows nothing of file formats.
"""

from __future__ import annotations

from collections.abc import Sequence

from slicestore.errors import InputError


def choose(where: object, component: int | None, count: int, found: str) -> int:
    """Index of the wanted volume among `count`; `found` says what there is, for the error.

    Without a choice there is nothing to say: None and 0 both mean the only volume.

    Raises:
        InputError: no component where there are several, or one that there is not.
    """
    if component is None and count > 1:
        raise InputError(
            where,
            found=found,
            rule="one volume is read of a file or folder",
            remedy=f"name it by its number, 0 to {count - 1}: `--component`, or a table's column `component`",
        )
    if component is not None and not 0 <= component < count:
        raise InputError(
            where,
            found=f"component {component} of {found}",
            rule=f"a component is a number from 0 to {count - 1}" if count > 1 else "a single volume has no components",
            remedy="choose one of them" if count > 1 else "leave `component` out",
        )
    return component or 0


def volumes(count: int, what: str) -> str:
    """How many volumes there are and what they are, in words."""
    return f"{count} volume{'s' * (count > 1)} ({what})"


def image(size: Sequence[int], channels: int = 1) -> str:
    """What an image is, in words."""
    told = f"a {len(size)}D image of size {' x '.join(map(str, size))}"
    return told + (f" with {channels} values a voxel" if channels > 1 else "")
