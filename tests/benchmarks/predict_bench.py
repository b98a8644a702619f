"""Segmenting a scan of the study's SWI size, from file to file, against the same network in a plain MONAI loop.

Both read a .nii.gz file of 80 x 192 x 256 voxels, orient, resample, standardise and pad it to slices of 256 x 256, run
the published networks' E and C1 slice by slice in batches of eight, take probabilities back to the scan's grid, and
write a .nii.gz mask. Two cores each.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from measure import Result, seconds

from equipoise.config import PUBLISHED
from equipoise.intake import SLICE_MM, Intake
from equipoise.model import Model
from equipoise.nets import Inference
from equipoise.predict import Manner, probabilities
from equipoise.predict import predict as segment
from slicestore.intensity import BACKGROUND_PERCENT
from slicestore.phantom import head
from slicestore.preprocess import prepare
from slicestore.settings import Preprocessing
from slicestore.store import DOMAINS
from slicestore.volume import read, write

CORES, BATCH, REPEATS = 2, 8, 3
CONFIG = Preprocessing(centre="grid")
LIMITS = (-1.0, 4.0)


def predict(scratch: Path) -> Iterator[Result]:
    """Volumes a minute of ours over theirs; in the detail the network alone, and ours in bfloat16."""
    torch.set_num_threads(CORES)
    scan, model = scratch / "swi.nii.gz", _model()
    write(head("swi", subject=1, original_size=True).image, scan)
    theirs_once = _monai(model, scan, scratch / "monai")
    _ours(model, scan, scratch / "ours.nii.gz", Manner(batch=BATCH))
    alike = np.mean(read(scratch / "ours.nii.gz").voxels == theirs_once)
    if alike < 0.95:
        raise ValueError(f"{alike:.1%} of voxels agree: not the same work")
    works: dict[str, Callable[[], object]] = {
        "ours": lambda: _ours(model, scan, scratch / "ours.nii.gz", Manner(batch=BATCH)),
        "monai": lambda: _monai(model, scan, scratch / "monai"),
        "network": lambda: _network(model, scan),
        "bfloat16": lambda: _ours(model, scan, scratch / "ours.nii.gz", Manner(batch=BATCH, precision="bfloat16")),
    }
    times = {name: list[float]() for name in works}
    for _ in range(REPEATS):
        for name, work in works.items():
            times[name].append(seconds(work))
    took = {name: statistics.median(found) for name, found in times.items()}
    yield Result(
        "predict.speed_vs_monai",
        took["monai"] / took["ours"],
        "times the speed",
        "MONAI: SliceInferer, sw_batch_size 8, and ResampleToMatch",
        f"{60 / took['ours']:.2f} against {60 / took['monai']:.2f} volumes a minute on {CORES} cores; of our "
        f"{took['ours']:.1f} s the network takes {took['network']:.1f}; with --precision bfloat16 "
        f"{60 / took['bfloat16']:.2f} volumes a minute; {alike:.2%} of voxels agree",
    )
    torch.set_num_threads(1)


def _model() -> Model:
    """The published networks with weights that decide something: fresh ones say background everywhere."""
    torch.manual_seed(0)
    net = Inference(PUBLISHED.net).eval().requires_grad_(False)
    net.segmenter.classify.weight.mul_(1000)
    levels = ("0.1", "0.5", "1", "2", "5", "95", "98", "99", "99.5", "99.9", SLICE_MM)
    intake = Intake(
        cohort="none",
        preprocessing=CONFIG,
        classes=2,
        limits=dict.fromkeys(DOMAINS, LIMITS),
        clip=False,
        frame=0,
        channels=1,
        usual={domain: dict.fromkeys(levels, (-99.0, 99.0)) for domain in DOMAINS},
    )
    return Model(net, intake, PUBLISHED, {})


def _ours(model: Model, scan: Path, out: Path, manner: Manner) -> None:
    found, _ = segment(model, read(scan), manner=manner)
    write(found.label, out, like=scan)


def _network(model: Model, scan: Path) -> float:
    """E, C1 and softmax alone, of a volume that is prepared already: the seconds of that part."""
    prepared = _PREPARED.setdefault(scan, prepare(read(scan), None, CONFIG))
    return seconds(lambda: probabilities(model.net, model.intake, prepared, manner=Manner(batch=BATCH)))


_PREPARED: dict[Path, object] = {}


def _monai(model: Model, scan: Path, folder: Path) -> np.ndarray:
    """What MONAI's tutorials do; gives the mask as voxels (z, y, x)."""
    from monai.inferers import SliceInferer
    from monai.transforms import (
        AsDiscrete,
        Compose,
        LoadImage,
        NormalizeIntensity,
        Orientation,
        ResampleToMatch,
        ResizeWithPadOrCrop,
        SaveImage,
        ScaleIntensityRange,
        Spacing,
    )

    raw = LoadImage(ensure_channel_first=True)(scan)
    image = Compose(
        [
            Orientation(axcodes="LPS"),
            Spacing(pixdim=(CONFIG.spacing_mm, CONFIG.spacing_mm, -1)),
            NormalizeIntensity(),
            ScaleIntensityRange(*LIMITS, -1, 1),
        ]
    )(raw)
    air = float(np.percentile(image, BACKGROUND_PERCENT))
    image = ResizeWithPadOrCrop((CONFIG.size, CONFIG.size, -1), mode="constant", value=air)(image)
    infer = SliceInferer(roi_size=(CONFIG.size, CONFIG.size), spatial_dim=2, sw_batch_size=BATCH)
    with torch.inference_mode():
        found = infer(image[None].transpose(2, 3), model.net).softmax(1)[0].transpose(1, 2)  # ours has y before x
    mask = AsDiscrete(argmax=True)(ResampleToMatch(mode="bilinear")(found, img_dst=raw))
    SaveImage(output_dir=folder, separate_folder=False, print_log=False, output_dtype=np.uint8)(mask)
    return np.asarray(mask[0]).transpose(2, 1, 0).astype(np.uint8)
