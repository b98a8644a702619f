"""Folders of DICOM files: the right volume, or an error that says which slice is wrong; and nothing of the patient."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import MRImageStorage, RLELossless, generate_uid

from slicestore.errors import InputError
from slicestore.geometry import Geometry
from slicestore.ingest import ingest
from slicestore.inputs import Input, check, inputs_from_folder
from slicestore.settings import Preprocessing
from slicestore.volume import Volume, digest, inspect, read, write

TURN = np.reshape(sitk.Euler3DTransform((0, 0, 0), 0.3, -0.2, 0.5).GetMatrix(), (3, 3))
ORIGIN = np.array([-31.0, 12.0, -77.0])
VOXELS = np.random.default_rng(0).integers(0, 4000, (6, 20, 24)).astype(np.uint16)
SPACING = (0.5, 0.75, 2.0)
PATIENT = {
    "PatientName": "Nightingale^Florence",
    "PatientID": "ID-90210-77",
    "PatientBirthDate": "18200512",
    "StudyDate": "19871123",
    "SeriesDate": "19871124",
    "AcquisitionDateTime": "19871124101112.5",
    "InstitutionName": "Scutari Barracks",
    "ReferringPhysicianName": "Seacole^Mary",
    "AccessionNumber": "ACC0815",
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.4711",
}
"""What must never leave the scanner's files."""
SERIES_UID = "1.2.826.0.1.3680043.8.498.1789"


def put_slice(path: Path, pixels: np.ndarray, position: np.ndarray, **changed: Any) -> None:
    """Write one slice as an MR scanner does; an element given as None is left out."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = MRImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    elements: dict[str, Any] = {
        **PATIENT,
        "SeriesInstanceUID": SERIES_UID,
        "SeriesNumber": 5,
        "SeriesDescription": "tof_fl3d",
        "Modality": "MR",
        "ImageType": ["ORIGINAL", "PRIMARY", "M"],
        "EchoTime": "3.5",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "PixelSpacing": [SPACING[1], SPACING[0]],
        "SliceThickness": "2.4",
        "ImagePositionPatient": [f"{value:.8g}" for value in position],
        "ImageOrientationPatient": [f"{value:.8g}" for value in TURN[:, :2].T.ravel()],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 0,
        "PixelData": pixels.astype("<u2").tobytes(),
    }
    for name, value in (elements | changed).items():
        if value is not None:
            setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)


def put_series(folder: Path, voxels: np.ndarray = VOXELS, *, prefix: str = "im", **changed: Any) -> Path:
    """Write a series whose names run against its positions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(voxels):
        place = ORIGIN + TURN[:, 2] * SPACING[2] * number
        put_slice(folder / f"{prefix}{len(voxels) - number}", pixels, place, **changed)
    return folder


def edit(path: Path, **changed: Any) -> None:
    data = pydicom.dcmread(path)
    for name, value in changed.items():
        setattr(data, name, value)
    data.save_as(path)


GRID = Geometry((24, 20, 6), SPACING, tuple(ORIGIN.tolist()), tuple(TURN.ravel().tolist()))


# --- healthy series ---------------------------------------------------------------------------------------------------


def test_a_series_is_ordered_by_position_and_lies_where_gdcm_puts_it(tmp_path: Path) -> None:
    folder = put_series(tmp_path / "a")
    volume = read(folder)
    assert np.array_equal(volume.voxels, VOXELS)
    assert not volume.geometry.differences(GRID)
    assert inspect(folder) == volume.geometry
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    theirs = Volume.from_image(reader.Execute())
    assert np.array_equal(volume.voxels, theirs.voxels)
    assert not volume.geometry.differences(theirs.geometry, 1e-4)


def test_what_is_no_slice_is_left_aside(tmp_path: Path) -> None:
    folder = put_series(tmp_path / "a")
    (folder / "readme.txt").write_text("exported")
    (folder / "empty").touch()
    (folder / "sub").mkdir()
    report = folder / "im1"
    data = pydicom.dcmread(report)
    for name in ("Rows", "Columns", "PixelData", "ImagePositionPatient"):
        delattr(data, name)
    data.save_as(folder / "DICOMDIR")
    put_slice(folder / "screenshot", VOXELS[0], ORIGIN, ImagePositionPatient=None)
    put_slice(folder / "film", VOXELS[0], ORIGIN, ImagePositionPatient=None, NumberOfFrames=6)
    assert np.array_equal(read(folder).voxels, VOXELS)


