"""A volume: voxels and where they lie; the one door through which images come in and go out.

Knows which reader a path needs (`nifti` and `dicom` are files of their own), SimpleITK's silent failures and how to
catch them; knows nothing of stores or networks.
"""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from isal.igzip_lib import IsalError

from slicestore import dicom, nifti
from slicestore.components import choose, image, volumes
from slicestore.errors import InputError
from slicestore.geometry import Geometry, check_axes, check_size

sitk.ProcessObject.GlobalWarningDisplayOff()  # what ITK warns of on stderr is an error here, or no matter

SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")
"""Files that `read` accepts, beside folders of DICOM files."""


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


def inspect(path: str | Path, component: int | None = None) -> Geometry:
    """Read the grid of one volume, from headers alone.

    Args:
        path: a file of `SUFFIXES`, or a folder that holds the files of DICOM series.
        component: which of several volumes in the file (echoes, time points, channels) or folder (series), from 0.

    Raises:
        InputError: the file is missing, of an unknown format, without a readable header, not 3D, with axes that are no
            grid, or holds several volumes of which none is chosen.
    """
    path = Path(path)
    try:
        if os.path.isdir(path):
            return dicom.inspect(_present(path), component)
        if _is_nifti(_present(path)):
            header = nifti.inspect(path)
            choose(path, component, header.count, header.told)
            return header.geometry
        grid, count, told = _itk_grid(path, _itk_header(path))
    except (EOFError, OSError, zlib.error, IsalError) as error:
        raise _unreadable(path, error) from None
    choose(path, component, count, told)
    return grid


def read(path: str | Path, component: int | None = None) -> Volume:
    """Read one volume in its own grid, once every byte of it is known to be whole.

    Args and errors are those of `inspect`; also
    Raises:
        InputError: the file is damaged, or holds NaN or infinite voxels.
    """
    path = Path(path)
    try:
        if os.path.isdir(path):
            voxels, grid = dicom.read(_present(path), component)
        elif _is_nifti(_present(path)):
            voxels, grid = nifti.read(path, component)
        else:
            voxels, grid = _itk_read(path, component)
    except (EOFError, OSError, zlib.error, IsalError) as error:
        raise _unreadable(path, error) from None
    if voxels.dtype.kind == "f":
        broken = sum(int(np.count_nonzero(~np.isfinite(plane))) for plane in voxels)
        _refuse_non_finite(path, broken, voxels.size)
    return Volume(voxels, grid)


def digest(path: str | Path, component: int | None = None) -> str:
    """Name a volume's content: sha256 over the bytes of its file (of both files of a `.mhd`), or of its DICOM slices.

    The component is part of it where a file holds several volumes; a DICOM folder's other series are not.

    Raises:
        InputError: as `inspect`.
    """
    path = Path(path)
    inspect(path, component)
    if path.is_dir():
        return dicom.digest(path, component)
    total = hashlib.sha256()
    for part in [path] if _is_nifti(path) else [path, *_detached(path)]:
        with part.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    total.update(f"{component or 0}".encode())
    return total.hexdigest()


