"""BIDS data sets: which images and labels belong together, and what is asked where that is not clear."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slicestore import bids
from slicestore.errors import InputError
from slicestore.geometry import Geometry
from slicestore.ingest import ingest
from slicestore.inputs import Input, inputs_from_bids
from slicestore.settings import Preprocessing
from slicestore.volume import Volume, write


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(root: Path, **how: object) -> list[tuple[str, str, str, str | None, str | None]]:
    """Inputs with paths as the data set has them, without the folder of the image."""
    told = []
    for item in inputs_from_bids(root, **how):  # type: ignore[arg-type]
        label, brain = (path and path.relative_to(root).as_posix() for path in (item.label, item.brain))
        told.append((item.domain, item.subject, item.image.name, label, brain))
    return told


def test_angiography_is_the_source_swi_the_target_and_the_rest_is_left_aside(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "dataset_description.json",
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_angio.nii.gz",
        "sub-01/anat/sub-01_angio.json",
        "sub-02/angio/sub-02_TOF.nii",
        "sub-03/ses-a/anat/sub-03_ses-a_acq-TOFhires_T1w.nii.gz",
        "sub-04/swi/sub-04_swi.nii.gz",
        "sub-04/swi/sub-04_minIP.nii.gz",
        "sub-05/swi/sub-05_part-mag_swi.nii.gz",
        "sub-05/swi/sub-05_part-phase_swi.nii.gz",
        "sub-06/anat/sub-06_acq-tof_swi.nii.gz",  # the suffix says more than the acquisition
        "sub-07/dwi/sub-07_acq-tof_dwi.nii.gz",
        "derivatives/p/sub-08/anat/sub-08_angio.nii.gz",
    )
    assert found(tmp_path) == [
        ("source", "sub-01", "sub-01_angio.nii.gz", None, None),
        ("source", "sub-02", "sub-02_TOF.nii", None, None),
        ("source", "sub-03", "sub-03_ses-a_acq-TOFhires_T1w.nii.gz", None, None),
        ("target", "sub-04", "sub-04_swi.nii.gz", None, None),
        ("target", "sub-05", "sub-05_part-mag_swi.nii.gz", None, None),
        ("target", "sub-06", "sub-06_acq-tof_swi.nii.gz", None, None),
    ]


def test_labels_are_those_whose_entities_do_not_contradict_the_image(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "sub-01/ses-1/anat/sub-01_ses-1_acq-tof_run-1_angio.nii.gz",
        "derivatives/manual/sub-01/ses-1/anat/sub-01_ses-1_run-1_desc-vessel_mask.nii.gz",  # leaves out acq: fits
        "derivatives/manual/sub-01/ses-1/anat/sub-01_ses-1_run-2_desc-vessel_mask.nii.gz",
        "derivatives/manual/sub-01/ses-1/anat/sub-01_ses-1_run-1_echo-1_desc-vessel_mask.nii.gz",
        "derivatives/manual/sub-01/ses-2/anat/sub-01_ses-2_run-1_desc-vessel_mask.nii.gz",
        "derivatives/manual/sub-01/anat/sub-01_run-1_desc-vessel_mask.nii.gz",  # of no session
        "derivatives/manual/sub-01/ses-1/anat/sub-01_ses-1_run-1_space-MNI152_desc-vessel_mask.nii.gz",
        "derivatives/manual/sub-01/ses-1/swi/sub-01_ses-1_run-1_desc-vessel_mask.nii.gz",
        "derivatives/manual/sub-01/ses-1/anat/sub-01_ses-1_run-1_mod-swi_desc-vessel_mask.nii.gz",
        "derivatives/manual/sub-02/ses-1/anat/sub-02_ses-1_run-1_desc-vessel_mask.nii.gz",
        "derivatives/manual/sub-01/ses-1/anat/sub-01_ses-1_run-1_desc-vessel_probseg.nii.gz",
    )
    label = "derivatives/manual/sub-01/ses-1/anat/sub-01_ses-1_run-1_desc-vessel_mask.nii.gz"
    assert [item[3] for item in found(tmp_path)] == [label]


def test_a_label_that_fits_both_domains_is_the_sources(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "sub-01/anat/sub-01_angio.nii.gz",
        "sub-01/anat/sub-01_swi.nii.gz",
        "sub-02/anat/sub-02_angio.nii.gz",
        "sub-02/anat/sub-02_swi.nii.gz",
        "derivatives/sub-01/sub-01_mask.nii.gz",
        "derivatives/sub-02/sub-02_mod-angio_dseg.nii.gz",
        "derivatives/sub-02/sub-02_mod-swi_dseg.nii.gz",
    )
    assert [item[:2] + item[3:4] for item in found(tmp_path)] == [
        ("source", "sub-01", "derivatives/sub-01/sub-01_mask.nii.gz"),
        ("source", "sub-02", "derivatives/sub-02/sub-02_mod-angio_dseg.nii.gz"),
        ("target", "sub-01", None),
        ("target", "sub-02", "derivatives/sub-02/sub-02_mod-swi_dseg.nii.gz"),
    ]


def test_one_of_several_labels_is_named_by_desc_label_suffix_or_pipeline(tmp_path: Path) -> None:
    files = {
        "manual": "derivatives/manual/sub-01/anat/sub-01_desc-Vessel_dseg.nii.gz",
        "artery": "derivatives/net/sub-01/anat/sub-01_label-artery_mask.nii.gz",
        "brain": "derivatives/net/sub-01/anat/sub-01_desc-brain_mask.nii.gz",
    }
    touch(tmp_path, "sub-01/anat/sub-01_angio.nii.gz", *files.values())
    with pytest.raises(
        InputError, match=r"angio\.nii\.gz: found 2 labels.*artery.*\(`mask`\)|2 labels.*Vessel.*artery"
    ):
        found(tmp_path)
    for mask, kind in (("vessel", "manual"), ("dseg", "manual"), ("manual", "manual"), ("artery", "artery")):
        assert found(tmp_path, mask=mask)[0][3:] == (files[kind], files["brain"])
    assert found(tmp_path, mask="brain")[0][3:] == (files["brain"], files["brain"])
    assert found(tmp_path, mask="artery", brain="dseg")[0][3:] == (files["artery"], files["manual"])
    with pytest.raises(InputError, match="2 labels"):
        found(tmp_path, mask="net")
    assert found(tmp_path, mask="veins")[0][3] is None


def test_sessions_runs_and_echoes_are_chosen_by_filters_and_stay_one_subject(tmp_path: Path) -> None:
    for session in ("ses-01", "ses-02"):
        name = f"sub-01/{session}/anat/sub-01_{session}"
        touch(tmp_path, f"{name}_acq-tof_angio.nii.gz", f"{name}_echo-1_swi.nii.gz", f"{name}_echo-2_swi.nii.gz")
    with pytest.raises(
        InputError, match=r"2 source images of sub-01 \(sub-01/ses-01/.*filters such as \{'ses': '01'\}"
    ):
        found(tmp_path)
    with pytest.raises(InputError, match=r"2 target images of sub-01 .*\{'echo': '1'\}, with 'target\.' before"):
        found(tmp_path, filters={"ses": "02"})
    assert [item[1:3] for item in found(tmp_path, filters={"ses": "ses-02", "target.echo": "2"})] == [
        ("sub-01", "sub-01_ses-02_acq-tof_angio.nii.gz"),
        ("sub-01", "sub-01_ses-02_echo-2_swi.nii.gz"),
    ]
    with pytest.raises(InputError, match=r"no image among 6 that fits .*'ses': '09'"):
        found(tmp_path, filters={"ses": "09"})


def test_phase_is_there_when_asked_for(tmp_path: Path) -> None:
    parts = [f"sub-01/swi/sub-01_part-{part}_swi.nii.gz" for part in ("mag", "phase")]
    touch(tmp_path, "sub-01/anat/sub-01_angio.nii.gz", *parts)
    assert found(tmp_path)[1][2] == "sub-01_part-mag_swi.nii.gz"
    assert found(tmp_path, filters={"target.part": "phase"})[1][2] == "sub-01_part-phase_swi.nii.gz"


def test_other_domains_are_patterns(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz")
    how = {"source": bids.Pattern(suffixes=("t1w",)), "target": bids.Pattern(suffixes=("t2w",))}
    assert [item[:3] for item in found(tmp_path, **how)] == [
        ("source", "sub-01", "sub-01_T1w.nii.gz"),
        ("target", "sub-01", "sub-01_T2w.nii.gz"),
    ]
    with pytest.raises(InputError, match="no image among 2"):
        found(tmp_path)


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no image in sub-"):
        found(touch(tmp_path, "sub-01_angio.nii.gz"))
    with pytest.raises(InputError, match="gone: found no such folder"):
        found(tmp_path / "gone")


def test_a_bids_data_set_becomes_a_store(tmp_path: Path) -> None:
    grid = Geometry((20, 24, 5), (0.5, 0.5, 2.0))
    image = np.random.default_rng(0).normal(100, 10, (5, 24, 20)).astype(np.float32)
    mask = np.zeros(image.shape, np.uint8)
    mask[1:4, 6:14, 4:12] = 1
    for name, voxels in (
        ("sub-x/anat/sub-x_angio.nii.gz", image),
        ("sub-x/swi/sub-x_swi.nii.gz", image[::-1]),
        ("derivatives/m/sub-x/anat/sub-x_desc-vessel_mask.nii.gz", mask),
    ):
        write(Volume(voxels, grid), tmp_path / "data" / name)
    inputs = inputs_from_bids(tmp_path / "data", mask="vessel")
    assert inputs[0] == Input(
        "source",
        "sub-x",
        tmp_path / "data/sub-x/anat/sub-x_angio.nii.gz",
        tmp_path / "data/derivatives/m/sub-x/anat/sub-x_desc-vessel_mask.nii.gz",
    )
    store = ingest(inputs, tmp_path / "c.zarr", Preprocessing(size=16, spacing_mm=1.0))
    assert [(entry.domain, entry.labelled) for entry in store.entries] == [("source", True), ("target", False)]
