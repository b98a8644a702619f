"""A NIfTI file: its header, its grid and its voxels, each checked before it is believed.

Knows the NIfTI-1 and NIfTI-2 formats, either byte order, gzipped or not; knows nothing of other formats.
ITK's own reader fills a truncated file with zeros, picks one of two contradicting matrices, and turns NaN into 0, all
without a word; this one reads each byte once, with gzip's checksum.
Source: https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h and nifti2.h.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib  # inflates faster than zlib, with the same checksums

from slicestore.components import choose, image, volumes
from slicestore.errors import InputError
from slicestore.geometry import MISPLACED_MM, Geometry, check_axes, check_size

TYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
"""NIfTI's codes of real scalar types."""
TO_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""NIfTI's codes of length units: unknown, metre, millimetre, micrometre."""
MAX_DEFLATE = 1032
"""Most bytes that one byte of gzip can stand for; a header that promises more is damaged."""


def _layout(size: int, **fields: tuple[int, str]) -> np.dtype:
    """What is read of a header of so many bytes: the offset and type of each field."""
    offsets, formats = zip(*fields.values(), strict=True)
    return np.dtype({"names": list(fields), "offsets": list(offsets), "formats": list(formats), "itemsize": size})


LAYOUTS = {
    348: _layout(
        348,
        dim=(40, "8i2"),
        datatype=(70, "i2"),
        pixdim=(76, "8f4"),
        vox_offset=(108, "f4"),
        scl_slope=(112, "f4"),
        scl_inter=(116, "f4"),
        xyzt_units=(123, "u1"),
        qform_code=(252, "i2"),
        sform_code=(254, "i2"),
        quatern=(256, "3f4"),
        qoffset=(268, "3f4"),
        srow=(280, "(3,4)f4"),
        magic=(344, "S4"),
    ),
    540: _layout(
        540,
        magic=(4, "S4"),
        datatype=(12, "i2"),
        dim=(16, "8i8"),
        pixdim=(104, "8f8"),
        vox_offset=(168, "i8"),
        scl_slope=(176, "f8"),
        scl_inter=(184, "f8"),
        qform_code=(344, "i4"),
        sform_code=(348, "i4"),
        quatern=(352, "3f8"),
        qoffset=(376, "3f8"),
        srow=(400, "(3,4)f8"),
        xyzt_units=(500, "i4"),
    ),
}
"""By the size that a header begins with: NIfTI-1 and NIfTI-2."""
_MATRICES = (
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z"),
)
"""Where voxels lie, as nibabel names it."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a NIfTI file promises."""

    geometry: Geometry
    more: tuple[int, ...]
    """Lengths of its axes beyond the third: time points, echoes, directions."""
    dtype: np.dtype
    offset: int
    """Bytes before the first voxel."""
    slope: float
    inter: float
    """A voxel means `stored * slope + inter`."""

    @property
    def told(self) -> str:
        """What the file holds, in words."""
        return volumes(self.count, image((*self.geometry.size, *self.more)))

    @property
    def count(self) -> int:
        """Volumes in the file."""
        return math.prod(self.more)

    @property
    def voxels(self) -> int:
        """Voxels of one volume."""
        return math.prod(self.geometry.size)


def inspect(path: Path) -> Header:
    """Read the header alone.

    Raises:
        InputError: it is no NIfTI header, not of a volume of real numbers, or contradicts itself.
        EOFError, OSError, IsalError: the file cannot be read.
    """
    head = bytearray()
    for block in _blocks(path, 1 << 12):
        head += block
        if len(head) >= 540:
            break
    return _parse(path, bytes(head))


