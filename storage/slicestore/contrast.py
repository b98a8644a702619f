"""What a scanner makes of a head: the signals of its tissues and vessels in TOF angiography and in SWI.

Knows how tissues lie over each other between given level sets, their contrast, saturation of blood, susceptibility,
coil and noise; knows nothing of where organs or vessels run, nor of subjects, masks of vessels or files. Arrays are
`(z, y, x)`, signals in scanner units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from scipy import fft, ndimage

from slicestore.anatomy import Lattice, Levels
from slicestore.geometry import Geometry, Triple
from slicestore.vasculature import Filling


class Tissue(NamedTuple):
    """What a tissue looks like."""

    tof: float
    """Signal in scanner units at a short repetition time: still water is saturated, fat recovers, white leads grey."""
    swi: float
    """Signal in scanner units at a long echo time and low flip angle: water is bright, white darker than grey."""
    ppm: float
    """Magnetic susceptibility against water."""


TISSUES: Mapping[str, Tissue] = {
    "fat": Tissue(270, 165, 0.0),
    "muscle": Tissue(120, 105, 0.0),
    "marrow": Tissue(95, 70, 0.0),
    "bone": Tissue(18, 15, 0.0),
    "csf": Tissue(72, 285, 0.0),
    "grey": Tissue(122, 250, 0.015),
    "white": Tissue(142, 206, -0.015),
    "deep": Tissue(128, 228, 0.03),
    "iron": Tissue(116, 178, 0.10),  # pallidum, substantia nigra, red and dentate nuclei
    "globe": Tissue(55, 285, 0.0),
    "air": Tissue(0, 0, 6.0),  # 9 ppm, less what the walls of a sinus take of its room
}
"""Before gain, bias and noise, and before each subject's own variation of some per cent."""

EDGE_MM = 0.9
"""Width of the border between tissues, or a voxel if that is wider."""
SWI_VOXEL_MM: Triple = (2.00, 0.89, 0.89)
"""The study's SWI voxel `(z, y, x)`: spins lose step across it on any grid, so that a small head loses no more."""


