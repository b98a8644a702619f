"""A folder of DICOM files: the stacks of slices in it, and the volume that one of them is.

Knows DICOM's headers and what scanners put under one series; knows nothing of other formats. Slices are ordered by
their position along the normal of their plane, never by file name, and nothing of the patient is read from the headers.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.errors import InvalidDicomError

from slicestore.components import choose, volumes
from slicestore.errors import InputError
from slicestore.geometry import MISPLACED_MM, SAME_GRID_MM, SINGULAR, Geometry, check_axes, check_size

TAGS = (
    "SeriesInstanceUID",
    "SeriesNumber",
    "SeriesDescription",
    "ImageType",
    "ComplexImageComponent",
    "EchoTime",
    "EchoNumbers",
    "TemporalPositionIdentifier",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SharedFunctionalGroupsSequence",
    "SamplesPerPixel",
    "BitsAllocated",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "ImagePositionPatient",
    "ImageOrientationPatient",
)
"""All that is read of a header."""
TURNED = 0.05
"""Change of a direction cosine (3 degrees) that makes another stack, such as a localiser's three planes."""


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """One file of a stack."""

    path: Path
    kind: tuple[Any, ...]
    """What tells stacks of a folder apart, the series' own UID last: it orders, and is never shown."""
    description: str
    echo_ms: float | None
    position: np.ndarray
    """Centre of the first pixel, LPS millimetres."""
    axes: np.ndarray
    """Unit vectors along a row and along a column, 2 x 3."""
    spacing_mm: tuple[float, float]
    """Along a row, along a column."""
    thickness_mm: float
    """Distance to a neighbour as the header says; NaN where it does not."""

    @property
    def number(self) -> int:
        """The scanner's number of the series."""
        return int(self.kind[0])


Stack = list[Slice]


def inspect(folder: Path, component: int | None) -> Geometry:
    """The grid of one stack of slices, from headers alone.

    Raises:
        InputError: no DICOM image in the folder; several stacks and no component; a stack that is no grid.
    """
    return _grid(folder, _pick(folder, component))


def read(folder: Path, component: int | None) -> tuple[np.ndarray, Geometry]:
    """Read one stack as `(z, y, x)`, in the units of its rescale slope and intercept, and its grid.

    Raises:
        InputError: as `inspect`; a slice that GDCM cannot decode.
    """
    stack = _pick(folder, component)
    grid = _grid(folder, stack)
    planes = [_pixels(item.path) for item in stack]
    kind = np.result_type(*planes)
    if kind == np.float64:  # GDCM's type of scaled pixels; they have 16 bits at most, or come from float32
        kind = np.dtype(np.float32)
    voxels = np.empty(grid.size[::-1], dtype=kind)
    for target, plane in zip(voxels, planes, strict=True):
        target[...] = plane
    return voxels, grid


def digest(folder: Path, component: int | None) -> str:
    """sha256 over the files of one stack in the order of their positions, whatever they are called.

    Raises:
        InputError: as `inspect`.
    """
    stack = _pick(folder, component)
    _grid(folder, stack)
    total = hashlib.sha256()
    for item in stack:
        total.update(hashlib.sha256(item.path.read_bytes()).digest())
    return total.hexdigest()


def holds_dicom(folder: Path) -> bool:
    """Whether any file of the folder itself begins as DICOM files do.

    Raises:
        InputError: the folder or a file in it may not be read.
    """
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(
            folder,
            found=f"a folder that cannot be read ({type(error).__name__})",
            rule="images are readable by whoever prepares them",
            remedy="ask its owner, or run `chmod u+rx` on it",
        ) from None
    return any(_begins_as_dicom(file) for file in files)


# --- which files make a stack -----------------------------------------------------------------------------------------


def _pick(folder: Path, component: int | None) -> Stack:
    """The wanted stack, in the order of its positions."""
    stacks = _stacks(folder)
    told = "; ".join(f"{number}: {_told(stack)}" for number, stack in enumerate(stacks))
    chosen = stacks[choose(folder, component, len(stacks), volumes(len(stacks), told))]
    normal = np.cross(*chosen[0].axes)
    return sorted(chosen, key=lambda item: float(item.position @ normal))


def _stacks(folder: Path) -> list[Stack]:
    """All stacks of a folder, in an order that does not depend on file names.

    A series UID alone tells too little: echoes, magnitude and phase often share one, and so do a localiser's planes.
    """
    stacks: dict[tuple[Any, ...], list[Stack]] = {}
    for item in _slices(folder):
        alike = stacks.setdefault(item.kind, [])
        stack = next((s for s in alike if np.abs(s[0].axes - item.axes).max() < TURNED), None)
        if stack is None:
            alike.append([item])
        else:
            stack.append(item)
    return [
        stack
        for kind in sorted(stacks, key=lambda kind: [str(part) if isinstance(part, tuple) else part for part in kind])
        for stack in sorted(stacks[kind], key=lambda stack: np.round(stack[0].axes, 1).ravel().tolist())
    ]