def read(path: Path, component: int | None) -> tuple[np.ndarray, Geometry]:
    """Read one volume `(z, y, x)` and its grid; what is not scaled keeps the file's type.

    The file is decompressed to its end, which checks gzip's checksum of all volumes in it.

    Raises:
        InputError: as `inspect`; the file is truncated; an unclear component.
        EOFError, OSError, IsalError: the file is damaged.
    """
    header = inspect(path)
    size = header.voxels * header.dtype.itemsize
    end = header.offset + size * header.count
    start = header.offset + size * choose(path, component, header.count, header.told)
    _refuse_short(path, path.stat().st_size * (MAX_DEFLATE if _gzipped(path) else 1), end)
    raw, seen = np.empty(size, dtype=np.uint8), 0
    for block in _blocks(path, 1 << 16):
        low, high = max(seen, start), min(seen + len(block), start + size)
        if low < high:
            raw[low - start : high - start] = np.frombuffer(block, np.uint8, high - low, low - seen)
        seen += len(block)
    _refuse_short(path, seen, end)
    voxels = raw.view(header.dtype).reshape(header.geometry.size[::-1])
    return _scaled(voxels, header.slope, header.inter), header.geometry


def write_like(path: Path, voxels: np.ndarray, out: Path) -> None:
    """Write voxels `(z, y, x)` under the matrices, units and version of another file's header, bit for bit.

    Names, notes and extensions of that header, in which scanners leave a patient's name, are not taken over.
    """
    import nibabel  # here, since others that read stores need no writer

    old: Any = nibabel.load(path).header
    new: Any = type(old)(endianness=old.endianness)
    for name in ("pixdim", "xyzt_units", "qform_code", "sform_code", *_MATRICES):
        new[name] = old[name]
    new.set_data_dtype(voxels.dtype)
    kind: Any = nibabel.Nifti2Image if isinstance(new, nibabel.Nifti2Header) else nibabel.Nifti1Image
    nibabel.save(kind(voxels.T, None, new), out)


