"""The list of faults that storage must survive, each through the door that users take.

Every one ends in an error that names the file, the rule and the remedy and leaves nothing half written, or in the right
voxels. A full disk is in `test_ingest`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from slicestore.errors import InputError
from slicestore.ingest import ingest
from slicestore.inputs import Input
from slicestore.preprocess import restore
from slicestore.settings import Preprocessing
from slicestore.store import Store
from slicestore.verify import verify
from slicestore.volume import Volume, read, write

RAW = Preprocessing(size=16, spacing_mm=0.5, centre="grid")
"""The cohort's own spacing, so that a stored voxel is a raw one, standardised."""


@dataclass(frozen=True)
class Case:
    """A healthy source (with label) and target, and the store that they are to become."""

    source: Input
    target: Input
    store: Path
    make_cohort: Callable[..., list[Input]]
    as_nobody: Callable[[], AbstractContextManager[Path]]

    @property
    def label(self) -> Path:
        assert self.source.label is not None
        return self.source.label


Fault = Callable[[Case], None]


def refused(inputs: Sequence[Input], store: Path, file: Path, *words: str, config: Preprocessing = RAW) -> None:
    """An ingest is refused: the file, these words, a rule and a remedy are told, and nothing half written stays."""
    with pytest.raises(InputError) as told:
        ingest(inputs, store, config)
    explained(told.value, str(file), *words)
    if store.exists():  # what was told while making slices, when whole volumes may lie there already
        report = verify(store)
        assert (report.intact, report.finished, report.leftovers) == (True, False, ())


def explained(error: InputError, *words: str) -> None:
    assert error.rule
    assert error.remedy
    for word in words:
        assert word in str(error)


# --- broken inputs ----------------------------------------------------------------------------------------------------


def in_bytes(suffix: str, change: Callable[[bytes], bytes], *words: str) -> Fault:
    """The target's file is changed after it was written."""

    def fault(case: Case) -> None:
        path = case.target.image.with_name(f"broken{suffix}")
        write(read(case.target.image), path)
        whole = path.read_bytes()
        path.write_bytes(change(whole))
        assert path.read_bytes() != whole
        refused([case.source, replace(case.target, image=path)], case.store, path, *words)

    return fault