def test_each_slice_is_rescaled_by_its_own_slope(tmp_path: Path) -> None:
    folder = put_series(tmp_path / "a", RescaleSlope="1", RescaleIntercept="-100")
    edit(folder / "im4", RescaleSlope="0.5", RescaleIntercept="7")  # the third slice from below
    expected = VOXELS.astype(np.float32) - 100
    expected[2] = VOXELS[2] * 0.5 + 7
    assert read(folder).voxels.dtype == np.float32
    assert np.array_equal(read(folder).voxels, expected)


def test_compressed_pixels_are_decoded(tmp_path: Path) -> None:
    folder = put_series(tmp_path / "a")
    for file in folder.iterdir():
        data = pydicom.dcmread(file)
        data.compress(RLELossless, generate_instance_uid=False)
        data.save_as(file)
    assert np.array_equal(read(folder).voxels, VOXELS)


def test_a_single_slice_is_as_thick_as_its_header_says(tmp_path: Path) -> None:
    assert inspect(put_series(tmp_path / "a", VOXELS[:1])).spacing_mm == (0.5, 0.75, 2.4)
    assert inspect(put_series(tmp_path / "b", VOXELS[:1], SpacingBetweenSlices="3")).spacing_mm == (0.5, 0.75, 3.0)
    with pytest.raises(InputError, match="a single slice without a thickness"):
        inspect(put_series(tmp_path / "c", VOXELS[:1], SliceThickness=None))


def test_a_digest_follows_the_slices_and_neither_their_names_nor_their_neighbours(tmp_path: Path) -> None:
    folder = put_series(tmp_path / "a")
    first = digest(folder)
    for file in list(folder.iterdir()):
        file.rename(folder / f"z{file.name}")
    assert digest(folder) == first
    put_series(folder, prefix="other", SeriesNumber=9)
    assert digest(folder, 0) == first != digest(folder, 1)
    edit(folder / "zim3", RescaleSlope="2")
    assert digest(folder, 0) != first


# --- several stacks in a folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ({"EchoTime": "7.5"}, {"EchoTime": "22.14"}, ("echo 7.5 ms", "echo 22.14 ms")),
        (
            {"ImageType": ["ORIGINAL", "PRIMARY", "M"]},
            {"ImageType": ["ORIGINAL", "PRIMARY", "P"]},
            (r"ORIGINAL\PRIMARY\M", r"ORIGINAL\PRIMARY\P"),
        ),
        ({"ComplexImageComponent": "MAGNITUDE"}, {"ComplexImageComponent": "PHASE"}, ("magnitude", "phase")),
        ({"TemporalPositionIdentifier": 1}, {"TemporalPositionIdentifier": 2}, ("time point 1", "time point 2")),
        (
            {"SeriesNumber": 3, "SeriesDescription": "t2_swi", "SeriesInstanceUID": "1.2.3"},
            {"SeriesNumber": 12, "SeriesDescription": "tof", "SeriesInstanceUID": "1.2.4"},
            ("series 3 't2_swi'", "series 12 'tof'"),
        ),
    ],
    ids=["echoes", "magnitude and phase by type", "by component", "time points", "series"],
)
def test_stacks_of_one_folder_are_told_apart_and_chosen_by_number(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], told: tuple[str, str]
) -> None:
    put_series(tmp_path / "a", prefix="x", **second)
    put_series(tmp_path / "a", VOXELS[::-1], prefix="y", **first)
    for act in (inspect, read, digest):
        with pytest.raises(InputError) as error:
            act(tmp_path / "a")
        text = str(error.value)
        assert "found 2 volumes (0: series" in text
        assert f"{told[0]}" in text.split("; 1: ")[0]
        assert f"{told[1]}" in text.split("; 1: ")[1]
        assert "6 slices of 24 x 20" in text
        assert "0 to 1: `--component`" in text
        assert not any(secret in text for secret in [*PATIENT.values(), SERIES_UID, "1.2.3", "1.2.4"])
    assert np.array_equal(read(tmp_path / "a", 0).voxels, VOXELS[::-1])
    assert np.array_equal(read(tmp_path / "a", 1).voxels, VOXELS)
    with pytest.raises(InputError, match="component 2 of 2 volumes"):
        read(tmp_path / "a", 2)


def test_the_planes_of_a_localiser_are_choices_of_their_own(tmp_path: Path) -> None:
    folder = put_series(tmp_path / "a")
    for number, axes in enumerate(([1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1])):
        put_slice(folder / f"loc{number}", VOXELS[0], ORIGIN, SeriesNumber=1, ImageOrientationPatient=axes)
    with pytest.raises(InputError, match=r"found 4 volumes \(0: .*1 slice of.*3: series 5"):
        inspect(folder)
    assert np.array_equal(read(folder, 3).voxels, VOXELS)


# --- broken series ----------------------------------------------------------------------------------------------------


