"""Reading and writing images: what is read is what was written, and what is damaged is refused."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from slicestore.errors import InputError
from slicestore.geometry import Geometry
from slicestore.volume import SUFFIXES, Volume, digest, inspect, read, write

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


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.nii: found no such file"):
        read(tmp_path / "gone.nii")


def test_a_folder_without_dicom_files_and_an_empty_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "folder.nii" / "notes.txt").write_text("no slice")
    with pytest.raises(InputError, match=r"folder\.nii: found no DICOM slice"):
        inspect(tmp_path / "folder.nii")
    for suffix in SUFFIXES:
        (tmp_path / f"empty{suffix}").touch()
        with pytest.raises(InputError, match=rf"empty\{suffix}: found an? (empty file|unreadable image)"):
            read(tmp_path / f"empty{suffix}")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user may enter; pytest closes its own, and again whenever another run of it starts."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_may_not_be_read_says_so(open_folder: Path, suffix: str) -> None:
    path = open_folder / f"a{suffix}"
    put(example(), path)
    path.chmod(0)
    told = unprivileged(f"from slicestore.volume import read; read({str(path)!r})")
    assert f"a{suffix}: found no permission to read it" in told
    assert "chmod u+rX" in told


def test_a_folder_that_may_not_be_entered_says_so(open_folder: Path) -> None:
    series = open_folder / "series"
    series.mkdir()
    put(example(), series / "a.nii")
    series.chmod(0)
    for code in (f"inspect({str(series)!r})", f"read({str(series / 'a.nii')!r})"):
        assert "found no permission to read it" in unprivileged(f"from slicestore.volume import inspect, read; {code}")
    code = f"from slicestore.inputs import inputs_from_folder; inputs_from_folder({str(open_folder)!r}, 'source')"
    assert "series: found a folder that cannot be read" in unprivileged(code)


def unprivileged(code: str) -> str:
    """What a user without root's rights is told on the terminal by code that fails."""
    # Everything is imported before the rights go, because the environment may lie where only root may look.
    drop = (
        "import os, sys, slicestore.inputs\nif os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    )
    done = subprocess.run([sys.executable, "-c", drop + code], capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr


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


# --- several volumes in a file ----------------------------------------------------------------------------------------


def series(suffix: str, folder: Path) -> tuple[Path, np.ndarray]:
    """A file of three volumes, along a fourth axis."""
    array = np.random.default_rng(1).integers(0, 1000, (3, 4, 5, 6)).astype(np.int16)
    path = folder / f"series{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=False), str(path))
    return path, array


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_component_picks_one_volume_of_a_4d_file(tmp_path: Path, suffix: str) -> None:
    path, array = series(suffix, tmp_path)
    for component in range(3):
        volume = read(path, component)
        assert np.array_equal(volume.voxels, array[component])
        assert inspect(path, component) == volume.geometry


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_4d_file_without_a_component_says_what_there_is_to_choose(tmp_path: Path, suffix: str) -> None:
    path, _ = series(suffix, tmp_path)
    for act in (inspect, read, digest):
        with pytest.raises(InputError, match=rf"series\{suffix}: found 3 volumes.*0 to 2: `--component`"):
            act(path)
        with pytest.raises(InputError, match=r"component 3 of 3 volumes .*from 0 to 2"):
            act(path, 3)
        with pytest.raises(InputError, match=r"component -1 of 3 volumes"):
            act(path, -1)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_component_picks_one_value_of_a_vector_image(tmp_path: Path, suffix: str) -> None:
    array = np.random.default_rng(1).integers(0, 1000, (4, 5, 6, 2)).astype(np.int16)
    path = tmp_path / f"vectors{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), str(path))
    with pytest.raises(InputError, match="2 volumes"):
        inspect(path)
    assert np.array_equal(read(path, 1).voxels, array[..., 1])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_component_of_a_3d_file_cannot_take_effect_unless_it_is_0(tmp_path: Path, suffix: str) -> None:
    put(example(), tmp_path / f"a{suffix}")
    assert np.array_equal(read(tmp_path / f"a{suffix}", 0).voxels, example().voxels)
    with pytest.raises(InputError, match=r"component 1 of 1 volume .*leave `component` out"):
        read(tmp_path / f"a{suffix}", 1)


def test_the_real_echoes_are_read_one_by_one(real: Path) -> None:
    for name in ("romeo_mag_3echo.nii", "romeo_phase_3echo.nii", "clearswi_mag_3echo.nii"):
        whole = sitk.ReadImage(str(real / name))
        with pytest.raises(InputError, match=f"{name}: found 3 volumes"):
            read(real / name)
        for echo in range(3):
            expected = Volume.from_image(whole[:, :, :, echo])
            assert np.allclose(read(real / name, echo).voxels, expected.voxels, rtol=1e-6)
            assert not inspect(real / name, echo).differences(expected.geometry)


# --- grids ------------------------------------------------------------------------------------------------------------


def metaimage(folder: Path, **changed: str) -> Path:
    """A MetaImage of 4 x 3 x 2 voxels written by hand, with lines of its header changed."""
    lines = {
        "NDims": "3",
        "BinaryData": "True",
        "DimSize": "4 3 2",
        "ElementSpacing": "1 1 1",
        "Offset": "0 0 0",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "ElementType": "MET_SHORT",
    }
    head = "".join(f"{key} = {value}\n" for key, value in (lines | changed).items())
    path = folder / "a.mha"
    path.write_bytes(
        f"ObjectType = Image\n{head}ElementDataFile = LOCAL\n".encode() + np.arange(24, dtype="<i2").tobytes()
    )
    return path


def nrrd(folder: Path, directions: str) -> Path:
    """An NRRD of 4 x 3 x 2 voxels written by hand, with these axes."""
    path = folder / "a.nrrd"
    path.write_bytes(
        b"NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 4 3 2\n"
        + f"space directions: {directions}\nkinds: domain domain domain\nendian: little\nencoding: raw\n".encode()
        + b"space origin: (0,0,0)\n\n"
        + np.arange(24, dtype="<i2").tobytes()
    )
    return path


def test_hand_written_files_are_right_before_they_are_wrong(tmp_path: Path) -> None:
    for path in (metaimage(tmp_path), nrrd(tmp_path, "(1,0,0) (0,1,0) (0,0,1)")):
        assert read(path).voxels.ravel().tolist() == list(range(24))
        assert read(path).geometry == Geometry((4, 3, 2), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"ElementSpacing": "0 1 1"}, r"spacing \(0.0, 1.0, 1.0\) mm"),
        ({"ElementSpacing": "1 -1 1"}, r"spacing \(1.0, -1.0, 1.0\) mm"),
        ({"ElementSpacing": "nan 1 1"}, "spacing"),
        ({"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, "a singular direction"),
        ({"TransformMatrix": "1 0 0 0.5 1 0 0 0 1"}, "sheared"),
        ({"TransformMatrix": "2 0 0 0 2 0 0 0 2"}, "sheared or scaled"),
        ({"DimSize": "4 3 0"}, "image of size 4 x 3 x 0"),
        ({"ElementType": "MET_FLOAT"}, "48 bytes of voxels; its header promises 96"),
    ],
)
def test_a_metaimage_with_an_impossible_header_is_named(tmp_path: Path, changed: dict[str, str], found: str) -> None:
    with pytest.raises(InputError, match=rf"a\.mha: found .*{found}.*Remedy: "):
        read(metaimage(tmp_path, **changed))


@pytest.mark.parametrize(
    ("directions", "found"),
    [
        ("(0,0,0) (0,1,0) (0,0,1)", "spacing|direction"),
        ("(1,0,0) (1,0,0) (0,0,1)", "a singular direction"),
        ("(1,0,0) (.5,1,0) (0,0,1)", "sheared"),
        ("(nan,0,0) (0,1,0) (0,0,1)", "an unreadable image"),
    ],
)
def test_an_nrrd_with_impossible_axes_is_named(tmp_path: Path, directions: str, found: str) -> None:
    with pytest.raises(InputError, match=rf"a\.nrrd: found .*({found}).*Remedy: "):
        inspect(nrrd(tmp_path, directions))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_slice_in_space_is_a_volume(tmp_path: Path, suffix: str) -> None:
    grid = Geometry((9, 7, 1), (0.5, 0.75, 2.0), (10.0, -20.0, 30.0), TURN)
    put(Volume(example().voxels[:1], grid), tmp_path / f"a{suffix}")
    back = read(tmp_path / f"a{suffix}")
    assert np.array_equal(back.voxels, example().voxels[:1])
    assert not back.geometry.differences(grid)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_picture_and_a_row_of_voxels_are_no_volumes(tmp_path: Path, suffix: str) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5), np.int16)), str(tmp_path / f"flat{suffix}"))
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((1, 1, 5), np.int16)), str(tmp_path / f"row{suffix}"))
    with pytest.raises(InputError, match=r"flat.*found a 2D image of size 5 x 4"):
        inspect(tmp_path / f"flat{suffix}")
    with pytest.raises(InputError, match=r"row.*found a 1D image of size 5 x 1 x 1"):
        inspect(tmp_path / f"row{suffix}")