def flipped(data: bytes) -> bytes:
    return with_bytes(data, len(data) // 2, bytes([data[len(data) // 2] ^ 4]))


def with_bytes(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def in_header(offset: int, *values: float) -> Callable[[bytes], bytes]:
    """Other floats at an offset of nifti1.h."""
    return lambda data: with_bytes(data, offset, struct.pack(f"<{len(values)}f", *values))


def in_voxels(role: str, change: Callable[[np.ndarray], np.ndarray], *words: str, **grid: Any) -> Fault:
    """The target's image, or the source's label, has other voxels or another grid."""

    def fault(case: Case) -> None:
        path = case.label if role == "label" else case.target.image
        good = read(path)
        write(Volume(change(good.voxels), replace(good.geometry, **grid)), path)
        named = case.source.image.with_suffix("").with_suffix("") if role == "label" else path
        refused([case.source, case.target], case.store, named, *words)

    return fault


def holed(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda voxels: np.where(np.arange(2400).reshape(5, 24, 20) == 1234, np.float32(value), voxels)


def put_series(folder: Path, voxels: np.ndarray, prefix: str, **changed: Any) -> None:
    """Write slices 2 mm apart, as an MR scanner does, all of one series."""
    folder.mkdir(exist_ok=True)
    for number, pixels in enumerate(voxels.astype("<u2")):
        data, uid = Dataset(), generate_uid()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        elements = {"Rows": 24, "Columns": 20, "PixelSpacing": [0.5, 0.5], "SliceThickness": 2, "SeriesNumber": 5}
        elements |= {"ImagePositionPatient": [0, 0, 2 * number], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        elements |= {"SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "PixelRepresentation": 0}
        elements |= {"BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelData": pixels.tobytes()}
        elements |= {"SOPClassUID": MRImageStorage, "SOPInstanceUID": uid, "SeriesInstanceUID": "1.2.3"}
        for name, value in (elements | changed).items():
            setattr(data, name, value)
        data.save_as(folder / f"{prefix}{number}", enforce_file_format=True)


def two_in_one_series(first: dict[str, Any], second: dict[str, Any], *words: str) -> Fault:
    """Two volumes under one series UID: they are told apart, and either can be had by its number."""

    def fault(case: Case) -> None:
        folder, voxels = case.target.image.with_name("series"), read(case.target.image).voxels
        put_series(folder, voxels, "b", **second)
        put_series(folder, voxels[::-1], "a", **first)
        target = replace(case.target, image=folder)
        refused([case.source, target], case.store, folder, "2 volumes", "0 to 1: `--component`", *words)
        right(ingest([case.source, replace(target, component=1)], case.store, RAW), voxels[:, 4:20, 2:18])

    return fault


def a_missing_slice(case: Case) -> None:
    folder = case.target.image.with_name("series")
    put_series(folder, read(case.target.image).voxels, "im")
    (folder / "im2").unlink()
    words = "4.00 mm between the slices at 2.00 and 6.00 mm, where 2.00 mm is usual (1 missing)", "export the series"
    refused([case.source, replace(case.target, image=folder)], case.store, folder, *words)


def right(store: Store, expected: np.ndarray, window: tuple[slice, slice] = (slice(None), slice(None))) -> None:
    """The target's slices show these raw voxels in a window, and nothing but background round it."""
    (entry,) = store.select("target")
    image, record = store.read(entry, "image").astype(np.float64), store.record(entry)
    raw = image[:, *window] * record["std"] + record["mean"]
    assert raw.shape == expected.shape
    assert np.abs(raw - expected).max() < 0.5  # float16: 11 bits of some hundreds
    image[:, *window] = record["background"]
    assert np.all(image == record["background"])
    assert store.verify().intact


def one_slice(case: Case) -> None:
    good = read(case.target.image)
    write(Volume(good.voxels[2:3], replace(good.geometry, size=(20, 24, 1))), case.target.image)
    right(ingest([case.source, case.target], case.store, RAW), good.voxels[2:3, 4:20, 2:18])


def smaller_than_the_crop(case: Case) -> None:
    store = ingest([case.source, case.target], case.store, replace(RAW, size=32))
    right(store, read(case.target.image).voxels, (slice(4, 28), slice(6, 26)))
    label_is_kept(store, case.label)


def larger_than_the_crop(case: Case) -> None:
    store = ingest([case.source, case.target], case.store, RAW)
    right(store, read(case.target.image).voxels[:, 4:20, 2:18])
    label_is_kept(store, case.label)


def label_is_kept(store: Store, path: Path) -> None:
    (entry,) = store.select("source")
    assert np.array_equal(restore(store.read(entry, "label"), store.record(entry)).voxels, read(path).voxels)


def foreground_outside_the_crop(case: Case) -> None:
    # Of the label's 8 x 8 pixels, the middle 8 x 8 of the slice hold 6 rows and 6 columns.
    words = f"label of {case.source.image}", "43.75% of the foreground", "0.1%", "enlarge `size`"
    refused([case.source, case.target], case.store, case.source.image, *words, config=replace(RAW, size=8))


def duplicate_subject(case: Case) -> None:
    again = replace(case.target, image=case.source.image)
    words = f"a second target volume of subject '{again.subject}'", "name them apart"
    refused([case.source, case.target, again], case.store, again.image, *words)


def one_image_for_two_subjects(case: Case) -> None:
    twin = replace(case.target, subject="twin")
    refused([case.source, case.target, twin], case.store, twin.image, "the same bytes as", "leave one of them out")


def no_permission(case: Case) -> None:
    with case.as_nobody() as folder:
        inputs = case.make_cohort(folder / "raw", sources=1, targets=1)
        inputs[1].image.chmod(0)
        refused(inputs, folder / "c.zarr", inputs[1].image, "no permission to read it", "chmod u+rX")


# --- broken stores ----------------------------------------------------------------------------------------------------


def flipped_byte_in_a_shard(case: Case) -> None:
    store, shard = stored(case)
    data = shard.read_bytes()
    at = 40 + int(np.frombuffer(data[-16 * 5 - 4 : -4], dtype="<u8")[2 * 3])  # of the index's pairs, offset and length
    shard.write_bytes(with_bytes(data, at, bytes([data[at] ^ 1])))
    told = "slice 3 (position 3 from the feet) does not match its checksum"
    with pytest.raises(InputError) as error:
        store.read(store.select("target")[0], "image")
    explained(error.value, str(store.path), "image of target subject t000", told)
    mended(case, f"target subject t000: image: {told}")


def deleted_shard(case: Case) -> None:
    store, shard = stored(case)
    shard.unlink()
    name = shard.relative_to(case.store).as_posix()
    with pytest.raises(InputError) as error:
        store.read(store.select("target")[0], "image")
    explained(error.value, str(store.path), "image of target subject t000", name)
    with pytest.raises(InputError) as error:
        Store.open(case.store)
    explained(error.value, str(store.path), "subject t000", f"{name} of subject t000 missing")
    mended(case, f"target subject t000: {name} is missing")


def stored(case: Case) -> tuple[Store, Path]:
    """A finished store, and the shard of its target's image."""
    store = ingest([case.source, case.target], case.store, RAW)
    (shard,) = case.store.glob("target/t000-*/image/c/0/0/0")
    return store, shard


def mended(case: Case, told: str) -> None:
    """Verifying finds damage in one subject alone, and the remedy, ingesting again, mends it."""
    problems = verify(case.store).problems
    assert told in problems
    assert all(problem.startswith("target subject t000: ") for problem in problems)
    right(ingest([case.source, case.target], case.store, RAW), read(case.target.image).voxels[:, 4:20, 2:18])


# --- the list ---------------------------------------------------------------------------------------------------------

PIXDIM, QOFFSET, SROW = 76, 268, 280
AGAIN, POSITIVE, CLASSES = "copy it again from its source", "positive spacings", "class indices 0, 1, ... below 32"

FAULTS: dict[str, Fault] = {
    "truncated .nii.gz": in_bytes(".nii.gz", lambda data: data[:-100], "the compressed data end too early", AGAIN),
    "bit-flipped .nii.gz": in_bytes(".nii.gz", flipped, "unreadable image", AGAIN),
    "truncated .nii": in_bytes(".nii", lambda data: data[:-100], "5052 bytes", "promises 5152 bytes", AGAIN),
    "flipped byte in a shard": flipped_byte_in_a_shard,
    "deleted shard": deleted_shard,
    "two echoes under one series": two_in_one_series(
        {"EchoTime": 7.5}, {"EchoTime": 22.5}, "0: series 5 echo 7.5 ms 5 slices", "1: series 5 echo 22.5 ms 5 slices"
    ),
    "magnitude and phase under one series": two_in_one_series(
        {"ImageType": ["ORIGINAL", "PRIMARY", "M"]}, {"ImageType": ["ORIGINAL", "PRIMARY", "P"]}, r"RY\M", r"RY\P"
    ),
    "missing DICOM slice": a_missing_slice,
    "NaN": in_voxels("image", holed(np.nan), "1 NaN or infinite voxels of 2400", "replace them"),
    "Inf": in_voxels("image", holed(-np.inf), "1 NaN or infinite voxels of 2400", "replace them"),
    "constant volume": in_voxels("image", np.ones_like, "the one value 1 in every voxel", "check that"),
    "spacing 0": in_bytes(".nii", in_header(PIXDIM, 1, 0, 0.5, 2), "spacing (0.0, 0.5, 2.0) mm", POSITIVE),
    "negative spacing": in_bytes(".nii", in_header(PIXDIM, 1, 0.5, -0.5, 2), "spacing (0.5, -0.5, 2.0) mm", POSITIVE),
    "sform and qform that disagree": in_bytes(
        ".nii", in_header(QOFFSET, 0, -2, 3), "an sform and a qform that disagree", "1 mm apart", "to 0.1 mm"
    ),
    "singular direction": in_bytes(".nii", in_header(SROW, -0.5, -0.5, 0, -1, 0, 0), "a singular direction"),
    "image and label of different sizes": in_voxels("label", lambda v: v[:4], "against (20, 24, 4)", size=(20, 24, 4)),
    "image and label apart": in_voxels("label", np.copy, "0.02 mm apart", "0.01 mm", origin_mm=(1.02, 2.0, 3.0)),
    "label of 0 and 255": in_voxels("label", lambda v: v * 255, "values from 0 to 255", CLASSES, "becomes 0/1"),
    "label of fractions": in_voxels("label", lambda v: v / np.float32(2), "0 to 0.5, not all of them whole", CLASSES),
    "negative label": in_voxels("label", lambda v: -v.astype(np.int16), "values from -1 to 0", CLASSES),
    "label without foreground": in_voxels("label", np.zeros_like, "nothing but background", "these are the masks"),
    "one-slice volume": one_slice,
    "volume smaller than the crop": smaller_than_the_crop,
    "volume larger than the crop": larger_than_the_crop,
    "foreground outside the crop": foreground_outside_the_crop,
    "duplicate subject": duplicate_subject,
    "one image for two subjects": one_image_for_two_subjects,
    "unreadable permission": no_permission,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_it_is_told_or_survived(
    tmp_path: Path,
    make_cohort: Callable[..., list[Input]],
    as_nobody: Callable[[], AbstractContextManager[Path]],
    fault: Fault,
) -> None:
    source, target = make_cohort(tmp_path / "raw", sources=1, targets=1)
    fault(Case(source, target, tmp_path / "c.zarr", make_cohort, as_nobody))