def place(number: float) -> float:
    """Where slice `number` lies along the normal."""
    return float(ORIGIN @ TURN[:, 2]) + SPACING[2] * number


def moved(number: float, along: int = 2, by_mm: float = 0.0) -> list[str]:
    return [f"{v:.8g}" for v in ORIGIN + TURN[:, 2] * SPACING[2] * number + TURN[:, along] * by_mm]


def doubled(folder: Path) -> None:
    (folder / "copy").write_bytes((folder / "im3").read_bytes())


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing slice": (
        lambda f: (f / "im3").unlink(),
        rf"4\.00 mm between the slices at {place(2):.2f} and {place(4):.2f} mm, where 2\.00 mm is usual \(1 missing\)"
        ".*export the series again",
    ),
    "slice twice": (doubled, rf"two slices at {place(3):.2f} mm \(.*1 such pairs.*remove the copies"),
    "uneven gap": (
        lambda f: edit(f / "im1", ImagePositionPatient=moved(5.3)),
        rf"2\.60 mm between the slices at {place(4):.2f} and {place(5.3):.2f} mm.*resample",
    ),
    "gantry tilt": (
        lambda f: [edit(f / f"im{6 - n}", ImagePositionPatient=moved(n, 1, 0.3 * n)) for n in range(6)],
        rf"a slice at {place(1):.2f} mm that lies 0\.30 mm beside the first \(1\.50 mm at most\).*tilted gantry",
    ),
    "other pixel spacing": (
        lambda f: edit(f / "im2", PixelSpacing=[0.75, 0.51]),
        rf"im2: found a slice at {place(4):.2f} mm with pixels of \(0\.51, 0\.75\) mm",
    ),
    "other orientation": (
        lambda f: edit(
            f / "im2", ImageOrientationPatient=[f"{v:.8g}" for v in (TURN @ _small_turn())[:, :2].T.ravel()]
        ),
        rf"im2: found a slice at {place(4):.2f} mm .*to a folder of their own",
    ),
    "other size": (
        lambda f: edit(f / "im2", Rows=10, Columns=48),
        r"found 2 volumes \(0: .* 1 slice of 48 x 10; 1: .* 5 slices of 24 x 20",
    ),
    "spacing 0": (
        lambda f: [edit(f / f"im{n}", PixelSpacing=[0, 0.5]) for n in range(1, 7)],
        r"spacing \(0\.5, 0\.0, 2\.0.*\) mm; .*positive",
    ),
    "singular orientation": (
        lambda f: [edit(f / f"im{n}", ImageOrientationPatient=[1, 0, 0, 1, 0, 0]) for n in range(1, 7)],
        "rows and columns along one line",
    ),
    "no spacing": (lambda f: edit(f / "im2", PixelSpacing=None), "im2: found no readable pixel spacing"),
    "colour": (
        lambda f: [edit(f / f"im{n}", SamplesPerPixel=3, PixelData=bytes(3 * 480)) for n in range(1, 7)],
        "3 values a pixel",
    ),
    "enhanced": (
        lambda f: edit(f / "im2", NumberOfFrames=6, SharedFunctionalGroupsSequence=[], ImagePositionPatient=None),
        r"im2: found 6 frames.*dcm2niix",
    ),
    "truncated": (
        lambda f: (f / "im2").write_bytes((f / "im2").read_bytes()[:-31]),
        r"im2: found a DICOM file that cannot be read.*copy it again",
    ),
}


def _small_turn() -> np.ndarray:
    return np.reshape(sitk.Euler3DTransform((0, 0, 0), 0.0, 0.0, 0.02).GetMatrix(), (3, 3))


@pytest.mark.parametrize(("damage", "found"), BROKEN.values(), ids=BROKEN)
def test_a_broken_series_is_named_with_the_slice_and_a_remedy(
    tmp_path: Path, damage: Callable[[Path], object], found: str
) -> None:
    folder = put_series(tmp_path / "series")
    damage(folder)
    with pytest.raises(InputError, match=rf"series.*{found}") as told:
        read(folder)
    assert "Remedy: " in str(told.value)
    assert "Nightingale" not in str(told.value)


def test_repetitions_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    put_series(put_series(tmp_path / "a"), prefix="again")
    with pytest.raises(InputError, match=r"6 such pairs.*folders of their own"):
        inspect(tmp_path / "a")


def test_rounding_of_positions_is_no_damage(tmp_path: Path) -> None:
    folder = put_series(tmp_path / "a")
    for number in range(6):
        rough = [f"{float(value):.2f}" for value in moved(number)]
        edit(folder / f"im{6 - number}", ImagePositionPatient=rough)
    assert not inspect(folder).differences(GRID, 0.02)


