"""Preparing a full-size pair of scans, against MONAI and TorchIO doing the same steps to the same output.

All read .nii.gz files, orient to left, posterior, superior, bring the in-plane spacing to 0.89 mm, standardise, crop or
pad to 256 x 256 and end with float16 and uint8 arrays. One thread each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from measure import Result

from slicestore import volume
from slicestore.phantom import MODALITIES, Head, head
from slicestore.preprocess import prepare
from slicestore.settings import Preprocessing

REPEATS = 3
CONFIG = Preprocessing(centre="grid", pad="zero")
"""The peers know no other middle, and their frame is zero."""
Pair = tuple[Path, Path]
Chain = Callable[[Path, Path], tuple[np.ndarray, np.ndarray]]


def preprocess(scratch: Path) -> Iterator[Result]:
    """Seconds of the peers over ours, for one TOF and one SWI with their vessel masks."""
    pairs = [_written(scratch, name, head(name, subject=1, original_size=True)) for name in MODALITIES]
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    torch.set_num_threads(1)
    peers = {"torchio": _torchio, "torchio_antialiased": _torchio_antialiased, "monai": _monai}
    for name, peer in peers.items():
        likeness = _likeness(pairs, peer)
        times = [(_cost(_ours, pairs), _cost(peer, pairs)) for _ in range(REPEATS)]
        ours, theirs = (min(side) for side in zip(*times, strict=True))  # a neighbour's work only ever adds
        detail = f"{ours:.1f} s against {theirs:.1f} s of CPU; {likeness}; {DIFFERENCES[name]}"
        yield Result(f"preprocess.speed_vs_{name}", theirs / ours, "times the speed", name, detail)


DIFFERENCES = {
    "torchio": "it samples linearly without anti-aliasing and labels by nearest neighbours; ours also verifies files,"
    " keeps the masks' volumes, and reports pieces and centrelines",
    "torchio_antialiased": "it blurs before it samples; labels by nearest neighbours; the rest as above",
    "monai": "it samples linearly without anti-aliasing and labels by nearest neighbours; the rest as above",
}


def _written(folder: Path, name: str, made: Head) -> Pair:
    paths = folder / f"{name}.nii.gz", folder / f"{name}_vessel.nii.gz"
    for part, path in zip((made.image, made.vessel), paths, strict=True):
        volume.write(part, path)
    return paths


def _cost(chain: Chain, pairs: list[Pair]) -> float:
    """CPU seconds, since other work may share the machine; all chains run on one thread."""
    began = time.process_time()
    for image, label in pairs:
        chain(image, label)
    return time.process_time() - began


def _likeness(pairs: list[Pair], peer: Chain) -> str:
    """How alike the outputs are, so that it is the same work; an error where they are not.

    The peers' grids lie up to a pixel from ours: they round sizes down or keep the middle where ours keeps a corner.
    """
    told = []
    for name, (image, label) in zip(MODALITIES, pairs, strict=True):
        (ours, our_mask), (theirs, their_mask) = _ours(image, label), peer(image, label)
        if ours.shape != theirs.shape or (theirs.dtype, their_mask.dtype) != (np.float16, np.uint8):
            raise ValueError(f"{name}: {theirs.shape} {theirs.dtype} {their_mask.dtype}, not {ours.shape}")
        alike = float(np.corrcoef(*(part[::4].astype(np.float32).ravel() for part in (ours, theirs)))[0, 1])
        dice = 2 * np.count_nonzero(our_mask & their_mask) / (np.count_nonzero(our_mask) + np.count_nonzero(their_mask))
        if alike < 0.95 or dice < 0.5:
            raise ValueError(f"{name}: correlation {alike:.3f}, Dice {dice:.2f}: not the same work")
        told.append(f"{name} r {alike:.3f}, mask Dice {dice:.2f}")
    return ", ".join(told)


def _ours(image: Path, label: Path) -> tuple[np.ndarray, np.ndarray]:
    made = prepare(volume.read(image), volume.read(label), CONFIG)
    assert made.label is not None
    return made.image, made.label


def _torchio(image: Path, label: Path, antialias: bool = False) -> tuple[np.ndarray, np.ndarray]:
    import torchio

    subject = torchio.Subject(image=torchio.ScalarImage(image), label=torchio.LabelMap(label))
    subject = torchio.ToOrientation("LPS")(subject)
    depth, spacing = subject.image.shape[3], subject.image.spacing
    target = (CONFIG.spacing_mm, CONFIG.spacing_mm, spacing[2])
    subject = torchio.Resample(target, antialias=antialias)(subject)
    subject = torchio.CropOrPad((CONFIG.size, CONFIG.size, depth))(torchio.ZNormalization()(subject))
    voxels, mask = (part.data[0].numpy().transpose(2, 1, 0) for part in (subject.image, subject.label))
    return np.ascontiguousarray(voxels, np.float16), np.ascontiguousarray(mask, np.uint8)


def _torchio_antialiased(image: Path, label: Path) -> tuple[np.ndarray, np.ndarray]:
    return _torchio(image, label, antialias=True)


def _monai(image: Path, label: Path) -> tuple[np.ndarray, np.ndarray]:
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        LoadImaged,
        NormalizeIntensityd,
        Orientationd,
        ResizeWithPadOrCropd,
        Spacingd,
    )

    both, depth = ("image", "label"), -1
    pixdim = (CONFIG.spacing_mm, CONFIG.spacing_mm, math.nan)  # NaN keeps the distance between slices
    chain = Compose(
        [
            LoadImaged(both),
            EnsureChannelFirstd(both),
            Orientationd(both, axcodes="LPS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
            Spacingd(both, pixdim=pixdim, mode=("bilinear", "nearest")),
            NormalizeIntensityd("image"),
            ResizeWithPadOrCropd(both, (CONFIG.size, CONFIG.size, depth)),
        ]
    )
    made = chain({"image": image, "label": label})
    voxels, mask = (made[key][0].numpy().transpose(2, 1, 0) for key in both)
    return np.ascontiguousarray(voxels, np.float16), np.ascontiguousarray(mask, np.uint8)