# --- digests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_digest_follows_the_bytes_and_not_the_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    put(example(), path)
    first = digest(path)
    assert digest(path, 0) == first
    if suffix != ".mhd":  # which names its other file
        assert digest(path.rename(tmp_path / f"b{suffix}")) == first
        path = tmp_path / f"b{suffix}"
    changed = example()
    changed.voxels[2, 3, 4] += 1
    put(changed, path)
    assert digest(path) != first


def test_each_volume_of_a_file_has_its_own_digest(tmp_path: Path) -> None:
    path, _ = series(".nii.gz", tmp_path)
    assert len({digest(path, component) for component in range(3)}) == 3


def test_voxels_in_a_file_of_their_own_are_part_of_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "a.mhd"
    sitk.WriteImage(example().to_image(), str(path), useCompression=False)
    first, raw = digest(path), tmp_path / "a.raw"
    data = raw.read_bytes()
    raw.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert digest(path) != first
    raw.write_bytes(data[:-9])
    with pytest.raises(InputError, match=r"a\.raw: found 621 bytes of voxels; its header promises 630"):
        read(path)
    raw.unlink()
    with pytest.raises(InputError, match=r"a\.mhd: found no readable file 'a\.raw'"):
        digest(path)
    path.write_text(path.read_text().replace("a.raw", "a%03d.raw 1 5 1"))
    with pytest.raises(InputError, match="several files"):
        digest(path)


def test_a_damaged_file_prints_nothing_but_its_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.mha"
    sitk.WriteImage(example().to_image(), str(path), useCompression=False)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="truncated"):
        read(path)
    assert capfd.readouterr() == ("", "")
