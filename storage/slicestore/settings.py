"""What preprocessing may be told, and what it hands back.

Knows the choices, their rules and their presets; knows nothing of how a step is done, of files or of stores. Imports
NumPy alone, so that a machine that only reads a store needs no imaging library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np

from slicestore.errors import InputError

VERSION = 3
"""Version of the numbers that preprocessing makes; raise it when they change, and every store is made anew."""
MAX_CLASSES = 32
"""A label with a larger index is taken for a mistake (a 0/255 mask, an intensity image)."""
LEVELS = (0.1, 0.5, 1.0, 2.0, 5.0)
"""Percentages at which a volume's two tails are recorded, so that readers may clip without seeing a voxel."""

Pad = Literal["background", "zero"]
Centre = Literal["grid", "foreground", "brain"]
Slices = Literal["all", "tissue", "foreground"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """What the chain may be told; everything else about it is fixed by `VERSION`."""

    size: int = 256
    """Width and height of a training slice in pixels; divisible by 8, the stride of SIFA's encoder."""
    spacing_mm: float = 0.89
    """In-plane distance between pixel centres, that of the study's SWI; the distance between slices is left as it
    is."""
    pad: Pad = "background"
    """What fills the frame round an image smaller than `size`: its background value, or zero. Readers move a zero
    frame to the middle of the data-set limits, so that it is 0 after they have normalised: the mid-grey frame of the
    2022 study."""
    centre: Centre = "foreground"
    """What the middle of a slice shows: the middle of the array (`grid`), of the tissue's bounding box, found in the
    image alone so that no label steers it (`foreground`), or of the brain mask's bounding box (`brain`, needs a mask).
    Each volume has one centre for all of its slices. No more is cut off and no more is padded than the sizes ask for,
    so that an image that fits is kept whole wherever its tissue lies."""
    slices: Slices = "all"
    """Which slices are kept: all, those that are not of air (`tissue`, decided on the image alone), or those that
    show some of the label's foreground (`foreground`). The last makes the source richer in foreground than it is; for
    unlabelled volumes and for targets, whose labels may judge and never teach, it means `tissue`: a critic can tell
    the domains by that."""
    join: bool = True
    """Of a vessel label's pixels, take those on the centreline before those that are filled most, so that thin vessels
    stay in one piece; the label's volume is the same either way. Wide structures, such as a brain, have no
    centreline."""
    bias_field: bool = False
    """Divide the image by its smooth shading, estimated by N4 (Tustison 2010), before anything else."""
    strip: bool = False
    """Make all that is outside the brain mask background (needs a mask), in the image and in the label, which would
    otherwise ask for what cannot be seen. Mean and standard deviation are then those of the brain."""
    brain_class: int = 0
    """Class of what is inside the brain mask and not in the label: the index after the label's own classes, so 2 beside
    a vessel mask; 0 makes none. Needs the brain mask of every labelled volume. A number and not a switch, because a
    volume whose label lacks the last class must number its brain as the others do."""

    def __post_init__(self) -> None:
        if self.size < 8 or self.size % 8:
            raise InputError(
                "Preprocessing.size",
                found=self.size,
                remedy=f"take {max(8, round(self.size / 8) * 8)}",
                rule="a slice's side is a positive multiple of 8 pixels",
            )
        if not 0 < self.spacing_mm < 100:
            raise InputError(
                "Preprocessing.spacing_mm",
                found=self.spacing_mm,
                rule="a pixel is between 0 and 100 mm wide",
                remedy="give the target spacing in mm",
            )
        if isinstance(self.brain_class, bool) or self.brain_class not in (0, *range(2, MAX_CLASSES)):
            raise InputError(
                "Preprocessing.brain_class",
                found=self.brain_class,
                rule=f"it is the class index after the label's own, from 2 to {MAX_CLASSES - 1}, or 0 for none",
                remedy="beside a mask of one structure take 2",
            )
        for name, choices in (("pad", Pad), ("centre", Centre), ("slices", Slices)):
            if getattr(self, name) not in get_args(choices):
                raise InputError(
                    f"Preprocessing.{name}",
                    found=repr(getattr(self, name)),
                    rule=f"it is one of {', '.join(map(repr, get_args(choices)))}",
                    remedy="choose one of them",
                )

    def needs_brain(self, *, labelled: bool) -> bool:
        """Whether a brain mask must come with a volume."""
        return self.strip or self.centre == "brain" or (labelled and self.brain_class > 0)

    def foreground(self, label: np.ndarray) -> np.ndarray:
        """Where class indices are the label's own: neither background nor `brain_class`; bool, of the same shape."""
        own: np.ndarray = label != 0
        return own & (label != self.brain_class) if self.brain_class else own

    @property
    def fingerprint(self) -> str:
        """Names these settings and this code's version on any machine; 16 hexadecimal digits.

        A setting that came after its `VERSION` is left out while it is off: the numbers are those that the version made
        before, and existing stores are kept.
        """
        told = asdict(self)
        if not self.brain_class:
            del told["brain_class"]
        canonical = json.dumps({"version": VERSION, **told}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


PRESETS: Mapping[str, Preprocessing] = MappingProxyType(
    {
        "recommended": Preprocessing(),
        "seed2022": Preprocessing(size=352, pad="zero", centre="grid"),
    }
)
"""Named settings.

`recommended`: 256 pixels of 0.89 mm round the tissue, framed with the image's own air. An adult head fits, and no
network spends its capacity on a frame that no scanner made.

`seed2022`: what the 2022 study did. Images were padded about the middle of the array to 352 x 352 with the 0 of a
range from -1 to 1 in which tissue sits near -0.8, so that about 60 % of each image was a mid-grey frame; every slice
was used. Its other choices act when a store is read or split, not here: limits pooled over both domains, and slices
rather than subjects drawn for training. Its kernels are not known; resampling is ours."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Training slices of one volume."""

    image: np.ndarray
    """float16 (n, size, size), standardised with the volume's own mean and standard deviation; finite."""
    label: np.ndarray | None
    """uint8 (n, size, size), class indices, 0 is background; None without a label."""
    fraction: np.ndarray | None
    """uint8 (n, size, size), share of each pixel that is of the label's own classes, brain not among them, times
    255."""
    record: dict[str, Any]
    """All that `preprocess.restore` and the store need, ready for JSON; see `preprocess.prepare`."""
