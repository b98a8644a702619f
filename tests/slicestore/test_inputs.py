"""Tables and folders of raw volumes: components, brain masks, and what a column or a name means."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from slicestore.errors import InputError
from slicestore.inputs import Input, check, inputs_from_folder, inputs_from_table
from slicestore.volume import Volume, read, write


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def table(folder: Path, *rows: str) -> Path:
    (folder / "t.csv").write_text("\n".join(rows))
    return folder / "t.csv"


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_may_name_components_and_brain_masks(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "subject,domain,image,component,label,brain_mask",
        "a,source,a.nii,2,v.nii,b.nii",
        "b,target,series,,,",
    )
    assert inputs_from_table(path) == [
        Input("source", "a", tmp_path / "a.nii", tmp_path / "v.nii", tmp_path / "b.nii", 2),
        Input("target", "b", tmp_path / "series"),
    ]


def test_the_column_of_brain_masks_can_be_named(tmp_path: Path) -> None:
    path = table(tmp_path, "subject,domain,image,vessel,brain", "a,source,a.nii,v.nii,b.nii")
    label, brain = tmp_path / "v.nii", tmp_path / "b.nii"
    assert inputs_from_table(path, "vessel")[0] == Input("source", "a", tmp_path / "a.nii", label)
    assert inputs_from_table(path, "vessel", "brain")[0] == Input("source", "a", tmp_path / "a.nii", label, brain)
    assert inputs_from_table(path, "brain", "brain")[0] == Input("source", "a", tmp_path / "a.nii", brain, brain)
    with pytest.raises(InputError, match="skull missing"):
        inputs_from_table(path, "vessel", "skull")


@pytest.mark.parametrize("cell", ["-1", "one", "1.0"])
def test_a_component_that_is_no_number_is_refused_with_the_line(tmp_path: Path, cell: str) -> None:
    path = table(tmp_path, "subject,domain,image,label,component", f"a,source,a.nii,,{cell}")
    with pytest.raises(InputError, match=f"line 2: found component '{cell}'; a component is a number from 0"):
        inputs_from_table(path)


def test_a_row_with_too_many_cells_is_read_as_far_as_there_are_columns(tmp_path: Path) -> None:
    path = table(tmp_path, "subject,domain,image,label,", "a,source,a.nii,,x,y,z")
    assert inputs_from_table(path) == [Input("source", "a", tmp_path / "a.nii")]


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_brain_mask_in_a_folder_is_neither_an_image_nor_a_label(tmp_path: Path) -> None:
    folder = touch(tmp_path / "f", "a.nii", "a_mask.nii", "a_brain_mask.nii", "b.nii", "b_brain_mask.nii")
    assert inputs_from_folder(folder, "source", component=0) == [
        Input("source", "a", folder / "a.nii", folder / "a_mask.nii", folder / "a_brain_mask.nii", 0),
        Input("source", "b", folder / "b.nii", None, folder / "b_brain_mask.nii", 0),
    ]


def test_the_ending_of_brain_masks_can_be_named_and_may_be_the_labels(tmp_path: Path) -> None:
    folder = touch(tmp_path / "f", "a.nii", "a_vessel.nii", "a_bet.nii")
    image, vessel, bet = folder / "a.nii", folder / "a_vessel.nii", folder / "a_bet.nii"
    assert inputs_from_folder(folder, "source", mask="vessel", brain="bet") == [
        Input("source", "a", image, vessel, bet)
    ]
    (folder / "a_vessel.nii").unlink()
    assert inputs_from_folder(folder, "source", mask="bet", brain="bet") == [Input("source", "a", image, bet, bet)]


def test_a_brain_mask_without_its_image_is_named(tmp_path: Path) -> None:
    folder = touch(tmp_path / "f", "a.nii", "b_brain_mask.nii")
    with pytest.raises(InputError, match=r"b_brain_mask\.nii: found no image 'b'"):
        inputs_from_folder(folder, "source")


# --- real volumes -----------------------------------------------------------------------------------------------------


def test_an_echo_of_a_real_series_is_checked_against_its_mask(tmp_path: Path, real: Path) -> None:
    shutil.copy(real / "romeo_mag_3echo.nii", tmp_path / "swi.nii")
    echo = read(tmp_path / "swi.nii", 2)
    write(Volume((echo.voxels > 0).astype("uint8"), echo.geometry), tmp_path / "mask.nii.gz")
    tof = Input("source", "a", real / "topcow_tof.mha", real / "topcow_tof_vessels.nii.gz")
    swi = Input("target", "b", tmp_path / "swi.nii", brain=tmp_path / "mask.nii.gz", component=2)
    check([tof, swi])
    with pytest.raises(InputError, match=r"swi\.nii: found 3 volumes"):
        check([tof, Input("target", "b", tmp_path / "swi.nii")])
    with pytest.raises(InputError, match=r"vessels\.nii\.gz: found size .*a brain mask lies"):
        check([tof, Input("target", "b", tmp_path / "swi.nii", brain=tof.label, component=2)])
