"""NIfTI, byte by byte: ITK reads the same, except where it is wrong without a word."""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st

from slicestore.errors import InputError
from slicestore.geometry import Geometry
from slicestore.volume import Volume, inspect, read

VOXELS = np.arange(24).reshape(2, 3, 4)
SFORM = ((-0.5, 0, 0, 10), (0, -0.75, 0, 20), (0, 0, 2, 30))
"""LPS grid of 4 x 3 x 2 voxels of 0.5 x 0.75 x 2 mm from (-10, -20, 30)."""
GRID = Geometry((4, 3, 2), (0.5, 0.75, 2.0), (-10.0, -20.0, 30.0))
TYPES = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "i1": 256, "u2": 512, "u4": 768, "i8": 1024, "u8": 1280}


def nifti(path: Path, voxels: np.ndarray = VOXELS, *, order: str = "<", kind: str = "i2", **changed: Any) -> Path:
    """Write a NIfTI-1 file field by field, as nifti1.h lists them; `changed` by their names there."""
    fields: dict[str, Any] = {
        "dim": [3, *voxels.shape[::-1], *[1] * 4][:8],
        "datatype": TYPES[kind],
        "pixdim": [1, 0.5, 0.75, 2, 0, 0, 0, 0],
        "vox_offset": 352,
        "scl_slope": 0,
        "scl_inter": 0,
        "xyzt_units": 2,
        "qform_code": 0,
        "sform_code": 1,
        "quatern": [0, 0, 1],  # half a turn about z: x and y point to the patient's left and back
        "qoffset": [10, 20, 30],
        "srow": np.ravel(SFORM).tolist(),
        "magic": b"n+1",
    }
    assert set(changed) <= set(fields)
    at = {"dim": (40, "8h"), "datatype": (70, "h"), "pixdim": (76, "8f"), "vox_offset": (108, "f")}
    at |= {"scl_slope": (112, "f"), "scl_inter": (116, "f"), "xyzt_units": (123, "B"), "qform_code": (252, "h")}
    at |= {"sform_code": (254, "h"), "quatern": (256, "3f"), "qoffset": (268, "3f"), "srow": (280, "12f")}
    head = bytearray(352)
    struct.pack_into(f"{order}i", head, 0, 348)
    struct.pack_into("4s", head, 344, (fields | changed)["magic"])
    for name, (offset, form) in at.items():
        value = (fields | changed)[name]
        struct.pack_into(f"{order}{form}", head, offset, *(value if isinstance(value, list) else [value]))
    _put(path, bytes(head) + voxels.astype(f"{order}{kind}").tobytes())
    return path


def nifti2(path: Path, order: str = "<") -> Path:
    """Write a NIfTI-2 file field by field, as nifti2.h lists them."""
    head = bytearray(544)
    struct.pack_into(f"{order}i8s2h8q", head, 0, 540, b"n+2\0\r\n\x1a\n", 4, 16, 3, 4, 3, 2, 1, 1, 1, 1)
    struct.pack_into(f"{order}8d", head, 104, 1, 0.5, 0.75, 2, 0, 0, 0, 0)
    struct.pack_into(f"{order}q2d", head, 168, 544, 2.0, -1.0)
    struct.pack_into(f"{order}2i", head, 344, 0, 1)
    struct.pack_into(f"{order}12d", head, 400, *np.ravel(SFORM))
    struct.pack_into(f"{order}i", head, 500, 2)
    _put(path, bytes(head) + VOXELS.astype(f"{order}i2").tobytes())
    return path


def _put(path: Path, data: bytes) -> None:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


# --- what ITK reads, too ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", TYPES)
def test_every_real_type_in_either_byte_order_is_read_as_itk_reads_it(tmp_path: Path, order: str, kind: str) -> None:
    path = nifti(tmp_path / "a.nii.gz", order=order, kind=kind)
    volume, image = read(path), sitk.ReadImage(str(path))
    assert volume.voxels.dtype == np.dtype(kind)
    assert volume.voxels.dtype.isnative
    assert np.array_equal(volume.voxels, VOXELS)
    assert np.array_equal(volume.voxels, sitk.GetArrayFromImage(image))
    assert not volume.geometry.differences(GRID, 1e-6)
    assert not volume.geometry.differences(Volume.from_image(image).geometry, 1e-6)


@pytest.mark.parametrize(
    ("slope", "inter", "third"),
    [(0.5, 0, 1.0), (2, 100, 104), (1, -3, -1), (0, 7, 2), (math.nan, 7, 2), (1, 0, 2), (1, math.nan, 2), (-1, 0, -2)],
)
def test_scaling_is_applied_and_one_that_means_nothing_is_not(
    tmp_path: Path, slope: float, inter: float, third: float
) -> None:
    for kind in ("i2", "f4"):
        path = nifti(tmp_path / "a.nii", kind=kind, scl_slope=slope, scl_inter=inter)
        assert read(path).voxels[0, 0, 2] == third
        if slope and not math.isnan(slope + inter):  # of 0 ITK makes 1, and adds; the format says to ignore both
            assert np.array_equal(read(path).voxels, sitk.GetArrayFromImage(sitk.ReadImage(str(path))))