def _slices(folder: Path) -> list[Slice]:
    """Headers of the images in a folder that have a place in the patient; other files are left aside."""
    found: list[Slice] = []
    nowhere: list[Path] = []
    for file in sorted(folder.iterdir()):
        header = _header(file) if _begins_as_dicom(file) else None
        if header is None or "Rows" not in header:
            continue
        somewhere = header.get("ImagePositionPatient") and header.get("ImageOrientationPatient")
        if int(header.get("NumberOfFrames") or 1) > 1 and (somewhere or "SharedFunctionalGroupsSequence" in header):
            raise InputError(
                file,
                found=f"{header.NumberOfFrames} frames in one file (enhanced DICOM)",
                rule="a DICOM file is one slice",
                remedy="convert it to NIfTI (dcm2niix) or to single frames (dcm4che's emf2sf)",
            )
        if somewhere:
            found.append(_slice(file, header))
        else:
            nowhere.append(file)
    if not found:
        below = sorted(f.name for f in folder.iterdir() if f.is_dir() and holds_dicom(f))
        raise InputError(
            folder,
            found=f"no DICOM slice with a position ({len(nowhere)} images without)",
            rule="a folder given as a volume holds the files of a DICOM series, not in subfolders",
            remedy=f"give one of its subfolders ({', '.join(below[:5])})" if below else "check the path",
        )
    return found


def _begins_as_dicom(file: Path) -> bool:
    if not file.is_file():
        return False
    try:
        with file.open("rb") as handle:
            return handle.read(132)[128:] == b"DICM"
    except OSError as error:
        raise _unreadable(file, error) from None


