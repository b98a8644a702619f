"""What a grid's runs are told as: from records to rows, cells and tables, by hand."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from equipoise import outcomes
from equipoise.config import PUBLISHED, RunConfig
from equipoise.figures import Run
from equipoise.grid import Grid
from equipoise.monitor import Finding, Verdict
from equipoise.outcomes import Cell, Outcome, Told
from equipoise.record import Record, Row
from equipoise.study import Study, StudyFolder

STEPS = 400
STUDY = Grid(
    run=PUBLISHED.at("steps", STEPS),
    conditions={"no image norm": {"net.image_norm": "none"}, "as published": {}},
    rates=(2e-4, 2e-3),
    seeds=(0, 1),
).study("grid", "What happens?")


def exploded(onset: int, alarm: int) -> Verdict:
    finding = Finding("explosion", "loss/cycle_t", onset, alarm, 12.5, 0.4)
    won = Finding("d_wins", "auc/t", onset, onset + 1, 0.995, 0.99)
    return Verdict("diverged", alarm, STEPS, onset / STEPS, (won, finding))


def lived(stability: float = 1.0) -> Verdict:
    return Verdict("stable", STEPS, STEPS, stability)


def outcome(verdict: Verdict | None, rows: Sequence[Row] = (), condition: str = "c", **leaves: float) -> Outcome:
    config = PUBLISHED.having({"steps": STEPS, **{path.replace("__", "."): value for path, value in leaves.items()}})
    steps = verdict.step if verdict else STEPS // 2
    return Outcome(condition, Run("run", config, verdict, [*rows, {"step": float(steps)}], None))


def cell(*each: Outcome) -> Cell:
    return Cell("c", 2e-4, each)


def record(folder: StudyFolder, name: str, config: RunConfig, verdict: Verdict | None, rows: Sequence[Row]) -> None:
    run = Record(folder.runs / name)
    run.folder.mkdir()
    (run.folder / "config.json").write_text(json.dumps(config.to_dict()))
    lines = ({k: v if math.isfinite(v) else str(v) for k, v in row.items()} for row in rows)
    (run.folder / "signals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if verdict:
        run.close(verdict)


def recorded(path: Path, study: Study = STUDY) -> StudyFolder:
    """All points but the last; the first blew up, the second was cut off, the others lived."""
    folder = StudyFolder.create(path / "grid", study, "", {})
    for number, point in enumerate(study.first[:-1]):
        dice = math.nan if number == 0 else 0.1 * number
        last = {0: 130, 1: 90}.get(number, STEPS)
        row = {"step": last, "time/block": 1.0, "loss/cycle_t": 3.0, "quality/translated_dice": dice}
        verdict = {0: exploded(100, 130), 1: None}.get(number, lived())
        record(folder, f"{number:04d}-abcd", study.run.having(point), verdict, [row])
    record(folder, "confirm-abcd", study.run.at("seed", 9), lived(), [])
    return folder


# --- one run ----------------------------------------------------------------------------------------------------------


def test_a_run_s_onset_and_alarm_are_those_of_what_ended_it_not_of_a_critic_that_won() -> None:
    found = outcome(exploded(100, 130))
    assert (found.onset, found.alarm) == (100, 130)
    assert found.spared == pytest.approx(270 / 400)


def test_a_collapse_is_told_by_the_verdict_and_is_no_blow_up() -> None:
    collapse = Finding("collapse", "probe/foreground", 0, 50, 0.0, 0.1)
    found = outcome(Verdict("collapsed", STEPS, STEPS, 0.0, (collapse,)))
    assert (found.run.verdict and found.run.verdict.onset, found.onset, found.alarm) == (0, None, None)
    assert outcomes.verdicts(cell(found)) == "1 collapsed"


def test_a_run_that_recovered_began_to_blow_up_where_it_first_did() -> None:
    first, second = (Finding("saturation", "saturation/tst", at, at + 20, 0.9, 0.3) for at in (100, 200))
    found = outcome(Verdict("recovered", STEPS, STEPS, 0.25, (second, first)))
    assert (found.onset, found.alarm) == (100, 120)


def test_a_run_that_lived_or_has_not_ended_has_neither() -> None:
    assert (outcome(lived()).onset, outcome(lived()).alarm, outcome(lived()).spared) == (None, None, 0.0)
    assert (outcome(None).onset, outcome(None).alarm, outcome(None).spared) == (None, None, None)


def test_an_end_level_is_the_mean_of_the_last_tenth_of_a_signal_s_blocks() -> None:
    rows = [{"step": float(n), "loss/cycle_t": float(n), "auc/t": 0.5} for n in range(1, 26)]
    found = outcome(lived(), rows)
    assert found.end("loss/cycle_t") == pytest.approx((23 + 24 + 25) / 3)  # 2.5 blocks, rounded up
    assert found.end("auc/t") == 0.5
    assert found.end("loss/cycle_s") is None


def test_an_end_level_that_holds_a_nan_is_nan() -> None:
    rows = [{"step": float(n), "loss/cycle_t": math.nan if n == 20 else 1.0} for n in range(1, 21)]
    assert math.isnan(outcome(lived(), rows).end("loss/cycle_t") or 0.0)
    rows[-1]["loss/cycle_t"], rows[-2]["loss/cycle_t"] = math.inf, -math.inf
    assert math.isnan(outcome(lived(), rows).end("loss/cycle_t") or 0.0)


def test_a_run_is_as_saturated_as_the_worst_of_its_translations() -> None:
    rows = [{"step": 1.0, "saturation/st": 0.1, "saturation/tst": 0.7, "saturation/ts": -0.2}]
    assert outcome(lived(), rows).saturation == 0.7
    assert outcome(lived()).saturation is None
    assert math.isnan(outcome(lived(), [{**rows[0], "saturation/sts": math.nan}]).saturation or 0.0)


# --- several seeds ----------------------------------------------------------------------------------------------------


def test_a_cell_tells_how_its_runs_ended_and_when_each_began_to_fail() -> None:
    found = cell(outcome(exploded(100, 130)), outcome(lived()), outcome(exploded(90, 130)))
    assert outcomes.verdicts(found) == "2 diverged, 1 stable"
    assert outcomes.onsets(found) == "100, –, 90"


def test_the_worst_s_is_known_only_when_all_seeds_have_one() -> None:
    assert cell(outcome(lived(0.95)), outcome(exploded(100, 130))).worst == 0.25
    assert cell(outcome(lived(0.95)), outcome(None)).worst is None
    assert cell(outcome(lived()), outcome(Verdict("censored", 200, STEPS, None))).worst is None


def test_steps_lived_are_counted_up_to_the_onset_or_the_horizon() -> None:
    found = cell(outcome(exploded(100, 130)), outcome(lived()))
    assert found.lived(STEPS) == pytest.approx((100 + 400) / 2)
    assert found.lived(50) == pytest.approx(50)
    assert cell(outcome(None)).lived(STEPS) is None
    assert cell(outcome(None), outcome(exploded(100, 130))).lived(STEPS) is None
    assert outcomes.lived(STEPS)[1](found) == "250"


def test_a_cell_is_compared_with_the_control_at_its_own_rate() -> None:
    def group(condition: str, lr: float, *onsets: int | None) -> Cell:
        each = [outcome(lived() if at is None else exploded(at, at + 30), condition=condition) for at in onsets]
        return Cell(condition, lr, tuple(each))

    calm, control = group("calm", 2e-4, None, None), group("control", 2e-4, None, None)
    wild, tenfold = group("wild", 2e-3, 10, 20), group("control", 2e-3, 30, None)
    head, say = outcomes.against("control", [calm, control, wild, tenfold])
    assert head == "p against control"
    assert say(control) == "–"
    assert say(calm) == "none blew up"
    # At 10: 2 + 2 at risk, 1/2 expected, variance 1/4. At 20: 1 + 2 at risk, 1/3 expected, variance 2/9.
    z = (2 - 1 / 2 - 1 / 3) / math.sqrt(1 / 4 + 2 / 9)
    assert say(wild) == f"{math.erfc(z / math.sqrt(2)):.3f}"
    assert say(group("elsewhere", 1e-5, None)) == "–"
    last = group("last", 3e-3, 4), group("control", 3e-3, 4)  # everybody at once: nobody is left to compare with
    assert outcomes.against("control", last)[1](last[0]) == "at once"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([], "–"),
        ([None, None], "–"),
        ([0.5], "0.500"),
        ([0.5, 0.7], "0.600 ± 0.141"),
        ([0.5, None], "0.500; 1 of 2 not measured"),
        ([math.nan, 0.5, 0.7], "0.600 ± 0.141; nan in 1 of 3"),
        ([math.nan, math.inf, math.inf], "inf in 2 of 3; nan in 1 of 3"),
    ],
)
def test_what_is_not_finite_or_was_not_measured_is_said_beside_the_mean(values: list[float | None], told: str) -> None:
    assert outcomes.spread(values) == told


# --- a study ----------------------------------------------------------------------------------------------------------


def test_a_study_s_runs_are_read_by_condition_rate_and_seed_without_its_confirmation(tmp_path: Path) -> None:
    found = outcomes.read(recorded(tmp_path))
    assert [(o.condition, o.lr, o.seed) for o in found] == [
        ("no image norm", 2e-4, 0),
        ("no image norm", 2e-4, 1),
        ("no image norm", 2e-3, 0),
        ("no image norm", 2e-3, 1),
        ("as published", 2e-4, 0),
        ("as published", 2e-4, 1),
        ("as published", 2e-3, 0),
    ]
    cells = outcomes.cells(found)
    assert [(c.condition, c.lr, len(c.outcomes)) for c in cells] == [
        ("no image norm", 2e-4, 2),
        ("no image norm", 2e-3, 2),
        ("as published", 2e-4, 2),
        ("as published", 2e-3, 1),
    ]


def test_a_run_of_no_point_of_the_study_is_refused(tmp_path: Path) -> None:
    folder = recorded(tmp_path)
    record(folder, "0099-abcd", STUDY.run.at("seed", 5), lived(), [])
    with pytest.raises(KeyError):
        outcomes.read(folder)


def test_every_run_is_a_row_with_all_digits_and_what_is_not_finite_by_its_name(tmp_path: Path) -> None:
    found = outcomes.read(recorded(tmp_path))
    outcomes.write_runs(tmp_path / "runs.csv", found)
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    first, cut, third = rows[0], rows[4], rows[1]
    wanted = ("condition", "lr", "seed", "verdict", "onset", "alarm", "stability", "steps", "planned")
    assert [first[k] for k in wanted] == [
        *("no image norm", "0.0002", "0", "diverged", "100", "130", "0.25", "130", "400"),
    ]
    assert first["translated_dice"] == "nan"
    assert first["end loss/cycle_t"] == "3.0"
    assert first["end auc/t"] == ""
    assert first["sentence"] == exploded(100, 130).sentence()
    assert [cut[k] for k in wanted] == ["as published", "0.0002", "0", "unfinished", "", "", "", "90", "400"]
    assert third["translated_dice"] == "0.4"


def test_only_the_dice_that_some_run_has_are_told_and_in_one_order() -> None:
    rows = [{"step": 1.0, "quality/ema_target_dice": 0.5, "quality/target_dice": 0.5, "quality/other": 1.0}]
    assert outcomes.measured([outcome(lived()), outcome(lived(), rows)]) == ["target_dice", "ema_target_dice"]


def test_a_composite_is_told_behind_the_dice() -> None:
    rows = [{"step": 1.0, "quality/composite": 0.5, "quality/target_dice": 0.5, "quality/ema_composite": 0.5}]
    assert outcomes.measured([outcome(lived(), rows)]) == ["target_dice", "composite", "ema_composite"]


def test_a_table_has_a_row_a_cell_and_is_written_as_it_is_shown(tmp_path: Path) -> None:
    found = [outcome(exploded(100, 130)), outcome(exploded(120, 160)), outcome(lived(), condition="d")]
    columns = (outcomes.CONDITION, outcomes.LR, outcomes.VERDICTS, outcomes.ONSETS, outcomes.WORST, outcomes.SPARED)
    told = Told.of("What?", outcomes.cells(found), columns)
    assert told.heads == ("condition", "lr", "verdicts", "onsets", "S, worst", "steps saved")
    assert told.rows == (
        ("c", "0.0002", "2 diverged", "100, 120", "0.250", "64% ± 5%"),  # 270 and 240 of 400
        ("d", "0.0002", "1 stable", "–", "1.000", "0%"),
    )
    told.write(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        assert [tuple(row) for row in csv.reader(file)] == [told.heads, *told.rows]


def test_a_table_is_printed_whole_also_where_it_is_wider_than_the_console() -> None:
    console = Console(file=io.StringIO(), width=40)
    Told("What?", ("condition", "a long heading"), (("one condition " * 4, "its cell " * 9),)).print(console)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert any(("one condition " * 4).strip() in line and ("its cell " * 9).strip() in line for line in lines)


def test_telling_leaves_tables_and_curves_in_the_study_s_folder(tmp_path: Path) -> None:
    folder, console = recorded(tmp_path), Console(file=io.StringIO(), width=200)
    found = outcomes.read(folder)
    told = Told.of("What happens?", outcomes.cells(found), (outcomes.CONDITION, outcomes.LR, outcomes.VERDICTS))
    outcomes.tell(folder, console, told, found)
    assert {f.name for f in folder.folder.iterdir()} >= {"table.csv", "runs.csv", "curves-01.png"}
    assert not list(folder.folder.glob(".*partial"))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1 diverged, 1 stable" in said
    assert str(folder.folder / "curves-01.png") in said
