"""How a report tells which run and evaluation each protocol of selection keeps, and what that costs.

Knows choices, correlations and the file in which test scores lie, and how a page looks; must not know how anything is
chosen (`selection`), or how test scores are made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from equipoise.figures import Run
from equipoise.page import NOTHING, number, section, table
from equipoise.selection import SCORES, Chosen, Correlation, correlations, protocols
from equipoise.study import Study
from slicestore.errors import InputError

NAMES = {
    "last": "last step of the best point",
    "source": "source validation: translated Dice",
    "composite": "composite: translated Dice and volume",
    "entropy": "label-free: entropy",
    "information": "label-free: information maximisation",
    "nuclear": "label-free: nuclear norm",
    "volume": "label-free: predicted volume",
    "oracle": "oracle: target Dice, not available without target masks",
}
"""What protocols are called."""
_CHOICES = (
    "Which run, and which of its evaluations, each protocol keeps: the last step of the study's best point, or the "
    "highest value of a score at any evaluation of the points that are feasible, or, where none is, did not fail. "
)
_DICE = (
    "Target Dice is that of validation subjects, and regret how much less it is than the oracle's. Within runs is the "
    "mean over these points, ± standard deviation, where the protocol only says when to stop each of them. The oracle "
    "uses target masks, which a user may not have: it is no way to choose, but what the others are measured by."
)
_CORRELATIONS = (
    "Whether a higher score means a higher target Dice: Spearman's rank correlation, 1 where both rank alike, 0 where "
    "the score says nothing, below 0 where it misleads; n is how many pairs of both were finite. Target masks judge "
    "the scores here; no score uses them. Failed points count."
)


@dataclass(frozen=True, slots=True)
class Tested:
    """What the test subjects were used for."""

    touches: int
    """How often they were."""
    cells: Mapping[tuple[str, int], str]
    """HTML of each score, by run and step."""

    @classmethod
    def read(cls, path: Path) -> Tested | None:
        """What test.json holds; None where there is none.

        Raises:
            InputError: it holds something else.
        """
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text())
            plain = [row for row in found.get("rows", []) if not row.get("manner")]  # none yet: a look that broke off
            cells = {(str(row["run"]), int(row["step"])): _test_dice(row) for row in plain}
            return cls(int(found["touches"]), cells)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                path,
                found=f"no readable test scores ({type(error).__name__})",
                rule="a study's test scores are written whole",
                remedy="mend it, keeping its count of touches, and test the study again with --again",
            ) from error


def selection_section(runs: Sequence[Run], study: Study, best: Run | None, tested: Tested | None) -> str:
    """Both tables; nothing where no run was evaluated.

    Args:
        runs: of the study.
        study: the declaration.
        best: `report.best_point`.
        tested: test scores, where there are any.
    """
    choices, ranked = protocols(runs, study, best), correlations(runs)
    if not choices:
        return ""
    known = any(choice.dice is not None for choice in choices)
    note = _CHOICES + (_DICE if known else "No target masks are known to validate on.")
    if known and study.objective == "target_dice":
        note += " The best point of this study was chosen by target Dice too."
    if tested is not None:
        note += f" The test subjects were used {tested.touches} time{'s' * (tested.touches != 1)}."
    body = [f'<div class="wide">{_choices(choices, known, tested)}</div>']
    if ranked:
        body += [f'<p class="note">{escape(_CORRELATIONS)}</p>', f'<div class="wide">{_correlations(ranked)}</div>']
    return section("Selection", note, *body)


def _choices(choices: Sequence[Chosen], known: bool, tested: Tested | None) -> str:
    heads = ["protocol", "run", "step", *(("target Dice", "regret", "within runs") if known else ())]
    heads += ["test Dice"] if tested else []
    lines = []
    for choice in choices:
        cells = [escape(choice.run), f"{choice.step:,}"]
        cells += [number(choice.dice), number(choice.regret), _within(choice)] if known else []
        cells += [tested.cells.get((choice.run, choice.step), NOTHING)] if tested else []
        lines.append((NAMES[choice.protocol], cells))
    return table(heads, lines)


def _within(choice: Chosen) -> str:
    count = f'<span class="soft">({len(choice.each)} run{"s" * (len(choice.each) != 1)})</span>'
    spread = f" ± {number(choice.sd)}" if choice.sd is not None else ""
    return f"{number(choice.mean)}{spread} {count}" if choice.each else NOTHING


def _test_dice(row: Mapping[str, Any]) -> str:
    """A score of the file as HTML."""
    interval, subjects = row["interval"], int(row["subjects"])
    between = "" if interval is None else f" [{', '.join(number(float(end)) for end in interval)}]"
    return (
        f'{number(float(row["dice"]))}{between} <span class="soft">({subjects} subject{"s" * (subjects != 1)})</span>'
    )


def _correlations(found: Sequence[Correlation]) -> str:
    told = {(one.protocol, one.over): one for one in found}
    heads = ("score", "over runs, at their last evaluation", "n", "over all evaluations", "n")
    lines = []
    for protocol in SCORES:
        each = (told[protocol, "runs"], told[protocol, "evaluations"])
        lines.append((NAMES[protocol], [cell for one in each for cell in (_rho(one), f"{one.pairs:,}")]))
    return table(heads, lines)


def _rho(one: Correlation) -> str:
    return number(one.rho) if one.rho is not None else f'<span class="soft">not told: {escape(one.reason)}</span>'