def test_scaled_integers_of_32_bits_keep_their_digits(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", np.full((2, 3, 4), 2**30 + 1), kind="i4", scl_slope=1, scl_inter=1)
    assert read(path).voxels.max() == 2**30 + 2


@given(
    quaternion=st.tuples(*[st.floats(-1, 1, allow_subnormal=False)] * 4).filter(lambda q: math.hypot(*q) > 0.1),
    spacing=st.tuples(*[st.floats(0.2, 3.0, allow_subnormal=False)] * 3),
    left=st.booleans(),
)
def test_a_qform_is_turned_into_the_grid_that_itk_makes_of_it(
    tmp_path_factory: pytest.TempPathFactory,
    quaternion: tuple[float, ...],
    spacing: tuple[float, float, float],
    left: bool,
) -> None:
    _, *bcd = np.array(quaternion) / math.hypot(*quaternion) * (1 if quaternion[0] >= 0 else -1)
    path = nifti(
        tmp_path_factory.mktemp("q") / "a.nii",
        sform_code=0,
        qform_code=1,
        quatern=bcd,
        pixdim=[-1 if left else 1, *spacing, 0, 0, 0, 0],
    )
    image = sitk.ReadImage(str(path))
    assert not inspect(path).differences(Volume.from_image(image).geometry, 1e-3)


def test_a_file_without_either_matrix_lies_where_itk_puts_it(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", sform_code=0)
    assert (
        inspect(path) == Geometry((4, 3, 2), (0.5, 0.75, 2.0)) == Volume.from_image(sitk.ReadImage(str(path))).geometry
    )


def test_oblique_volumes_written_by_itk_come_back(tmp_path: Path) -> None:
    turn = sitk.Euler3DTransform((0, 0, 0), 0.4, -0.3, 2.9).GetMatrix()
    grid = Geometry((4, 3, 2), (0.5, 0.75, 2.0), (100.0, -90.0, 80.0), turn)
    sitk.WriteImage(Volume(VOXELS.astype(np.int16), grid).to_image(), str(tmp_path / "a.nii"))
    assert not inspect(tmp_path / "a.nii").differences(grid, 1e-4)


# --- what ITK does not read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
def test_nifti_2_is_read(tmp_path: Path, order: str) -> None:
    volume = read(nifti2(tmp_path / "a.nii.gz", order))
    assert np.array_equal(volume.voxels, 2.0 * VOXELS - 1)
    assert volume.geometry == GRID


@pytest.mark.parametrize(("unit", "scale"), [(1, 0.001), (3, 1000), (0, 1)])
def test_metres_and_micrometres_become_millimetres(tmp_path: Path, unit: int, scale: float) -> None:
    path = nifti(
        tmp_path / "a.nii",
        xyzt_units=unit + 8,  # and seconds
        pixdim=[1, 0.5 * scale, 0.75 * scale, 2 * scale, 0, 0, 0, 0],
        srow=(np.ravel(SFORM) * scale).tolist(),
    )
    assert not inspect(path).differences(GRID, 1e-5)


def test_five_dimensions_are_counted_and_chosen_from(tmp_path: Path) -> None:
    series = np.arange(6 * 24).reshape(6, 2, 3, 4)
    path = nifti(tmp_path / "a.nii.gz", series, dim=[5, 4, 3, 2, 1, 6, 1, 1])
    assert np.array_equal(read(path, 4).voxels, series[4])
    path = nifti(tmp_path / "b.nii.gz", series, dim=[5, 4, 3, 2, 2, 3, 1, 1])
    with pytest.raises(InputError, match=r"6 volumes.*0 to 5"):
        inspect(path)
    assert np.array_equal(read(path, 5).voxels, series[5])


def test_a_gzip_of_several_members_is_read_to_the_end_of_the_last(tmp_path: Path) -> None:
    data = nifti(tmp_path / "a.nii").read_bytes()
    path = tmp_path / "b.nii.gz"
    path.write_bytes(gzip.compress(data[:360]) + gzip.compress(data[360:]) + bytes(512))
    assert np.array_equal(read(path).voxels, VOXELS)
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(InputError, match="unreadable"):
        read(path)


# --- what no one should believe ---------------------------------------------------------------------------------------

SHIFTED = [10.2, 20, 30]
WRONG: dict[str, tuple[Mapping[str, Any], str]] = {
    "sform and qform apart": (
        {"qform_code": 1, "qoffset": SHIFTED},
        r"an sform and a qform that disagree: origin .*corners up to 0\.2 mm apart.*to 0\.1 mm.*set_qform in nibabel",
    ),
    "sform and pixdim apart": (
        {"pixdim": [1, 0.7, 0.75, 2, 0, 0, 0, 0]},
        r"an sform and a pixdim that disagree: spacing .*set_zooms",
    ),
    "sheared sform": ({"srow": [-0.5, 0.3, 0, 10, 0, -0.75, 0, 20, 0, 0, 2, 30]}, "sheared"),
    "singular sform": ({"srow": [-0.5, -0.5, 0, 10, 0, 0, 0, 20, 0, 0, 2, 30]}, "a singular direction"),
    "sform of zeros": ({"srow": [0.0] * 12}, r"spacing \(0\.0, 0\.0, 0\.0\) mm"),
    "NaN in sform": ({"srow": [math.nan] * 12}, "finite numbers"),
    "NaN in qform": ({"sform_code": 0, "qform_code": 1, "quatern": [math.nan, 0, 0]}, "finite numbers"),
    "spacing 0": ({"pixdim": [1, 0, 0.75, 2, 0, 0, 0, 0]}, r"spacing \(0\.0, 0\.75, 2\.0\) mm; .*positive"),
    "spacing negative": ({"pixdim": [1, 0.5, -0.75, 2, 0, 0, 0, 0]}, r"spacing \(0\.5, -0\.75, 2\.0\) mm"),
    "spacing NaN": ({"pixdim": [1, 0.5, 0.75, math.nan, 0, 0, 0, 0]}, "finite numbers"),
    "spacing infinite": ({"pixdim": [1, 0.5, 0.75, math.inf, 0, 0, 0, 0]}, "finite numbers"),
    "size 0": ({"dim": [3, 4, 0, 2, 1, 1, 1, 1]}, r"dimensions \[3, 4, 0, 2"),
    "size negative": ({"dim": [3, 4, -3, 2, 1, 1, 1, 1]}, "dimensions"),
    "no axes": ({"dim": [0, 4, 3, 2, 1, 1, 1, 1]}, "dimensions"),
    "nine axes": ({"dim": [9, 4, 3, 2, 1, 1, 1, 1]}, "dimensions"),
    "a picture": ({"dim": [2, 4, 6, 1, 1, 1, 1, 1]}, "a 2D image of size 4 x 6"),
    "more voxels than bytes": ({"dim": [3, 4, 3, 3, 1, 1, 1, 1]}, "400 bytes.*promises 424 bytes.*truncated"),
    "absurdly many voxels": ({"dim": [7] + [32767] * 7}, r"\d volumes|truncated"),
    "colours": ({"datatype": 128}, "type 128"),
    "complex numbers": ({"datatype": 32}, "type 32 .*magnitude and phase"),
    "a header apart": ({"magic": b"ni1"}, r"voxels are in another file.*convert the pair .*\.img"),
    "Analyze": ({"magic": b""}, "Analyze"),
}


@pytest.mark.parametrize(("changed", "found"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_header_that_cannot_be_right_is_named_with_a_remedy(
    tmp_path: Path, changed: Mapping[str, Any], found: str, suffix: str
) -> None:
    path = nifti(tmp_path / f"a{suffix}", **changed)
    with pytest.raises(InputError, match=rf"a\{suffix}: found .*{found}") as told:
        read(path)
    assert "Remedy: " in str(told.value)


def test_matrices_that_agree_within_a_tenth_of_a_millimetre_are_the_sform(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", qform_code=1, qoffset=[10.09, 20, 30])
    assert not inspect(path).differences(GRID, 1e-6)


def test_a_huge_promise_takes_no_memory(tmp_path: Path) -> None:
    for suffix in (".nii", ".nii.gz"):
        path = nifti(tmp_path / f"a{suffix}", dim=[3, 32767, 32767, 32767, 1, 1, 1, 1])
        with pytest.raises(InputError, match="truncated"):
            read(path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_what_is_no_nifti_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    _put(path, b"PK\x03\x04" * 200)
    with pytest.raises(InputError, match="no NIfTI header"):
        inspect(path)
    path.write_bytes(b"PK\x03\x04" * 200)
    with pytest.raises(InputError, match=r"no NIfTI header|unreadable image"):
        inspect(path)


@pytest.mark.parametrize("name", ["a.hdr", "a.img", "a.dcm"])
def test_other_formats_are_told_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bytes(400))
    with pytest.raises(InputError, match=r"Remedy: .*(convert|folder)"):
        inspect(tmp_path / name)


def test_every_flipped_bit_of_a_gzip_is_caught_or_harmless(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii.gz", np.random.default_rng(0).integers(0, 999, (2, 3, 4)))
    whole, right = path.read_bytes(), read(path)
    caught = 0
    for place in range(0, len(whole) * 8, 3):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(bytes(data))
        try:
            assert np.array_equal(read(path).voxels, right.voxels)  # a date or name in gzip's own header
        except InputError:
            caught += 1
    assert caught > 0.9 * len(whole) * 8 / 3
