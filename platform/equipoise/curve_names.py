"""What other people call the signals that a monitor judges.

Knows the names that SIFA's code, the 2022 study, CycleGAN's code and Equipoise use, and which sums of them are judged;
knows nothing of files or verdicts. A name that could mean something else is not guessed, and all that was guessed is
told. A is the source and B the target, as in SIFA.

    cyc_loss_a, cycl_a, cycle_A   the cycle of A, from A to A
    g_A, d_A     SIFA, the 2022 study, with a small letter: the game of images of A. Translations *into* A lose g_A.
    G_A, D_A     CycleGAN, with a capital: G_A translates A, so that it and D_A play the game of images of *B*
    g_A_loss     SIFA: a generator's total, both cycles included; tot_ga in the 2022 study
    dice_B       SIFA: a loss. A dice_b without the word loss is a score there, and not taken.

Sources: cchen-cc/SIFA and 2Falx/SIFA, main.py; junyanz/pytorch-CycleGAN-and-pix2pix, models/cycle_gan_model.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from equipoise.curve_files import Curve, Curves
from slicestore.errors import InputError

_GAME = "(t|s|aux|p|p_low)"
OURS = re.compile(
    "loss/(cycle_[st]|adv_[ts]|identity|generator|segmentation|ce|overlap)"
    f"|auc/{_GAME}|critic/(loss|gap)_{_GAME}|saturation/(st|ts|sts|tst)"
)
"""Our own names, as far as `--term` may give them to a tag."""

_VALIDATION = re.compile("(val|valid|validation|test|testing|eval|evaluation)(_.*)?", re.IGNORECASE)
_CYCLE = "(loss_)?(cyc|cycl|cycle)(_consistency)?(_loss)?_{}(_loss)?"
TOTALS = "generator total a", "generator total b"
_THEIRS = {
    "loss/cycle_s": _CYCLE.format("(a|A|source)"),
    "loss/cycle_t": _CYCLE.format("(b|B|target)"),
    "loss/adv_s": "g_A|lsgan_(loss_)?a|(loss_)?G_B",
    "loss/adv_t": "g_B|lsgan_(loss_)?b|(loss_)?G_A",
    "loss/identity": "(loss_)?idt_A",
    "identity of the source": "(loss_)?idt_B",
    "loss/ce": "ce_B|ce_B_loss|ce_loss_b|loss_ce|ce_loss",
    "loss/overlap": "dice_B|dice_B_loss|dice_loss_b|loss_dice|dice_loss",
    "loss/segmentation": "loss_seg|seg_loss|(loss_)?segmentation|segmentation_loss",
    "loss/generator": "loss_G|[gG]_loss|loss_generator|generator_loss",
    TOTALS[0]: "tot_ga|g_A_loss|g_loss_A",
    TOTALS[1]: "tot_gb|g_B_loss|g_loss_B",
    "critic/loss_s": "d_A|d_A_loss|d_loss_A|(loss_)?D_B",
    "critic/loss_t": "d_B|d_B_loss|d_loss_B|(loss_)?D_A",
    "critic/loss_p": "d_P|d_P_loss|d_loss_P",
    "critic/loss_p_low": "d_P_ll|d_P_ll_loss|d_loss_P_ll",
}
"""What the last part of a tag, after its last slash, looks like."""

SUMS: Mapping[str, Sequence[Sequence[str]]] = {
    "loss/segmentation": (("loss/ce", "loss/overlap"), ("loss/ce",), ("loss/overlap",)),
    "loss/generator": (
        ("loss/cycle_s", "loss/cycle_t", "loss/adv_s", "loss/adv_t"),
        TOTALS,
        TOTALS[:1],
        TOTALS[1:],
    ),
}
"""What a term is made of where nothing has its name: the first row whose parts are all there. Identity losses are added
to the row of cycles and games; the totals hold both cycles each, which changes their level, not when they explode."""
IDENTITIES = ("loss/identity", "identity of the source")


@dataclass(frozen=True, slots=True, eq=False)
class Named:
    """A run's curves by our names."""

    curves: Mapping[str, Curve]
    made_of: Mapping[str, Sequence[str]]
    """The tags of each; several are summed."""
    left: Sequence[str]
    """Tags that nothing was made of."""