def _gzipped(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    """Contents of a file, `size` of its bytes at a time, decompressed if need be; gzip's checksums are checked."""
    with path.open("rb") as file:
        if not _gzipped(path):
            while block := file.read(size << 6):
                yield block
            return
        inflate = isal_zlib.decompressobj(wbits=31)
        while block := file.read(size):
            while block:
                yield inflate.decompress(block)
                block = inflate.unused_data.lstrip(b"\0")  # another member, or the padding of a tape
                if inflate.eof and block:
                    inflate = isal_zlib.decompressobj(wbits=31)
        if not inflate.eof:
            raise EOFError("the compressed data end too early")


def _refuse_short(path: Path, size: int, promised: int) -> None:
    if size < promised:
        raise InputError(
            path,
            found=f"{'at most ' if _gzipped(path) else ''}{size} bytes",
            rule=f"its header promises {promised} bytes of voxels and header",
            remedy="the file is truncated: copy it again from its source",
        )


def _scaled(voxels: np.ndarray, slope: float, inter: float) -> np.ndarray:
    """Apply the header's scaling, a slice at a time to keep float64 small; a slope of 0 or NaN means none of it."""
    inter = inter if np.isfinite(inter) else 0.0
    if not np.isfinite(slope) or slope == 0 or (slope, inter) == (1, 0):
        return voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
    wide = voxels.dtype.itemsize > 4 or (voxels.dtype.kind != "f" and voxels.dtype.itemsize == 4)
    scaled = np.empty(voxels.shape, np.float64 if wide else np.float32)
    for plane, stored in zip(scaled, voxels, strict=True):
        plane[...] = stored.astype(np.float64) * slope + inter
    return scaled


# --- the header -------------------------------------------------------------------------------------------------------


def _parse(path: Path, head: bytes) -> Header:
    fields, order = _fields(path, head)
    kind, dims = int(fields["datatype"]), fields["dim"].tolist()
    if kind not in TYPES:
        raise InputError(
            path,
            found=f"voxels of NIfTI type {kind} (colour, complex or unknown)",
            rule="a voxel is one real number",
            remedy="export one channel, or magnitude and phase, as images of their own",
        )
    axes = dims[1 : 1 + dims[0]]
    if not 1 <= dims[0] <= 7 or min(axes) < 1:
        raise InputError(
            path,
            found=f"dimensions {dims}",
            rule="an image has one to seven axes, each of at least one voxel",
            remedy="the header is damaged: copy the file again, or convert it anew",
        )
    check_size(tuple(axes[:3]), path)
    x, y, z = axes[:3]
    return Header(
        geometry=_geometry(path, (x, y, z), fields),
        more=tuple(axes[3:]),
        dtype=np.dtype(f"{order}{TYPES[kind]}"),
        offset=max(fields.dtype.itemsize, int(np.nan_to_num(fields["vox_offset"]))),
        slope=float(fields["scl_slope"]),
        inter=float(fields["scl_inter"]),
    )


def _fields(path: Path, head: bytes) -> tuple[np.void, str]:
    """The header's fields and its byte order."""
    for order in ("<", ">"):
        size = int(np.frombuffer(head[:4].ljust(4, b"\0"), f"{order}i4")[0])
        if size in LAYOUTS and len(head) >= size:
            fields: np.void = np.frombuffer(head, LAYOUTS[size].newbyteorder(order), count=1)[0]
            break
    else:
        raise InputError(
            path,
            found="no NIfTI header" if head else "an empty file",
            rule="a .nii or .nii.gz file begins with one",
            remedy="copy it again from its source, or convert it anew",
        )
    if not fields["magic"].startswith(b"n+"):
        raise InputError(
            path,
            found="a header whose voxels are in another file, or an Analyze image",
            rule="a NIfTI volume is one file, .nii or .nii.gz",
            remedy="convert the pair (.hdr and .img) to .nii.gz",
        )
    return fields, order


def _geometry(path: Path, size: tuple[int, int, int], fields: np.void) -> Geometry:
    """Where the voxels lie: as the sform says, else the qform, which must agree where both are given.

    Without either it is ITK's guess: axes along left, posterior and superior from the origin.
    """
    to_mm = TO_MM.get(int(fields["xyzt_units"]) & 7, 1.0)
    x, y, z = (to_mm * fields["pixdim"][1:4].astype(float)).tolist()
    plain = Geometry(size, (x, y, z))
    check_axes(plain, path)
    grids = {}
    if fields["sform_code"] > 0:
        grids["sform"] = _lps_grid(size, to_mm * fields["srow"].astype(float))
    if fields["qform_code"] > 0:
        offset = to_mm * fields["qoffset"].astype(float)
        grids["qform"] = _lps_grid(size, np.column_stack([_rotation(fields) * plain.spacing_mm, offset]))
    for grid in grids.values():
        check_axes(grid, path)
    _refuse_disagreement(path, plain, grids)
    return next(iter(grids.values()), plain)


def _lps_grid(size: tuple[int, int, int], affine: np.ndarray) -> Geometry:
    """The grid of a 3 x 4 matrix to NIfTI's frame, right, anterior, superior."""
    return Geometry.from_affine(size, affine * np.array([[-1.0], [-1.0], [1.0]]))


def _rotation(fields: np.void) -> np.ndarray:
    """The 3 x 3 matrix of the header's quaternion, as nifti1.h writes it."""
    b, c, d = fields["quatern"].astype(float).tolist()
    rest = 1.0 - (b * b + c * c + d * d)
    if rest < 1e-7:  # half a turn: float32 rounding may leave the three longer than 1
        a, scale = 0.0, 1.0 / math.sqrt(1.0 - rest)
        b, c, d = b * scale, c * scale, d * scale
    else:
        a = math.sqrt(rest)
    left = -1.0 if fields["pixdim"][0] < 0 else 1.0
    return np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), left * 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, left * 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), left * (a * a + d * d - b * b - c * c)],
        ]
    )


def _refuse_disagreement(path: Path, plain: Geometry, grids: Mapping[str, Geometry]) -> None:
    """Programs differ in which of sform, qform and pixdim they believe, so all that are given have to agree."""
    if len(grids) == 2:
        gaps = grids["sform"].differences(grids["qform"], MISPLACED_MM)
    elif "sform" in grids:
        stretched = replace(grids["sform"], spacing_mm=plain.spacing_mm)
        gaps = grids["sform"].differences(stretched, MISPLACED_MM)
    else:
        return
    if gaps:
        other, setter = ("qform", "set_qform") if "qform" in grids else ("pixdim", "set_zooms")
        raise InputError(
            path,
            found=f"an sform and a {other} that disagree: {'; '.join(gaps)}",
            rule=f"both put each corner voxel at the same place, to {MISPLACED_MM:g} mm",
            remedy=f"find out which is right and set the other to it ({setter} in nibabel)",
        )
