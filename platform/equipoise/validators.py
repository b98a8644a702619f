"""How good masks look to someone who has none to compare them with: scores that need no label of the target.

Knows what a segmenter says of target slices, and how large its structures are in the source; must not know networks,
labels of the target, or what is chosen by the scores (`selection`). The higher a score, the better.

All but the volume look at a band: the pixels no further than `REACH` from one in which a structure is predicted. Of
whole slices they would tell how sure a network is of the background, in which the structures drown. Where nothing is
predicted there is no band, and each score is the least that it can be: a network without masks must never win.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

REACH = 3
"""Pixels from a structure, along rows and columns, that are still of the band."""


@dataclass(frozen=True, slots=True)
class Sums:
    """What of some slices is kept: float64, on their device. Those of several batches add up to those of all slices."""

    slices: int
    structure: Tensor
    """Pixels in which a structure is predicted; NaN if a logit of any pixel was not finite."""
    pixels: Tensor
    """Of the band, as all that follows."""
    entropy: Tensor
    """Of each pixel's probabilities, in nats."""
    probability: Tensor
    """`(C,)`, by class."""
    gram: Tensor
    """`(C, C)`: P^T P of the probabilities P, a row a pixel."""

    @classmethod
    def of(cls, logits: Tensor, brain_class: int) -> Sums:
        """The sums of a batch, `(N, C, H, W)`; the device is not waited for.

        Args:
            logits: of C classes.
            brain_class: the class that is no structure, as 0, the background, is none; 0 where there is none.
        """
        structure = structures(logits, brain_class)
        band = F.max_pool2d(structure, 2 * REACH + 1, stride=1, padding=REACH).flatten()
        each = logits.double().softmax(1).transpose(0, 1).flatten(1)
        seen = each * band
        entropy = torch.special.entr(each).sum(0) @ band
        return cls(len(logits), structure.sum(), band.sum(), entropy, seen.sum(1), seen @ each.T)

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.slices + other.slices,
            self.structure + other.structure,
            self.pixels + other.pixels,
            self.entropy + other.entropy,
            self.probability + other.probability,
            self.gram + other.gram,
        )


def structures(logits: Tensor, brain_class: int) -> Tensor:
    """Where a structure is predicted, `(N, H, W)` float64: 1 or 0; NaN where a logit is not finite: it has no largest.

    Args:
        logits: `(N, C, H, W)`.
        brain_class: the class that is no structure; 0 where there is none.
    """
    found = logits.argmax(1)
    structure = (found != 0) & (found != brain_class)  # 0 is the background, also where there is no brain class
    return structure.double().masked_fill(~logits.isfinite().all(1), torch.nan)


def validators(sums: Sums, area: float | None) -> dict[str, float]:
    """The scores of what is predicted on at least one target slice.

    Args:
        sums: of all slices.
        area: pixels of structures in a slice of the source domain's training subjects, on average; None where that is
            not known.

    Returns:
        What follows; ranges hold up to rounding. All are NaN if a logit was not finite.

        * `validator/entropy`: minus the mean entropy of a pixel of the band, over log C, in [-1, 0]; -1 without a band.
          Morerio et al., ICLR 2018, and Saito et al., ICCV 2021, choose by entropy.
        * `validator/information`: the entropy of the mean prediction less the mean entropy, over log C, in [0, 1]; 0
          without a band. Information maximisation, as in Musgrave et al. 2022.
        * `validator/nuclear`: nuclear norm of the band's probabilities, a row a pixel, over the root of rows times
          classes, in [1/C, 1]; 1/C without a band. Cui et al., CVPR 2020. See `nuclear`.
        * `validator/volume`: how near structures come to their size in the source, in [0, 1]; 0 where nothing is
          predicted. See `likeness`. Left out where `area` is 0 or not known.
    """
    classes, pixels, structure = len(sums.probability), float(sums.pixels), float(sums.structure)
    told = {"entropy": -1.0, "information": 0.0, "nuclear": 1 / classes}
    if math.isnan(structure):
        told = dict.fromkeys(told, math.nan)
    elif pixels:
        most = math.log(classes)
        entropy = float(sums.entropy) / pixels / most
        whole = float(torch.special.entr(sums.probability / pixels).sum()) / most
        told = {"entropy": -entropy, "information": whole - entropy, "nuclear": nuclear(sums.gram, pixels)}
    if area:
        told["volume"] = likeness(structure / sums.slices / area)
    return {f"validator/{name}": value for name, value in told.items()}


def nuclear(gram: Tensor, rows: float) -> float:
    """Nuclear norm of a matrix P over the root of its elements' number, by the eigenvalues of P^T P.

    Args:
        gram: `(C, C)` float64, P^T P, finite.
        rows: of P, which has C columns.

    Returns:
        If P's rows are probabilities, a number in [1/C, 1], to seven digits: 1 where all are certain and all classes
        equally frequent, 1/sqrt(C) where all are certain of one class, and 1/C where all are evenly split.
    """
    squared = torch.linalg.eigvalsh(gram).clamp(min=0)  # rounding makes a 0 negative
    return float(squared.sqrt().sum()) / math.sqrt(rows * len(gram))


def likeness(ratio: float) -> float:
    """How near a ratio, at least 0, is to 1: itself or its inverse, in [0, 1]; 0 of 0, NaN of NaN."""
    return min(ratio, 1 / ratio) if ratio else 0.0
