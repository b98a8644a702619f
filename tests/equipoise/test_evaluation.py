"""Masks of many subjects: how files are paired, what a mean is worth, and what is written."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy.stats import bootstrap

from equipoise import writing
from equipoise.agreement import MEASURES, NOTHING, Agreement, agreement
from equipoise.evaluation import RESAMPLES, SEED, Evaluation, Pair, Row, average, evaluate, judge, pairs, told
from equipoise.evaluation_picture import draw
from slicestore.errors import InputError, StorageError
from slicestore.geometry import Geometry
from slicestore.volume import Volume, write

Command = Callable[..., subprocess.CompletedProcess[str]]
GRID = Geometry((12, 10, 6), (0.5, 1.0, 2.0))


def mask(*columns: tuple[int, int], grid: Geometry = GRID) -> Volume:
    """Class k + 1 is a line along x, from its first to one past its last voxel, in a row of its own."""
    voxels = np.zeros(grid.size[::-1], np.uint8)
    for k, (first, end) in enumerate(columns):
        voxels[2, 2 * k + 1, first:end] = k + 1
    return Volume(voxels, grid)


def put(folder: Path, **masks: Volume) -> Path:
    for name, volume in masks.items():
        write(volume, folder / f"{name}.nii.gz")
    return folder


def row(subject: str, structure: int = 1, **changed: float | str) -> Row:
    plain = dict.fromkeys(MEASURES, 0.5) | {"predicted_ml": 1.0, "reference_ml": 2.0}
    return Row(subject, structure, Agreement(**plain | changed))  # type: ignore[arg-type]


class TestPairs:
    def test_two_files_are_a_pair_named_like_the_reference(self, tmp_path: Path) -> None:
        put(tmp_path, out=mask((1, 5)), case_1_label=mask((1, 5)))
        files = tmp_path / "out.nii.gz", tmp_path / "case_1_label.nii.gz"
        assert pairs(*files) == [Pair("case_1", *files)]

    def test_files_of_two_folders_are_paired_without_their_suffixes_and_endings(self, tmp_path: Path) -> None:
        own = put(tmp_path / "p", a=mask((1, 5)), b_mask=mask((1, 5)), c_seg=mask((1, 5)))
        other = put(tmp_path / "r", a_label=mask((1, 5)), b=mask((1, 5)))
        write(mask((1, 5)), other / "c_mask.nrrd")
        (other / "notes.txt").write_text("")
        (other / ".b.nii.gz").write_text("")
        found = {pair.subject: (pair.predicted.name, pair.reference.name) for pair in pairs(own, other)}
        assert found == {
            "a": ("a.nii.gz", "a_label.nii.gz"),
            "b": ("b_mask.nii.gz", "b.nii.gz"),
            "c": ("c_seg.nii.gz", "c_mask.nrrd"),
        }

    def test_an_image_beside_its_mask_is_left_aside(self, tmp_path: Path) -> None:
        own, other = put(tmp_path / "p", a=mask((1, 5))), put(tmp_path / "r", a=mask((1, 5)), a_mask=mask((1, 5)))
        assert [pair.reference.name for pair in pairs(own, other)] == ["a_mask.nii.gz"]

    def test_with_an_ending_only_files_that_have_it_count_in_a_folder_that_has_any(self, tmp_path: Path) -> None:
        own = put(tmp_path / "p", a=mask((1, 5)))
        other = put(tmp_path / "r", a=mask((1, 5)), a_brain_mask=mask((1, 5)), a_vessel=mask((1, 5)))
        assert [pair.reference.name for pair in pairs(own, other, "vessel")] == ["a_vessel.nii.gz"]
        with pytest.raises(InputError, match="'a_brain', 'a_vessel' without a prediction in p"):
            pairs(own, other)

    def test_an_ending_that_no_file_has_is_a_mistake(self, tmp_path: Path) -> None:
        own, other = put(tmp_path / "p", a=mask((1, 5))), put(tmp_path / "r", a_mask=mask((1, 5)))
        for places in ((own, other), (own / "a.nii.gz", other / "a_mask.nii.gz")):
            with pytest.raises(InputError, match="found 'vesel'; some file's name ends in _vesel"):
                pairs(*places, "vesel")

    def test_subjects_without_a_counterpart_are_named_up_to_five(self, tmp_path: Path) -> None:
        own = put(tmp_path / "p", a=mask((1, 5)))
        other = put(tmp_path / "r", a=mask((1, 5)), **{f"s{k}": mask((1, 5)) for k in range(7)})
        with pytest.raises(InputError, match="'s0', 's1', 's2', 's3', 's4' and 2 more without a prediction in p"):
            pairs(own, other)
        with pytest.raises(InputError, match="'s4' and 2 more without a reference in p"):
            pairs(other, own)

    def test_two_masks_of_one_subject_are_a_mistake(self, tmp_path: Path) -> None:
        own, other = put(tmp_path / "p", a_mask=mask((1, 5)), a_seg=mask((1, 5))), put(tmp_path / "r", a=mask((1, 5)))
        with pytest.raises(InputError, match=r"a_seg\.nii\.gz: found also a_mask\.nii\.gz"):
            pairs(own, other)

    def test_what_is_not_there_or_not_alike_is_refused(self, tmp_path: Path) -> None:
        folder = put(tmp_path / "p", a=mask((1, 5)))
        (tmp_path / "empty").mkdir()
        for places, found in (
            ((folder, tmp_path / "nowhere"), "nowhere: found nothing"),
            ((folder / "a.nii.gz", folder), "found a file, and .* is a folder"),
            ((folder, tmp_path / "empty"), "empty: found no mask"),
        ):
            with pytest.raises(InputError, match=found):
                pairs(*places)


class TestAverage:
    def test_it_leaves_out_what_is_undefined_and_counts_the_rest(self) -> None:
        assert average(np.array([1.0, np.nan, 2.0])).mean == 1.5
        assert average(np.array([1.0, np.nan, 2.0])).defined == 2
        mean, interval, defined = average(np.array([np.nan]))
        assert math.isnan(mean)
        assert (interval, defined) == (None, 0)

    def test_one_subject_has_no_interval_and_equal_ones_have_no_width(self) -> None:
        assert average(np.array([0.7])) == (0.7, None, 1)
        assert average(np.array([0.1, 0.1, 0.1])) == (0.1, (0.1, 0.1), 3)

    def test_two_subjects_by_hand(self) -> None:
        # Draws of two are both the first (1/4), one of each (1/2) or both the second (1/4).
        assert average(np.array([0.0, 1.0])) == (0.5, (0.0, 1.0), 2)

    def test_it_is_that_of_drawn_means_and_the_same_each_time(self) -> None:
        values = np.random.default_rng(1).gamma(2, 1, 40)
        means = np.random.default_rng(2).choice(values, (20_000, 40)).mean(axis=1)
        assert average(values).interval == pytest.approx(tuple(np.percentile(means, (2.5, 97.5))), abs=0.02)
        again = bootstrap(
            (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(SEED)
        )
        assert average(values).interval == pytest.approx(tuple(again.confidence_interval))

    def test_it_holds_the_true_mean_about_as_often_as_it_says(self) -> None:
        rng = np.random.default_rng(3)
        held = 0
        for _ in range(150):
            interval = average(rng.normal(0.8, 0.1, 30)).interval
            assert interval is not None
            held += interval[0] <= 0.8 <= interval[1]
        assert 0.87 <= held / 150 <= 0.99


class TestEvaluate:
    def test_every_class_of_any_mask_is_judged_in_every_subject(self, tmp_path: Path) -> None:
        own = put(tmp_path / "p", a=mask((1, 9)), b=mask((1, 9), (2, 6)))
        other = put(tmp_path / "r", a=mask((1, 9)), b=mask((1, 9), (4, 6)))
        seen: list[tuple[int, int, str]] = []
        found = evaluate(pairs(own, other), progress=lambda *what: seen.append(what))
        assert (found.subjects, found.structures) == (("a", "b"), (1, 2))
        assert found.rows[1] == Row("a", 2, NOTHING)
        assert found.values(2, "dice").tolist() == pytest.approx([1, 2 * 2 / (4 + 2)])
        assert found.empties(2) == {"prediction": 0, "reference": 0, "both": 1}
        assert seen == [(0, 2, "a"), (1, 2, "b"), (2, 2, "done")]

    def test_only_the_classes_asked_for(self, tmp_path: Path) -> None:
        own, other = put(tmp_path / "p", a=mask((1, 9), (2, 6))), put(tmp_path / "r", a=mask((1, 9), (4, 6)))
        assert evaluate(pairs(own, other), [2]).structures == (2,)
        for wrong in (0, -1, 32):
            with pytest.raises(InputError, match=f"structures: found {wrong}"):
                evaluate(pairs(own, other), [wrong])

    def test_background_alone_is_no_class_but_can_be_asked_about(self, tmp_path: Path) -> None:
        own, other = put(tmp_path / "p", a=mask()), put(tmp_path / "r", a=mask())
        with pytest.raises(InputError, match="no class but background in the masks of 1 subject"):
            evaluate(pairs(own, other))
        assert evaluate(pairs(own, other), [1]).rows == (Row("a", 1, NOTHING),)

    def test_a_bad_file_is_told_by_its_name_before_any_is_judged(self, tmp_path: Path) -> None:
        coarse = Geometry((12, 10, 6), (0.5, 1.0, 2.5))
        own = put(tmp_path / "p", a=mask((1, 9)), b=mask((1, 9), grid=coarse))
        other = put(tmp_path / "r", a=mask((1, 9)), b=mask((1, 9)))
        with pytest.raises(InputError, match=r"b\.nii\.gz: found spacing .* Remedy: resample"):
            evaluate(pairs(own, other), progress=lambda *_: pytest.fail("a subject was judged"))
        put(own, b=Volume(mask((1, 9)).voxels * np.uint8(255), GRID))
        with pytest.raises(InputError, match=r"p.b\.nii\.gz: found values from 0 to 255"):
            evaluate(pairs(own, other))

    def test_whoever_has_volumes_judges_them_one_at_a_time(self) -> None:
        p, r = mask((1, 9), (2, 6)), mask((3, 9), (2, 6))
        rows = [*judge("s-1", p, r, (1, 2), "s-1"), *judge("s-2", r, p, (1, 2), "s-2")]
        found = Evaluation(tuple(rows))
        assert found.subjects == ("s-1", "s-2")
        assert found.rows[0] == Row("s-1", 1, agreement(p, r, 1, "s-1"))
        assert found.values(1, "sensitivity").tolist() == found.values(1, "precision").tolist()[::-1]


class TestFiles:
    FOUND = Evaluation(
        (
            row("a", dice=0.9, volume_error=0.25),
            row("b", dice=0.7, volume_error=math.nan, empty="reference"),
            row("a", 2),
            Row("b", 2, NOTHING),
        )
    )

    def test_subjects_are_a_table_that_reads_back_exactly(self, tmp_path: Path) -> None:
        self.FOUND.write(tmp_path / "new" / "folder")
        with (tmp_path / "new" / "folder" / "subjects.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [(r["subject"], r["structure"], r["empty"]) for r in rows] == [
            ("a", "1", ""),
            ("b", "1", "reference"),
            ("a", "2", ""),
            ("b", "2", "both"),
        ]
        assert [r["volume_error"] for r in rows[:2]] == ["0.25", "NaN"]
        for read, made in zip(rows, self.FOUND.rows, strict=True):
            for name in MEASURES:
                assert float(read[name]) == pytest.approx(getattr(made.agreement, name), rel=0, abs=0, nan_ok=True)

    def test_the_summary_is_strict_json_with_its_rules(self, tmp_path: Path) -> None:
        Evaluation((row("a", volume_error=math.nan), row("b", dice=0.7, volume_error=math.nan))).write(tmp_path)
        summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
        assert summary["subjects"] == 2
        assert (summary["interval"]["level"], summary["interval"]["resamples"]) == (0.95, 10_000)
        assert "Both masks empty" in summary["rules"]["empty_masks"]
        measures = summary["structures"]["1"]["measures"]
        assert measures["dice"] == {"mean": pytest.approx(0.6), "interval": [0.5, 0.7], "defined": 2}
        assert measures["volume_error"] == {"mean": "NaN", "interval": None, "defined": 0}
        assert set(measures) == set(MEASURES)

    def test_the_picture_has_a_panel_a_measure_and_a_mark_a_subject(self, tmp_path: Path) -> None:
        panels = draw(self.FOUND).axes
        assert [panel.get_title(loc="left") for panel in panels] == list(MEASURES.values())
        drawn = [line.get_ydata() for line in panels[0].lines if len(line.get_xdata()) == 1]
        assert [value for (value,) in drawn] == pytest.approx([0.7, 0.9, 0.8, 0.5, 1.0, 0.75])
        self.FOUND.write(tmp_path)
        with Image.open(tmp_path / "agreement.png") as picture:
            assert picture.format == "PNG"
            assert picture.width > 1000

    @pytest.mark.parametrize("values", [(0.0,), (math.nan,), (0.1, 0.2, 300.0)])
    def test_any_values_can_be_drawn(self, values: tuple[float, ...], tmp_path: Path) -> None:
        unbounded = [name for name in MEASURES if name.startswith("volume") or name.endswith("mm")]
        rows = tuple(row(str(k), **dict.fromkeys(unbounded, value)) for k, value in enumerate(values))
        Evaluation(rows).write(tmp_path)

    def test_a_disk_that_refuses_leaves_what_was_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.FOUND.write(tmp_path)
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        monkeypatch.setattr(writing.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(StorageError):
            Evaluation((row("other"),)).write(tmp_path)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


class TestTold:
    def test_a_table_a_class_with_mean_interval_and_how_many(self) -> None:
        console = Console(width=120, file=io.StringIO())
        told(console, TestFiles.FOUND)
        assert isinstance(console.file, io.StringIO)
        text = console.file.getvalue()
        assert "class 1, 2 subjects" in text
        assert "Dice                      0.800   0.700 to 0.900   2" in text
        assert "volume error (relative)   0.250                    1" in text
        assert "empty masks: reference alone 1" in text
        assert "empty masks: both 1" in text

    def test_the_command_compares_writes_and_tells(self, tmp_path: Path, command: Command) -> None:
        own = put(tmp_path / "p", a=mask((1, 9)), b=mask((1, 5)))
        other = put(tmp_path / "r", a_vessel=mask((1, 9)), b_vessel=mask((1, 9)))
        done = command("evaluate", own, other, "-o", tmp_path / "out", "--mask", "vessel")
        assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
            "agreement.png",
            "subjects.csv",
            "summary.json",
        ]
        assert done.returncode == 0
        assert "0.833" in done.stdout  # (1 + 2 * 4 / 12) / 2
        assert "out: subjects.csv, summary.json, agreement.png" in done.stdout

    def test_nothing_is_written_where_an_input_is_wrong(self, tmp_path: Path, command: Command) -> None:
        own, other = put(tmp_path / "p", a=mask((1, 9))), put(tmp_path / "r", b=mask((1, 9)))
        done = command("evaluate", own, other, "-o", tmp_path / "out")
        assert done.returncode == 2
        assert "'a' without a reference" in done.stderr
        assert not (tmp_path / "out").exists()
        done = command("evaluate", own, own, "-o", own / "a.nii.gz")
        assert done.returncode == 2
        assert "found a file" in done.stderr
