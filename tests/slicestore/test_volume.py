"""Reading and writing images: what is read is what was written, and what is damaged is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from slicestore.errors import InputError
from slicestore.geometry import Geometry
from slicestore.volume import SUFFIXES, Volume, inspect, read, write

TURN = tuple(
    np.round(np.reshape(sitk.Euler3DTransform((0, 0, 0), 0.2, -0.1, 0.3).GetMatrix(), (3, 3)), 12).ravel().tolist()
)
GRID = Geometry((9, 7, 5), (0.5, 0.75, 2.0), (10.0, -20.0, 30.0), TURN)


def put(volume: Volume, path: Path) -> None:
    """Write any format that `read` accepts."""
    if path.suffix == ".mhd":
        sitk.WriteImage(volume.to_image(), str(path), useCompression=True)
    else:
        write(volume, path)


def example(dtype: str = "int16") -> Volume:
    return Volume(np.random.default_rng(0).integers(0, 1000, (5, 7, 9)).astype(dtype), GRID)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_written_volume_reads_back_with_voxels_and_geometry(tmp_path: Path, suffix: str) -> None:
    put(example(), tmp_path / f"a{suffix}")
    back = read(tmp_path / f"a{suffix}")
    assert np.array_equal(back.voxels, example().voxels)
    assert not back.geometry.differences(GRID)
    assert inspect(tmp_path / f"a{suffix}") == back.geometry


def test_a_format_of_two_files_is_read_but_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"take \.mha"):
        write(example(), tmp_path / "a.mhd")
    assert not list(tmp_path.iterdir())


def test_writing_leaves_no_temporary_file(tmp_path: Path) -> None:
    write(example(), tmp_path / "a.nii.gz")
    assert [file.name for file in tmp_path.iterdir()] == ["a.nii.gz"]


def test_an_unknown_format_is_neither_read_nor_written(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    for act in (lambda: read(tmp_path / "a.jpg"), lambda: write(example(), tmp_path / "b.jpg")):
        with pytest.raises(InputError, match=r"found suffix '\.jpg'.*\.nii\.gz"):
            act()
    assert not (tmp_path / "b.jpg").exists()


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.nii: found no such file"):
        read(tmp_path / "gone.nii")
    (tmp_path / "folder.nii").mkdir()
    with pytest.raises(InputError, match=r"folder\.nii: found a folder"):
        inspect(tmp_path / "folder.nii")


def test_a_2d_a_4d_and_a_vector_image_are_refused_from_the_header(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5), np.int16)), str(tmp_path / "flat.nii"))
    sitk.WriteImage(
        sitk.GetImageFromArray(np.zeros((3, 4, 5, 6), np.int16), isVector=False), str(tmp_path / "echoes.nii")
    )
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.int16), isVector=True), str(tmp_path / "rgb.nii"))
    for name, found in (("flat", "2D image"), ("echoes", "4D image"), ("rgb", "3 values a voxel")):
        with pytest.raises(InputError, match=found):
            inspect(tmp_path / f"{name}.nii")


def test_a_fourth_axis_of_one_is_dropped(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(example().voxels[None], isVector=False), str(tmp_path / "a.nii"))
    assert inspect(tmp_path / "a.nii").size == (9, 7, 5)
    assert np.array_equal(read(tmp_path / "a.nii").voxels, example().voxels)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_nan_voxels_are_counted(tmp_path: Path, suffix: str, dtype: str) -> None:
    volume = example(dtype)
    volume.voxels[0, 0, :3] = np.nan
    volume.voxels[-1, -1, -1] = np.inf
    write(volume, tmp_path / f"a{suffix}")  # ITK alone reads those of a NIfTI as 0
    with pytest.raises(InputError, match="4 NaN or infinite voxels of 315"):
        read(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    put(example(), path)
    data = tmp_path / "a.zraw" if suffix == ".mhd" else path
    data.write_bytes(data.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"unreadable|truncated"):
        read(path)


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".mhd", ".nrrd"])
def test_a_flipped_bit_in_compressed_voxels_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    put(example(), path)
    data = tmp_path / "a.zraw" if suffix == ".mhd" else path
    whole = data.read_bytes()
    for back in (300, 200, 100, 30):  # the voxels come last in every format; ITK alone misses most of these
        data.write_bytes(whole[:-back] + bytes([whole[-back] ^ 4]) + whole[-back + 1 :])
        with pytest.raises(InputError, match="unreadable"):
            read(path)


def test_voxels_that_do_not_fill_their_grid_are_a_bug() -> None:
    with pytest.raises(ValueError, match=r"voxels \(5, 7, 8\)"):
        Volume(np.zeros((5, 7, 8)), GRID)


def test_a_real_mask_lies_on_the_grid_of_its_real_image(real: Path) -> None:
    image, mask = read(real / "topcow_tof.mha"), read(real / "topcow_tof_vessels.nii.gz")
    assert not image.geometry.differences(mask.geometry)
    assert image.geometry == inspect(real / "topcow_tof.mha")
    assert mask.voxels.sum() == 16290


def test_a_real_multi_echo_file_is_refused(real: Path) -> None:
    with pytest.raises(InputError, match=r"4D image.*one echo"):
        read(real / "romeo_mag_3echo.nii")
