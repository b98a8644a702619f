"""A volume: voxels and where they lie. The only file that reads or writes images.

Knows SimpleITK's readers, their silent failures and how to catch them; knows nothing of stores or networks.
"""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from slicestore.errors import InputError
from slicestore.geometry import Geometry

SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")
"""Formats that `read` accepts."""


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """Voxels `(z, y, x)` and their geometry `(x, y, z)`."""

    voxels: np.ndarray
    geometry: Geometry

    def __post_init__(self) -> None:
        if self.voxels.ndim != 3 or self.voxels.shape[::-1] != self.geometry.size:
            raise ValueError(f"voxels {self.voxels.shape} (z, y, x) do not fill a grid of {self.geometry.size} x, y, z")

    def to_image(self) -> sitk.Image:
        """Hand the volume to ITK."""
        image = sitk.GetImageFromArray(np.ascontiguousarray(self.voxels))
        image.SetSpacing(self.geometry.spacing_mm)
        image.SetOrigin(self.geometry.origin_mm)
        image.SetDirection(self.geometry.direction)
        return image

    @classmethod
    def from_image(cls, image: sitk.Image) -> Volume:
        """Take over the volume that a 3D ITK image holds."""
        geometry = Geometry(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())
        return cls(sitk.GetArrayFromImage(image), geometry)


def inspect(path: str | Path) -> Geometry:
    """Read the grid of one 3D scalar volume, from its header alone.

    Raises:
        InputError: the file is missing, of an unknown format, without a readable header, not 3D, or not scalar.
    """
    path = Path(path)
    header = _header(path)
    size, axes = header.GetSize(), header.GetDimension()
    if axes == 4 and size[3] == 1:
        size = size[:3]
    if len(size) != 3 or min(size) < 2:
        raise InputError(
            path,
            found=f"a {len([n for n in size if n > 1])}D image of size {size}",
            rule="a volume has three dimensions of at least two voxels",
            remedy="extract one 3D volume (of a 4D series, one echo or time point) and give that file",
        )
    if header.GetNumberOfComponents() != 1:
        raise InputError(
            path,
            found=f"{header.GetNumberOfComponents()} values a voxel",
            rule="a volume has one intensity a voxel",
            remedy="give a scalar image",
        )
    rows = np.reshape(header.GetDirection(), (axes, axes))[:3, :3]
    return Geometry(size, header.GetSpacing()[:3], header.GetOrigin()[:3], tuple(rows.ravel().tolist()))


def read(path: str | Path) -> Volume:
    """Read one 3D scalar volume in its own grid.

    Raises:
        InputError: the file is missing, of an unknown format, damaged, not 3D, not scalar, or holds non-finite voxels.
    """
    path = Path(path)
    inspect(path)
    _verify_bytes(path)
    image = _read_image(path)
    if image.GetDimension() == 4:
        image = image[:, :, :, 0]
    volume = Volume.from_image(image)
    if volume.voxels.dtype.kind == "f":
        _refuse_non_finite(path, int(np.count_nonzero(~np.isfinite(volume.voxels))), volume.voxels.size)
    return volume


def write(volume: Volume, path: str | Path) -> None:
    """Write a volume whole or not at all (temporary file, then rename).

    Raises:
        InputError: the suffix names no format of `SUFFIXES`, or `.mhd`, which is two files and cannot appear at once.
    """
    path = Path(path)
    suffix = _suffix(path)
    if suffix == ".mhd":
        raise InputError(
            path,
            found="suffix '.mhd'",
            rule="a volume is written as one file",
            remedy="take .mha, the same format in one file",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[: -len(suffix)]}.partial{suffix}")
    try:
        sitk.WriteImage(volume.to_image(), str(partial), useCompression=suffix != ".nii")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _suffix(path: Path) -> str:
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    raise InputError(
        path,
        found=f"suffix {path.suffix or 'none'!r}",
        remedy="convert it to NIfTI, MetaImage or NRRD",
        rule=f"a volume ends in one of {', '.join(SUFFIXES)}",
    )