def write(volume: Volume, path: str | Path, *, like: Path | None = None) -> None:
    """Write a volume whole or not at all (temporary file, then rename).

    Args:
        volume: what is written.
        path: where, in the format that its suffix names.
        like: a file on whose grid the volume lies; where both are NIfTI the bits that say where voxels lie are copied,
            which a new header would round anew (NIfTI-1 has 32 bits for a number). Nothing else of it is.

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
        if like is not None and _is_nifti(path) and not like.is_dir() and _is_nifti(like):
            nifti.write_like(like, volume.voxels, partial)
        else:
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
        remedy="convert it to NIfTI, MetaImage or NRRD; of DICOM give the folder of the series",
        rule=f"a volume ends in one of {', '.join(SUFFIXES)}",
    )


def _present(path: Path) -> Path:
    """The path itself, once it can be read."""
    if not os.path.isdir(path):
        _suffix(path)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            path, found="no such file", rule="an image is a file that exists", remedy="check the path"
        ) from None
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise _forbidden(path)
    return path


def _forbidden(path: Path) -> InputError:
    return InputError(
        path,
        found="no permission to read it",
        rule="images, and the folders that they lie in, are readable by whoever prepares them",
        remedy="ask its owner, or run `chmod u+rX` on it",
    )


def _is_nifti(path: Path) -> bool:
    return _suffix(path) in (".nii", ".nii.gz")


# --- MetaImage and NRRD, by ITK ---------------------------------------------------------------------------------------


def _itk_header(path: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(path, error) from None
    return reader


def _itk_grid(path: Path, header: sitk.ImageFileReader) -> tuple[Geometry, int, str]:
    """The grid of each volume of a file, how many there are (along a fourth axis, or as values of a voxel), and both
    in words.
    """
    size, axes, channels = list(header.GetSize()), header.GetDimension(), header.GetNumberOfComponents()
    count = channels * math.prod(size[3:])
    check_size(size[:3], path)
    if channels > 1 and count > channels:
        raise InputError(
            path,
            found=f"{channels} values a voxel and {count // channels} volumes of them",
            rule="a file holds one volume, or several along one axis",
            remedy="split it by its fourth axis",
        )
    rows = np.reshape(header.GetDirection(), (axes, axes))[:3, :3]
    x, y, z = size[:3]
    grid = Geometry((x, y, z), header.GetSpacing()[:3], header.GetOrigin()[:3], tuple(rows.ravel().tolist()))
    check_axes(grid, path)
    return grid, count, volumes(count, image(size, channels))


def _itk_read(path: Path, component: int | None) -> tuple[np.ndarray, Geometry]:
    header = _itk_header(path)
    grid, count, told = _itk_grid(path, header)
    index = choose(path, component, count, told)
    pixel = sitk.GetPixelIDValueAsString(header.GetPixelID())
    if pixel.startswith("complex"):
        raise InputError(
            path,
            found="complex voxels",
            rule="a voxel is one real number",
            remedy="export magnitude and phase as images of their own",
        )
    _verify_stream(path, pixel, math.prod(grid.size) * count)
    try:
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    except RuntimeError as error:
        raise _unreadable(path, error) from None
    shape = grid.size[::-1]
    if pixel.startswith("vector"):
        return np.ascontiguousarray(array.reshape(*shape, -1)[..., index]), grid
    return array.reshape(-1, *shape)[index], grid


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """The lines of a MetaImage's or NRRD's header by their names in small letters, and the bytes that they take."""
    mark = ":" if _suffix(path) == ".nrrd" else "="
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        while line := file.readline(1 << 12).strip():
            key, _, value = line.decode("latin-1").partition(mark)
            fields[key.strip().lower()] = value.strip(" =")
            if "elementdatafile" in fields:
                break
        return fields, file.tell()


def _detached(path: Path) -> list[Path]:
    """The file of voxels that a header names, if it is another one.

    Raises:
        InputError: it names several, or one that cannot be read.
    """
    fields, _ = _fields(path)
    name = fields.get("elementdatafile") or fields.get("data file") or fields.get("datafile") or "LOCAL"
    if name.upper() == "LOCAL":
        return []
    if name.split()[0].upper() == "LIST" or "%" in name:
        raise InputError(
            path,
            found="voxels spread over several files",
            rule="a volume is one file, or a header and one file of voxels",
            remedy="convert it to .mha or .nrrd in one file",
        )
    file = path.parent / name
    if not file.is_file() or not os.access(file, os.R_OK):
        raise InputError(
            path,
            found=f"no readable file {name!r} of its voxels",
            rule="the file that a header names lies beside it",
            remedy="copy both together",
        )
    return [file]


def _verify_stream(path: Path, pixel: str, values: int) -> None:
    """Count the bytes of the voxels, decompressing them: ITK ignores a MetaImage's checksum, and often an NRRD's."""
    fields, start = _fields(path)
    data, start = next(((file, 0) for file in _detached(path)), (path, start))
    zipped = fields.get("compresseddata", "").lower() == "true" or fields.get("encoding") in ("gzip", "gz")
    if fields.get("binarydata", "").lower() == "false" or (not zipped and fields.get("encoding", "raw") != "raw"):
        return  # text and bzip2, of which ITK's readers do notice the end
    size, promised = 0, values * int(pixel.partition("-bit")[0].split()[-1]) // 8
    either = zlib.decompressobj(wbits=47)  # zlib or gzip, with the checksum that ends it
    with data.open("rb") as file:
        file.seek(start)
        while not either.eof and (block := file.read(1 << 16)):
            size += len(either.decompress(block) if zipped else block)
    if (zipped and not either.eof) or size < promised:
        raise InputError(
            data,
            found=f"{size} bytes of voxels",
            rule=f"its header promises {promised}",
            remedy="the file is truncated: copy it again from its source",
        )


def _refuse_non_finite(path: Path, broken: int, voxels: int) -> None:
    if broken:
        raise InputError(
            path,
            found=f"{broken} NaN or infinite voxels of {voxels}",
            rule="every voxel is a finite number, because resampling would spread the others",
            remedy="find out where they come from and replace them (masked background is usually 0)",
        )


def _unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, PermissionError):
        return _forbidden(path)
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Reason:")]
    reason = lines[-1].rpartition("): ")[2].rstrip(".")[:160] if lines else type(error).__name__
    return InputError(
        path,
        found=f"an unreadable image ({reason})",
        rule="an image decompresses fully and matches its header",
        remedy="copy it again from its source, or convert it anew",
    )