def test_a_folder_without_slices_is_refused_and_its_subfolders_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: found no DICOM slice"):
        inspect(tmp_path / "empty")
    put_series(tmp_path / "study" / "tof")
    with pytest.raises(InputError, match=r"study: found no DICOM slice.*subfolders \(tof\)"):
        inspect(tmp_path / "study")


# --- as inputs --------------------------------------------------------------------------------------------------------


def put_mask(path: Path, grid: Geometry) -> Path:
    mask = np.zeros(grid.size[::-1], dtype=np.uint8)
    mask[1:5, 4:14, 6:18] = 1
    write(Volume(mask, grid), path)
    return path


def test_checking_reads_the_grids_of_series_labels_and_brain_masks(tmp_path: Path) -> None:
    tof, swi = put_series(tmp_path / "tof"), put_series(tmp_path / "swi")
    label = put_mask(tmp_path / "label.nii.gz", read(tof).geometry)
    off = put_mask(tmp_path / "off.nii.gz", Geometry(GRID.size, GRID.spacing_mm, (0.0, 0.0, 0.0), GRID.direction))
    check([Input("source", "a", tof, label, label), Input("target", "a", swi)])
    with pytest.raises(InputError, match=r"off\.nii\.gz: found origin .*a brain mask lies on the voxel grid"):
        check([Input("source", "a", tof, label, off), Input("target", "a", swi)])
    with pytest.raises(InputError, match=r"off\.nii\.gz: found origin .*a label lies on the voxel grid.*0\.01 mm"):
        check([Input("source", "a", tof, off), Input("target", "a", swi)])
    with pytest.raises(InputError, match="component 1 of 1 volume"):
        check([Input("source", "a", tof, label), Input("target", "a", swi, component=1)])


def test_a_folder_of_dicom_folders_is_a_folder_of_subjects(tmp_path: Path) -> None:
    for name in ("p1", "p2"):
        put_series(tmp_path / "f" / name)
    (tmp_path / "f" / "notes").mkdir()
    (tmp_path / "f" / "p1_label.nii.gz").touch()
    assert inputs_from_folder(tmp_path / "f", "source") == [
        Input("source", "p1", tmp_path / "f" / "p1", tmp_path / "f" / "p1_label.nii.gz"),
        Input("source", "p2", tmp_path / "f" / "p2"),
    ]
    assert inputs_from_folder(tmp_path / "f" / "p1", "target", component=0) == [
        Input("target", "p1", tmp_path / "f" / "p1", component=0)
    ]


# --- nothing of the patient gets into a store -------------------------------------------------------------------------


def test_nothing_that_names_the_patient_is_found_in_the_bytes_of_a_store(tmp_path: Path) -> None:
    tof = put_series(tmp_path / "ward7-bed3" / "tof", prefix="x")
    put_series(tof, prefix="y", EchoTime="20", SeriesDescription="second_echo")
    swi = put_series(tmp_path / "ward7-bed3" / "swi", VOXELS[::-1], SeriesDescription="swi_tra")
    label = put_mask(tmp_path / "ward7-bed3" / "vessels.nii.gz", inspect(tof, 0))
    inputs = [
        Input("source", "florence-n", tof, label, component=0),
        Input("target", "florence-n", swi),
    ]
    store = tmp_path / "store" / "cohort.zarr"
    ingest(inputs, store, Preprocessing(size=16, spacing_mm=1.0))
    uids = [str(pydicom.dcmread(file).SOPInstanceUID) for file in [*tof.iterdir(), *swi.iterdir()]]
    secrets = [*PATIENT.values(), *PATIENT["PatientName"].split("^"), SERIES_UID, *uids]
    secrets += ["florence-n", "ward7-bed3", "tof_fl3d", "swi_tra", "vessels.nii", str(tmp_path)]
    seen = 0
    for file in store.rglob("*"):
        assert not _holds(str(file.relative_to(store)).encode(), secrets)
        if file.is_file():
            seen += 1
            assert not _holds(file.read_bytes(), secrets), file
    assert seen >= 7  # root, manifest, two commits, two groups, shards
    key = json.loads((tmp_path / "store" / "cohort.zarr.key.json").read_text())
    assert {facts["subject"] for facts in key.values()} == {"florence-n"}
    assert _holds(json.dumps(key).encode(), ["ward7-bed3"])
    assert not _holds(json.dumps(key).encode(), [*PATIENT.values(), SERIES_UID, *uids])


def _holds(data: bytes, secrets: list[str]) -> bool:
    """Whether any secret is there in letters of 8 or 16 bits, whatever their case."""
    data = data.lower()
    return any(s.lower().encode(code) in data for s in secrets for code in ("utf-8", "utf-16-le", "utf-16-be"))
