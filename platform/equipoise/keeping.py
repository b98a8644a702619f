"""How a run's states are kept: how often, how many, and where else.

Knows steps and numbers of checkpoints; must not know what a state is, nor how it is written. Nothing here changes a
number of a run, so it is no setting of the run: a run may be resumed with other wishes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from slicestore.errors import InputError
from slicestore.place import Place


@dataclass(frozen=True, kw_only=True, slots=True)
class Keeping:
    """What is asked for."""

    every: int = 0
    """Steps between checkpoints, beside those at evaluations; each falls on the end of a block. 0: evaluations only."""
    kept: int = 2
    """Newest checkpoints that stay, here and among the copies, beside those that `recovery` may go back to."""
    copies: str = ""
    """A folder (another disk, NFS) or `s3://bucket/prefix` that gets a copy of the run's folder under the run's name;
    panels, which show patients' slices, are part of it. Empty for none."""
    session: str = ""
    """Id of the study's session that asks, noted with each attempt."""

    def __post_init__(self) -> None:
        """Find mistakes before anything is trained.

        Raises:
            InputError: a number is too small, the place of copies is of an unknown kind, or the session's id is none.
        """
        for name, value, least, why in (
            ("every", self.every, 0, "a checkpoint is written every so many steps; 0 writes them at evaluations only"),
            ("kept", self.kept, 2, "at least the newest checkpoint stays, and the one before in case it is damaged"),
        ):
            if value < least:
                raise InputError(name, found=value, rule=why, remedy=f"give {least} or more")
        if not re.fullmatch(r"[\w-]*", self.session):
            raise InputError(
                "session",
                found=repr(self.session),
                rule="it is written into records, which hold no paths or host names",
                remedy="give an id of letters, digits, - and _",
            )
        if self.copies:  # a path means the same wherever workers run
            object.__setattr__(self, "copies", Place.at(self.copies).url)

    def due(self, before: int, now: int) -> bool:
        """Whether a block that began after step `before` and ended with step `now` took the run past a multiple."""
        return self.every > 0 and now // self.every > before // self.every