def named(run: Curves, told: Mapping[str, str]) -> Named:
    """Find what can be judged among a run's signals.

    Args:
        run: the signals as they were written.
        told: tags by our names, which go before any guess.

    Raises:
        InputError: a name that is not ours, a tag that is not in the run, or two tags that mean the same.
    """
    found = _told(run, told) | _guessed(run, told)
    made_of = {name: tags for name, tags in found.items() if OURS.fullmatch(name)}
    for name, recipes in SUMS.items():
        recipe = next((r for r in recipes if name not in found and all(part in found for part in r)), ())
        if "loss/adv_t" in recipe:
            recipe = (*recipe, *(part for part in IDENTITIES if part in found))
        if recipe:
            made_of[name] = tuple(tag for part in recipe for tag in found[part])
    sums = {name: added([run.signals[tag] for tag in tags]) for name, tags in made_of.items()}
    curves = {name: curve for name, curve in sums.items() if len(curve[0])}
    used = {tag for tags in made_of.values() for tag in tags}
    return Named(curves, {name: made_of[name] for name in curves}, [tag for tag in run.signals if tag not in used])


def ours(tag: str) -> str | None:
    """What a tag means, if its name says so; tags of a validation are never meant."""
    *folders, last = tag.removesuffix("_step").split("/")  # as Lightning calls what it does not average over epochs
    if any(_VALIDATION.fullmatch(folder) for folder in folders):
        return None
    for own in (tag, last.replace("_", "/", 1)):  # the second, where it had to serve as the name of a file
        if OURS.fullmatch(own):
            return own
    return next((name for name, pattern in _THEIRS.items() if re.fullmatch(pattern, last)), None)


def check(told: Iterable[str]) -> None:
    """Refuse names that are not ours.

    Raises:
        InputError: naming the first of them.
    """
    for name in told:
        if not OURS.fullmatch(name):
            raise InputError(
                f"--term {name}",
                found="a name that is never judged",
                rule="a term is loss/ cycle_s, cycle_t, segmentation, generator, adv_s or adv_t; auc/, critic/loss_ or "
                "critic/gap_ with t, s, aux, p or p_low; saturation/ st, ts, sts or tst",
                remedy="write --term loss/cycle_t=TAG",
            )


def added(curves: Sequence[Curve]) -> Curve:
    """The sum of curves, at the steps of the first.

    Others that were written at other steps count with the value they had last, so that no value is made up and a NaN
    stays where it is; steps before any of them began are left out.
    """
    steps, total = curves[0]
    begun = max(int(other[0]) for other, _ in curves)
    steps, total = steps[steps >= begun], total[steps >= begun]
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, as it should be
        for at, values in curves[1:]:
            total = total + values[np.searchsorted(at, steps, side="right") - 1]
    return steps, total


def _told(run: Curves, told: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    check(told)
    for tag in told.values():
        if tag not in run.signals:
            raise InputError(
                run.run,
                found=f"no signal {tag}",
                rule="--term gives a name to one of: " + ", ".join(run.signals),
                remedy="write the tag as it stands there",
            )
    return {name: (tag,) for name, tag in told.items()}


def _guessed(run: Curves, told: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    guesses: dict[str, list[str]] = defaultdict(list)
    for tag in run.signals:
        if tag not in told.values() and (name := ours(tag)) is not None and name not in told:
            guesses[name].append(tag)
    for name, tags in guesses.items():
        if len(tags) > 1:
            raise InputError(
                run.run,
                found=f"{' and '.join(tags)}, which all look like {name}",
                rule="a term is one curve",
                remedy=f"say which with --term {name}=TAG",
            )
    return {name: tuple(tags) for name, tags in guesses.items()}