def _header(path: Path) -> sitk.ImageFileReader:
    _suffix(path)
    if not path.is_file():
        raise InputError(
            path,
            found="a folder" if path.is_dir() else "no such file",
            rule="an image is a file that exists",
            remedy="check the path",
        )
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(path, error) from None
    return reader


def _verify_bytes(path: Path) -> None:
    """Catch what ITK reads without a word: a damaged NIfTI, MetaImage or NRRD comes back filled with zeros or noise."""
    try:
        if _suffix(path) in (".nii", ".nii.gz"):
            _verify_nifti(path)
        else:
            _verify_stream(path)
    except (EOFError, OSError, zlib.error) as error:
        raise _unreadable(path, error) from None


def _verify_nifti(path: Path) -> None:
    """Decompress to the end (which checks the trailing CRC), count the bytes promised, and look for non-finite voxels.

    ITK reads those of a NIfTI as 0 without a word.
    """
    opener: Any = gzip.open if _suffix(path) == ".nii.gz" else open
    with opener(path, "rb") as file:
        head = file.read(348)
        order = "<" if int.from_bytes(head[:4], "little") == 348 else ">"
        dims = np.frombuffer(head[40:56], dtype=f"{order}i2").astype(int)
        kind, bits = np.frombuffer(head[70:74], dtype=f"{order}i2").astype(int).tolist()
        offset = max(348, int(np.frombuffer(head[108:112], dtype=f"{order}f4")[0]))
        voxels = int(np.prod(dims[1 : 1 + dims[0]]))
        size, broken = 348 + len(file.read(offset - 348)), 0
        while block := file.read(1 << 22):
            size += len(block)
            if kind in (16, 64):  # float32, float64
                values = np.frombuffer(block, f"{order}f{bits // 8}", count=len(block) * 8 // bits)
                broken += int(np.count_nonzero(~np.isfinite(values)))
    if size < offset + voxels * bits // 8:
        raise InputError(
            path,
            found=f"{size} bytes",
            rule=f"its header promises {offset + voxels * bits // 8} bytes of voxels and header",
            remedy="the file is truncated: copy it again from its source",
        )
    _refuse_non_finite(path, broken, voxels)


def _verify_stream(path: Path) -> None:
    """Decompress what a MetaImage or NRRD holds: ITK ignores the first's checksum, and often the second's."""
    with path.open("rb") as file:
        fields: dict[str, str] = {}
        while line := file.readline(1 << 12).strip():
            key, _, value = line.decode("latin-1").partition("=" if path.suffix.lower() != ".nrrd" else ":")
            fields[key.strip().lower()] = value.strip()
            if "elementdatafile" in fields:
                break
        start = file.tell()
    if fields.get("compresseddata", "").lower() != "true" and fields.get("encoding") not in ("gzip", "gz"):
        return
    name = fields.get("elementdatafile") or fields.get("data file") or fields.get("datafile") or "LOCAL"
    if name.upper() != "LOCAL":
        path, start = path.parent / name, 0
    either = zlib.decompressobj(wbits=47)  # zlib or gzip, with the checksum that ends it
    with path.open("rb") as file:
        file.seek(start)
        while not either.eof:
            if not (block := file.read(1 << 20)):
                raise EOFError("the compressed voxels end too early")
            either.decompress(block)


def _refuse_non_finite(path: Path, broken: int, voxels: int) -> None:
    if broken:
        raise InputError(
            path,
            found=f"{broken} NaN or infinite voxels of {voxels}",
            rule="every voxel is a finite number, because resampling would spread the others",
            remedy="find out where they come from and replace them (masked background is usually 0)",
        )


def _read_image(path: Path) -> sitk.Image:
    try:
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> InputError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Reason:")]
    reason = lines[-1].rpartition("): ")[2].rstrip(".")[:160] if lines else type(error).__name__
    return InputError(
        path,
        found=f"an unreadable image ({reason})",
        rule="an image decompresses fully and matches its header",
        remedy="copy it again from its source, or convert it anew",
    )
