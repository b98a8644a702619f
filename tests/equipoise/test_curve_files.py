"""Every dialect in which other programs write curves, by hand-written files; damage is told, nothing is made up."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tensorboardX import SummaryWriter
from tensorboardX.proto import event_pb2

from equipoise.curve_files import Curves, read
from slicestore.errors import InputError
from slicestore.tfrecord import records, write

Plain = dict[str, list[tuple[int, float]]]


def plain(run: Curves) -> Plain:
    """Curves as lists of (step, value)."""
    return {
        tag: list(zip(steps.tolist(), values.tolist(), strict=True)) for tag, (steps, values) in run.signals.items()
    }


def only(path: Path) -> Plain:
    (run,) = read(path)
    return plain(run)


def text(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


class TestTables:
    def test_long_with_low_and_high_gives_their_mean_by_run(self, tmp_path: Path) -> None:
        file = text(
            tmp_path / "curves.csv",
            "run,signal,step,low,high",
            "vessel,g_B,0,0.25,0.75",
            "brain,g_B,10,1,3",
            "vessel,g_B,100,1.5,1.5",
        )
        vessel, brain = read(file)
        assert (vessel.run, plain(vessel)) == ("vessel", {"g_B": [(0, 0.5), (100, 1.5)]})
        assert (brain.run, plain(brain)) == ("brain", {"g_B": [(10, 2.0)]})

    @pytest.mark.parametrize("heading", ["step,tag,value", "Step,Name,Value", "iteration,signal,value"])
    def test_long_with_one_value_is_named_after_its_file(self, tmp_path: Path, heading: str) -> None:
        (run,) = read(text(tmp_path / "mine.csv", heading, "1,a,0.5", "1,b,2", "2,a,0.25"))
        assert run.run == "mine"
        assert plain(run) == {"a": [(1, 0.5), (2, 0.25)], "b": [(1, 2.0)]}

    def test_wide_has_a_column_a_signal_and_holes(self, tmp_path: Path) -> None:
        heading, *rows = "epoch,step,cycle_A,mode,D_A", "0,50,0.5,train,", "0,100,,train,0.25", "1,150,0.3,val,0"
        file = text(tmp_path / "metrics.csv", heading, *rows)
        assert only(file) == {
            "epoch": [(50, 0.0), (100, 0.0), (150, 1.0)],
            "cycle_A": [(50, 0.5), (150, 0.3)],
            "D_A": [(100, 0.25), (150, 0.0)],
        }, "the column of words is no signal"

    @pytest.mark.parametrize("delimiter", [",", ";", "\t"])
    @pytest.mark.parametrize("step", ["step", "_step", "iter", "global_step", "trainer/global_step", "Iterations"])
    def test_wide_by_any_delimiter_and_name_of_the_steps(self, tmp_path: Path, delimiter: str, step: str) -> None:
        file = text(tmp_path / "a.csv", f"{step}{delimiter}loss", f"1{delimiter}0.5", f"2.0{delimiter}1e-1")
        assert only(file) == {"loss": [(1, 0.5), (2, 0.1)]}

    def test_a_wide_table_may_have_runs(self, tmp_path: Path) -> None:
        first, second = read(text(tmp_path / "a.csv", "run,step,loss", "x,1,0.5", "y,1,0.25"))
        assert (first.run, plain(first), second.run, plain(second)) == (
            "x", {"loss": [(1, 0.5)]}, "y", {"loss": [(1, 0.25)]},
        )  # fmt: skip

    def test_a_chart_of_wandb_has_a_column_a_run_with_its_extremes(self, tmp_path: Path) -> None:
        file = text(
            tmp_path / "chart.csv",
            '"Step","calm - night - loss/cycle_t","calm - night - loss/cycle_t__MIN",'
            '"calm - night - loss/cycle_t__MAX","b - G_A"',
            '"50","0.5","0.4","0.6","1"',
            '"100","NaN","NaN","Infinity",""',
        )
        first, second = read(file)
        assert first.run == "calm - night"
        assert list(first.signals) == ["loss/cycle_t"]
        np.testing.assert_array_equal(first.signals["loss/cycle_t"][1], [0.5, math.nan])
        assert (second.run, plain(second)) == ("b", {"G_A": [(50, 1.0)]})

    def test_charts_of_tensorboard_are_told_apart_by_their_files_names(self, tmp_path: Path) -> None:
        heading = "Wall time,Step,Value"
        text(tmp_path / "run-first-tag-cycle_A.csv", heading, "1.6e9,10,0.5", "1.6e9,20,0.25")
        text(tmp_path / "run-first-tag-D_A.csv", heading, "1.6e9,10,0.1")
        text(tmp_path / "run-second-tag-cycle_A.csv", heading, "1.6e9,10,7")
        first, second = read(tmp_path)
        assert plain(first) == {"D_A": [(10, 0.1)], "cycle_A": [(10, 0.5), (20, 0.25)]}
        assert plain(second) == {"cycle_A": [(10, 7.0)]}

    def test_a_chart_under_any_other_name_is_the_signal_of_its_folder(self, tmp_path: Path) -> None:
        (run,) = read(text(tmp_path / "mine" / "cycle_A.csv", "Wall time,Step,Value", "1.6e9,10,0.5"))
        assert (run.run, plain(run)) == ("mine", {"cycle_A": [(10, 0.5)]})

    def test_nan_and_infinity_are_kept(self, tmp_path: Path) -> None:
        words = ["nan", "NaN", "-nan", "inf", "-inf", "Infinity", "-Infinity"]
        file = text(tmp_path / "a.csv", "step,loss", *(f"{k},{word}" for k, word in enumerate(words)))
        (run,) = read(file)
        expected = [math.nan] * 3 + [math.inf, -math.inf] * 2
        np.testing.assert_array_equal(run.signals["loss"][1], expected)

    def test_a_wide_column_that_was_never_finite_is_a_signal_and_one_of_words_with_a_nan_is_none(
        self, tmp_path: Path
    ) -> None:
        (run,) = read(text(tmp_path / "a.csv", "step,loss,mode", "1,nan,nan", "2,inf,train"))
        assert list(run.signals) == ["loss"]

    def test_rows_are_put_in_order_and_the_last_of_a_step_counts(self, tmp_path: Path) -> None:
        assert only(text(tmp_path / "a.csv", "step,loss", "20,2", "10,1", "20,3")) == {"loss": [(10, 1.0), (20, 3.0)]}

    def test_the_same_signal_twice_in_a_folder_is_refused(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            text(tmp_path / f"{name}.csv", "run,step,loss", "x,1,0.5")
        with pytest.raises(InputError, match="found loss of x in two files"):
            read(tmp_path)

    def test_a_last_line_that_is_still_being_written_is_left_out_and_told(self, tmp_path: Path) -> None:
        file = tmp_path / "a.csv"
        file.write_text("step,cycle_A,D_A\n10,1,2\n20,1")
        (run,) = read(file)
        assert plain(run) == {"cycle_A": [(10, 1.0)], "D_A": [(10, 2.0)]}
        assert run.notes == ("the last line, 3, is not whole",)

    @pytest.mark.parametrize(
        ("lines", "parts"),
        [
            (("step,loss", "1,0.5", "2,high"), ("line 3, loss", "found 'high'", "a value is a number")),
            (("step;loss", "1;1", "2;0,5"), ("line 3, loss", "found '0,5'", "with a point for decimals")),
            (("step;loss", "1;0,5"), ("no column of numbers", "with a point for decimals")),
            (("step,loss", "1.5,1"), ("line 2", "found step 1.5", "whole numbers")),
            (("step,loss", "-1,1"), ("line 2", "found step -1")),
            (("step,loss", "nan,1"), ("line 2", "found step nan")),
            (("step,loss", "1,2,3"), ("line 2", "found 3 cells", "the heading has 2")),
            (("epoch,loss", "1,2"), ("the columns epoch, loss", "called step", "name the column of steps")),
            (("step,mode", "1,train"), ("no column of numbers",)),
            (("step,loss,loss", "1,2,3"), ("found two columns loss", "rename one")),
            (("step,tag,value", "1,loss,"), ("line 2, value", "found ''")),
            (("step,loss",), ("found 1 rows",)),
            (("",), ("found 0 rows",)),
        ],
    )
    def test_a_table_that_cannot_be_read_is_refused_by_its_line(
        self, tmp_path: Path, lines: tuple[str, ...], parts: tuple[str, ...]
    ) -> None:
        with pytest.raises(InputError) as error:
            read(text(tmp_path / "a.csv", *lines))
        for part in (str(tmp_path / "a.csv"), *parts):
            assert part in str(error.value)

    @pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
    def test_text_in_another_encoding_is_refused(self, tmp_path: Path, encoding: str) -> None:
        (tmp_path / "a.csv").write_bytes("step,l\xf6ss\n1,2\n".encode(encoding))
        with pytest.raises(InputError, match="no UTF-8"):
            read(tmp_path / "a.csv")

    @pytest.mark.parametrize("name", ["", "nothing.csv"])
    def test_a_place_without_curves_is_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(InputError, match=r"found (no event file|nothing)"):
            read(tmp_path / name)


class TestLogs:
    def test_steps_are_images_counted_through_the_epochs(self, tmp_path: Path) -> None:
        """250 images in an epoch, a line every 100."""
        file = text(
            tmp_path / "maps" / "loss_log.txt",
            "================ Training Loss (Mon Mar  7 10:00:00 2022) ================",
            "(epoch: 1, iters: 100, time: 0.245, data: 0.302) D_A: 0.250 G_A: 0.300 cycle_A: 1.500 idt_A: 0.750 ",
            "(epoch: 1, iters: 200, time: 0.245, data: 0.302) D_A: 0.240 G_A: 0.310 cycle_A: 1.250 idt_A: 0.500 ",
            "(epoch: 2, iters: 50, time: 0.245, data: 0.302) D_A: 0.230 G_A: nan cycle_A: 1.000 idt_A: 0.250 ",
            "(epoch: 2, iters: 150, time: 0.245, data: 0.302) D_A: 0.220 G_A: 0.330 cycle_A: 0.750 idt_A: 0.125 ",
            "(epoch: 2, iters: 250, time: 0.245, data: 0.302) D_A: 0.210 G_A: 0.340 cycle_A: 0.500 idt_A: 0.100 ",
        )
        (run,) = read(file)
        assert run.run == "maps"
        assert plain(run)["cycle_A"] == [(100, 1.5), (200, 1.25), (300, 1.0), (400, 0.75), (500, 0.5)]
        assert math.isnan(run.signals["G_A"][1][2])
        assert list(run.signals) == ["D_A", "G_A", "cycle_A", "idt_A"]
        assert read(tmp_path)[0].run == "maps", "a folder of runs is read as well"

    def test_newer_ones_have_commas_and_older_ones_no_data(self, tmp_path: Path) -> None:
        file = text(
            tmp_path / "log.txt",
            "(epoch: 1, iters: 100, time: 0.245) D_A: 0.250 G_A: 0.300",
            "(epoch: 1, iters: 200, time: 0.245, data: 0.302) , D_A: 0.240, G_A: 0.310",
        )
        assert only(file) == {"D_A": [(100, 0.25), (200, 0.24)], "G_A": [(100, 0.3), (200, 0.31)]}

    def test_what_a_resumed_run_says_again_replaces_what_it_said(self, tmp_path: Path) -> None:
        lines = [f"(epoch: 1, iters: {at}, time: 0.2, data: 0.3) D_A: {value}" for at, value in
                 ((100, 1), (200, 2), (300, 3), (200, 4), (300, 5))]  # fmt: skip
        assert only(text(tmp_path / "loss_log.txt", *lines)) == {"D_A": [(100, 1.0), (200, 4.0), (300, 5.0)]}

    def test_a_last_line_that_is_still_being_written_is_left_out_and_told(self, tmp_path: Path) -> None:
        file = tmp_path / "loss_log.txt"
        file.write_text("(epoch: 1, iters: 100, time: 0.2) D_A: 0.25\n(epoch: 1, iters: 200, time: 0.2) D_A: 0.")
        (run,) = read(file)
        assert plain(run) == {"D_A": [(100, 0.25)]}
        assert "not whole" in run.notes[0]

    def test_a_value_that_is_no_number_is_refused_by_its_line(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="line 1, D_A: found 'low'"):
            read(text(tmp_path / "loss_log.txt", "(epoch: 1, iters: 100, time: 0.2) D_A: low"))


def events(folder: Path, points: Mapping[str, list[tuple[int, float]]]) -> Path:
    """An event file as tensorboardX writes it."""
    writer = SummaryWriter(str(folder), write_to_disk=True)
    for tag, curve in points.items():
        for step, value in curve:
            writer.add_scalar(tag, value, step)
    writer.close()
    return max(folder.glob("*tfevents*"))


POINTS: Plain = {"loss/cycle_t": [(50, 0.5), (100, math.inf)], "D_A": [(50, 0.25)]}


class TestEvents:
    def test_a_file_holds_scalars_and_what_else_there_is_passes(self, tmp_path: Path) -> None:
        writer = SummaryWriter(str(tmp_path))
        writer.add_text("words", "none of them is a number", 1)
        writer.add_histogram("weights", np.arange(10.0), 1)
        writer.add_scalar("loss/cycle_t", 0.5, 50)
        writer.add_scalar("loss/cycle_t", math.inf, 100)
        writer.add_scalar("D_A", 0.25, 50)
        writer.close()
        (file,) = tmp_path.glob("*tfevents*")
        assert only(file) == POINTS

    def test_a_folder_of_folders_holds_a_run_each(self, tmp_path: Path) -> None:
        events(tmp_path / "b" / "train", {"x": [(1, 2.0)]})
        events(tmp_path / "a", {"x": [(1, 1.0)]})
        assert [(run.run, plain(run)) for run in read(tmp_path)] == [
            ("a", {"x": [(1, 1.0)]}),
            ("b/train", {"x": [(1, 2.0)]}),
        ]

    def test_a_run_resumed_into_a_second_file_goes_on_from_its_first_step(self, tmp_path: Path) -> None:
        for number, curve in enumerate(([(10, 1.0), (20, 2.0), (35, 3.0)], [(20, 4.0), (30, 5.0)])):
            file = events(tmp_path / str(number), {"x": curve})
            (tmp_path / "run").mkdir(exist_ok=True)
            file.rename(tmp_path / "run" / f"events.out.tfevents.{number}.here")
        assert only(tmp_path / "run") == {"x": [(10, 1.0), (20, 4.0), (30, 5.0)]}

    @pytest.mark.parametrize("packed", [True, False])
    @pytest.mark.parametrize(("dtype", "field"), [(1, "float_val"), (2, "double_val")])
    def test_scalars_written_as_tensors_count(self, tmp_path: Path, packed: bool, dtype: int, field: str) -> None:
        message = event_pb2.Event(step=7)
        tensor = message.summary.value.add(tag="x").tensor
        tensor.dtype = dtype
        if packed:
            tensor.tensor_content = struct.pack("<f" if dtype == 1 else "<d", 0.75)
        else:
            getattr(tensor, field).append(0.75)
        pair = message.summary.value.add(tag="no scalar").tensor
        pair.dtype = 1
        pair.float_val.extend([1.0, 2.0])
        file = tmp_path / "events.out.tfevents.1"
        write(file, [message.SerializeToString()])
        assert only(file) == {"x": [(7, 0.75)]}

    def test_a_file_that_ends_within_a_record_is_read_as_far_as_it_is_whole(self, tmp_path: Path) -> None:
        file = events(tmp_path, {"x": [(1, 1.0), (2, 2.0), (3, 3.0)]})
        file.write_bytes(file.read_bytes()[:-3])
        (run,) = read(file)
        assert plain(run) == {"x": [(1, 1.0), (2, 2.0)]}
        (note,) = run.notes
        assert note.startswith("read as far as it is whole: ")
        assert "record 4" in note

    def test_a_flipped_bit_is_noticed_and_what_lies_before_it_counts(self, tmp_path: Path) -> None:
        file = events(tmp_path, {"x": [(1, 1.0), (2, 2.0), (3, 3.0)]})
        data = bytearray(file.read_bytes())
        sizes = [len(record) + 16 for record in records(file)]
        data[sum(sizes[:2]) + 14] ^= 1
        file.write_bytes(data)
        (run,) = read(file)
        assert plain(run) == {"x": [(1, 1.0)]}
        assert "its checksum does not match" in run.notes[0]

    def test_a_file_without_a_whole_record_or_of_other_records_holds_nothing_and_says_why(self, tmp_path: Path) -> None:
        file = tmp_path / "events.out.tfevents.1"
        file.write_bytes(b"\0" * 30)
        (run,) = read(file)
        assert not run.signals
        assert "record 1: a length that its checksum does not match" in run.notes[0]
        write(file, [b"\xff\xff\xff\xff"])
        (run,) = read(file)
        assert not run.signals
        assert "a record that is no Event" in run.notes[0]

    def test_a_run_that_has_just_begun_does_not_stand_in_the_way_of_others(self, tmp_path: Path) -> None:
        events(tmp_path / "a", {})
        events(tmp_path / "b", {"x": [(1, 1.0)]})
        assert [list(run.signals) for run in read(tmp_path)] == [[], ["x"]]

    def test_a_step_before_the_first_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="found step -1"):
            read(events(tmp_path, {"x": [(-1, 1.0)]}))

    def test_without_tensorboardx_it_is_told_what_mends_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = events(tmp_path, POINTS)
        monkeypatch.setitem(sys.modules, "tensorboardX.proto.event_pb2", None)
        with pytest.raises(InputError, match=r"no tensorboardX.*pip install tensorboardX.*as CSV"):
            read(file)


def test_a_cut_run_ends_at_the_step_that_is_given(tmp_path: Path) -> None:
    (run,) = read(text(tmp_path / "a.csv", "step,a,b", "10,1,", "20,2,5", "30,3,6"))
    assert plain(run.upto(20)) == {"a": [(10, 1.0), (20, 2.0)], "b": [(20, 5.0)]}
    assert plain(run.upto(10)) == {"a": [(10, 1.0)]}