def _header(file: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of a header is checked here, value by value
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(TAGS))
            for element in header:
                _ = element.value
    except (InvalidDicomError, OSError, EOFError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
        raise _unreadable(file, error) from None
    return header


def _slice(file: Path, header: Any) -> Slice:
    try:
        axes = np.array(header.ImageOrientationPatient, dtype=float).reshape(2, 3)
        position = np.array(header.ImagePositionPatient, dtype=float).reshape(3)
        down, along = (float(value) for value in header.PixelSpacing)
        thickness = float(header.get("SpacingBetweenSlices") or header.get("SliceThickness") or np.nan)
        echo_ms = None if header.get("EchoTime") is None else float(header.EchoTime)
        time_point = int(header.get("TemporalPositionIdentifier") or 0)
    except (AttributeError, TypeError, ValueError):
        raise InputError(
            file,
            found="no readable pixel spacing, position, orientation, echo time or time point",
            rule="a slice says where its pixels lie, and has one echo time and one time point at most",
            remedy="export the series anew, or leave this file out",
        ) from None
    image_type = header.get("ImageType") or ()
    kind = (
        int(header.get("SeriesNumber") or 0),
        -1.0 if echo_ms is None else echo_ms,
        str(header.get("EchoNumbers") or ""),
        (image_type,) if isinstance(image_type, str) else tuple(image_type),
        str(header.get("ComplexImageComponent") or ""),
        time_point,
        int(header.Rows),
        int(header.Columns),
        int(header.get("SamplesPerPixel") or 1),
        str(header.get("SeriesInstanceUID") or ""),
    )
    description = str(header.get("SeriesDescription") or "")
    return Slice(file, kind, description, echo_ms, position, axes, (along, down), thickness)


def _told(stack: Stack) -> str:
    """What a choice shows of a stack on the user's own terminal: no name, day or UID, but the scanner's description.

    That is free text, by which people know their series; it goes nowhere else.
    """
    one = stack[0]
    parts = [f"series {one.number}"]
    parts += [repr(one.description)] if one.description else []
    parts += ["\\".join(one.kind[3])] if one.kind[3] else []
    parts += [one.kind[4].lower()] if one.kind[4] else []
    parts += [f"echo {one.echo_ms:g} ms"] if one.echo_ms is not None else []
    parts += [f"time point {one.kind[5]}"] if one.kind[5] else []
    parts += [f"{len(stack)} slice{'s' * (len(stack) > 1)} of {one.kind[7]} x {one.kind[6]}"]
    return " ".join(parts)


# --- whether a stack is a grid ----------------------------------------------------------------------------------------


def _grid(folder: Path, stack: Stack) -> Geometry:
    """The grid of an ordered stack: its slices evenly spaced along their normal, none missing, none twice."""
    first = stack[0]
    normal = np.cross(*first.axes)
    if np.linalg.norm(normal) < SINGULAR:
        raise InputError(
            first.path,
            found=f"rows and columns along one line, {np.round(first.axes, 4).ravel().tolist()}",
            rule="rows and columns of a slice are at right angles",
            remedy="export the series again from its source",
        )
    places = np.array([item.position @ normal for item in stack])
    _refuse_other_planes(stack, places)
    step = _step_mm(folder, stack, places)
    rows, columns = first.kind[6:8]
    size = (columns, rows, len(stack))
    check_size(size, folder)
    matrix = np.column_stack([*first.axes, normal])
    x, y, z = first.position.tolist()
    grid = Geometry(size, (*first.spacing_mm, step), (x, y, z), tuple(matrix.ravel().tolist()))
    check_axes(grid, folder)
    _refuse_tilt(folder, stack, places, normal)
    return grid


def _refuse_other_planes(stack: Stack, places: np.ndarray) -> None:
    """Refuse a slice whose pixels are spaced or turned otherwise than the first one's."""
    first = stack[0]
    if first.kind[8] != 1:
        raise InputError(
            first.path,
            found=f"{first.kind[8]} values a pixel (a colour image)",
            rule="a volume has one intensity a voxel",
            remedy="choose the series that it was made from",
        )
    width = max(first.kind[6:8]) * max(first.spacing_mm)
    for item, place in zip(stack, places, strict=True):
        spread = np.abs(np.subtract(item.spacing_mm, first.spacing_mm)).max() * max(first.kind[6:8])
        turn = np.abs(item.axes - first.axes).max() * width
        if not max(spread, turn) <= MISPLACED_MM:
            raise InputError(
                item.path,
                found=f"a slice at {place:.2f} mm with pixels of {item.spacing_mm} mm along "
                f"{np.round(item.axes, 4).ravel().tolist()}; the first has {first.spacing_mm} mm along "
                f"{np.round(first.axes, 4).ravel().tolist()}",
                rule=f"all slices of a series have one grid, to {MISPLACED_MM:g} mm at their corners",
                remedy="move this slice and its like to a folder of their own",
            )


def _step_mm(folder: Path, stack: Stack, places: np.ndarray) -> float:
    """Distance between slices; a missing, doubled or misplaced one is refused.

    GDCM's reader says nothing of a missing slice, and stretches the others over the gap.
    """
    if len(stack) == 1:
        if not stack[0].thickness_mm > 0:
            raise InputError(
                stack[0].path,
                found="a single slice without a thickness",
                rule="a volume's voxels have three sides",
                remedy="give a series of more slices",
            )
        return stack[0].thickness_mm
    gaps = np.diff(places)
    usual = float(np.median(gaps))
    where = int(np.argmin(gaps))
    if gaps[where] < SAME_GRID_MM:
        raise InputError(
            folder,
            found=f"two slices at {places[where]:.2f} mm ({stack[where].path.name}, {stack[where + 1].path.name}; "
            f"{int(np.count_nonzero(gaps < SAME_GRID_MM))} such pairs)",
            rule="each slice of a series has its own position",
            remedy="remove the copies, or put repetitions (time points, contrasts) in folders of their own",
        )
    step = float(places[-1] - places[0]) / (len(places) - 1)
    astray = np.abs(places - places[0] - step * np.arange(len(places)))
    if astray.max() > MISPLACED_MM:
        raise _uneven(folder, places, gaps, usual)
    return step


def _uneven(folder: Path, places: np.ndarray, gaps: np.ndarray, usual: float) -> InputError:
    where = int(np.argmax(np.abs(gaps - usual)))
    lost = round(gaps[where] / usual) - 1
    return InputError(
        folder,
        found=f"{gaps[where]:.2f} mm between the slices at {places[where]:.2f} and {places[where + 1]:.2f} mm, where "
        f"{usual:.2f} mm is usual" + (f" ({lost} missing)" if lost > 0 else ""),
        rule=f"slices are evenly spaced, to {MISPLACED_MM:g} mm",
        remedy="export the series again, all of it" if lost > 0 else "resample it to even slices",
    )


def _refuse_tilt(folder: Path, stack: Stack, places: np.ndarray, normal: np.ndarray) -> None:
    """Refuse slices that are shifted within their plane: a tilted gantry, or two stacks in one."""
    shifts = np.array([item.position - stack[0].position for item in stack])
    aside = np.linalg.norm(shifts - np.outer(places - places[0], normal), axis=1)
    if aside.max() > MISPLACED_MM:
        where = int(np.argmax(aside > MISPLACED_MM))
        raise InputError(
            folder,
            found=f"a slice at {places[where]:.2f} mm that lies {aside[where]:.2f} mm beside the first "
            f"({aside.max():.2f} mm at most)",
            rule=f"slices lie above each other along their normal, to {MISPLACED_MM:g} mm (no gantry tilt, no shear)",
            remedy="resample the series to a rectangular grid (dcm2niix does for a tilted gantry)",
        )


# --- pixels -----------------------------------------------------------------------------------------------------------


def _pixels(file: Path) -> np.ndarray:
    """One slice, rescaled. File by file, because ITK's series reader rounds all to the first one's type."""
    try:
        pixels: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(file), imageIO="GDCMImageIO"))[0]
    except RuntimeError as error:
        raise _unreadable(file, error) from None
    return pixels


def _unreadable(file: Path, error: Exception) -> InputError:
    return InputError(
        file,
        found=f"a DICOM file that cannot be read ({type(error).__name__})",
        rule="every slice is whole and of a transfer syntax that GDCM decodes",
        remedy="copy it again from its source, or export the series uncompressed",
    )