def tof(
    lattice: Lattice, levels: Levels, filling: Filling, geometry: Geometry, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Image int16 and brain mask: dark tissue, bright arteries that fade as their blood is saturated on the way."""
    shape = geometry.size[::-1]
    image, brain = np.empty(shape, np.int16), np.empty(shape, np.uint8)
    contrast = {name: tissue.tof * rng.uniform(0.94, 1.06) for name, tissue in TISSUES.items()}
    gain, noise, fresh = rng.uniform(0.9, 1.15), rng.uniform(6.0, 8.5), rng.uniform(700, 850)
    # Blood enters each of three overlapping excitation slabs fresh and is saturated again on its way up through it.
    plane = filling.index // (shape[1] * shape[2])
    within = (plane / shape[0] * 3) % 1.0
    blood = 150 + fresh * np.exp(-filling.delay / rng.uniform(110, 150)) * (1.06 - 0.22 * within)
    bias = _bias(geometry, rng)
    for slab in lattice.slabs(levels, geometry):
        where = slab.where
        signal = slab.average(_paint(slab.levels, contrast, max(EDGE_MM, geometry.spacing_mm[0])))
        mine = slice(*np.searchsorted(plane, [where.start, where.stop]))
        spot = filling.index[mine] - where.start * shape[1] * shape[2]
        flat = signal.reshape(-1)
        flat[spot] += filling.share[mine] * (blood[mine] - flat[spot]).astype(np.float32)
        signal *= gain * bias(where)
        image[where] = _rician(signal, noise, rng)
        brain[where] = slab.average(slab.levels["envelope"]) < 0
    return image, brain


def swi(
    lattice: Lattice, levels: Levels, filling: Filling, geometry: Geometry, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Image int16 and brain mask: long-echo magnitude times a mask from the high-passed phase (Haacke 2004)."""
    shape = geometry.size[::-1]
    signal, source, brain = np.empty(shape, np.float32), np.empty(shape, np.float32), np.empty(shape, np.uint8)
    contrast = {name: tissue.swi * rng.uniform(0.95, 1.05) for name, tissue in TISSUES.items()}
    ppm = {name: tissue.ppm for name, tissue in TISSUES.items()}
    for slab in lattice.slabs(levels, geometry):
        edge = max(EDGE_MM, geometry.spacing_mm[0])
        signal[slab.where] = slab.average(_paint(slab.levels, contrast, edge))
        source[slab.where] = slab.average(_paint(slab.levels, ppm, edge))
        brain[slab.where] = slab.average(slab.levels["envelope"]) < 0
    share = np.zeros(signal.size, np.float32)
    share[filling.index] = filling.share
    share = share.reshape(shape)
    spacing = np.array(geometry.spacing_mm[::-1])
    field = _field(source + 0.35 * share, spacing)
    # Spins within a voxel lose step where the field changes across it: round vessels (blooming) and above the sinuses.
    steep = sum((g * d) ** 2 for g, d in zip(np.gradient(field, *spacing), SWI_VOXEL_MM, strict=True))
    halo = ndimage.gaussian_filter(share, rng.uniform(0.9, 1.2) / spacing)
    signal *= np.exp(-2.2 * share - 3.0 * halo - 200.0 * steep)
    phase = 18.0 * (field - ndimage.gaussian_filter(field, 3.5 / spacing))
    signal *= np.clip(1 - np.maximum(phase, 0) / np.pi, 0, 1) ** 4
    bias = _bias(geometry, rng)
    return _rician(signal * rng.uniform(0.9, 1.15) * bias(slice(None)), rng.uniform(8, 11), rng), brain


def _paint(levels: Levels, contrast: Mapping[str, float], edge_mm: float) -> np.ndarray:
    """Signal on the levels' grid: tissues laid over each other from the outside in, blurred over `edge_mm` at edges."""
    outer, cavity, texture = levels["outer"], levels["cavity"], levels["texture"]
    # Distance to the nearest fluid: the pial surface, a sulcus down to its floor, or a fissure.
    floor = 13 + np.clip(texture / 3, -6, 6)
    sulcus = np.hypot(levels["fold"], np.clip(-levels["envelope"] - floor, 0, None))
    rind = np.minimum(np.minimum(-levels["envelope"], sulcus), levels["fissure"])
    # Sheets of fat run between the muscles, with no sharp border.
    muscle = np.maximum(outer + 4.0, edge_mm * (4.0 - np.abs(texture)) / 8.0)
    stem = np.maximum(levels["stem"] + 1.0, levels["envelope"])
    layers = (
        ("fat", outer),
        ("muscle", muscle),
        ("bone", cavity - 6.2),
        ("marrow", np.abs(cavity - 3.2) - 1.1),
        ("globe", levels["globe"]),
        ("air", levels["sinus"]),
        ("csf", cavity),
        ("grey", 0.6 - rind),
        ("white", 2.9 - rind),
        ("white", stem),
        ("deep", levels["deep"]),
        ("iron", levels["iron"]),
        ("csf", levels["ventricle"]),
    )
    signal = np.zeros_like(outer)
    for tissue, level in layers:
        cover = np.clip(0.5 - level / edge_mm, 0, 1)
        signal += (np.float32(contrast[tissue]) - signal) * cover
    # No tissue is uniform.
    signal *= 1 + 0.025 * np.sin(0.4 * texture)
    return signal


def _field(ppm: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """Field shift in ppm along z that a susceptibility map `(z, y, x)` causes: the dipole kernel 1/3 - kz² / k²."""
    size = [fft.next_fast_len(n + 8, real=True) for n in ppm.shape]
    k = [fft.fftfreq(size[0], spacing_mm[0]), fft.fftfreq(size[1], spacing_mm[1]), fft.rfftfreq(size[2], spacing_mm[2])]
    z, y, x = np.meshgrid(*(np.square(a, dtype=np.float32) for a in k), indexing="ij", sparse=True)
    total = z + y + x
    total[0, 0, 0] = 1.0
    spectrum = fft.rfftn(ppm, size) * (1 / 3 - z / total)
    return np.asarray(fft.irfftn(spectrum, size)[tuple(slice(n) for n in ppm.shape)], np.float32)


def _bias(geometry: Geometry, rng: np.random.Generator) -> Callable[[slice], np.ndarray]:
    """The coil's smooth multiplicative field, for any range of slices."""
    profiles = []
    for n in geometry.size[::-1]:
        at, slope, bowl = np.linspace(-1, 1, n), rng.normal(0, 0.08), rng.uniform(-0.05, 0.12)
        profiles.append(np.exp(slope * at + bowl * at**2).astype(np.float32))
    z, y, x = profiles
    return lambda where: np.asarray(z[where, None, None] * y[:, None] * x)


def _rician(signal: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Magnitude of the signal with complex noise of standard deviation `sigma`, rounded to int16."""
    real = signal + sigma * rng.standard_normal(signal.shape, np.float32)
    imaginary = sigma * rng.standard_normal(signal.shape, np.float32)
    return np.asarray(np.clip(np.rint(np.hypot(real, imaginary)), 0, 32767), np.int16)
