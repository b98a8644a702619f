"""Runs judged after the fact: ours as they were while they trained, anybody's from curves; as a user types it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equipoise.checkpoint import State
from equipoise.config import PUBLISHED, RunConfig
from equipoise.curve_picture import MOST_RUNS
from equipoise.diagnose import diagnoses
from equipoise.monitor import Monitor, counted, watched
from equipoise.record import Record
from equipoise.search import Range
from equipoise.study import Study, StudyFolder
from equipoise.train import Progress
from equipoise.verdict import Finding, Verdict

STEPS = 2000
CONFIG = PUBLISHED.having({"steps": STEPS, "data.cohort": "c0ffee"})
Typed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, command: Typed) -> Typed:
    """Type `equipoise diagnose ...`."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    return partial(command, "diagnose")


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stdout
    told = " ".join(done.stderr.split())
    assert told.startswith("error: ")
    for part in (*parts, "Remedy: "):
        assert part in told


# --- runs of ours -----------------------------------------------------------------------------------------------------


def signals(*, jump: int = STEPS + 1, collapse: int = STEPS + 1, seed: int = 0) -> Mapping[str, np.ndarray]:
    """What a run says at each of its steps: noisy plateaus, and from `jump` on a target cycle ten times as high."""
    rng = np.random.default_rng(seed)
    at = np.arange(1, STEPS + 1)
    noise = {name: np.exp(0.1 * rng.normal(size=STEPS)) for name in watched(CONFIG)}
    blown = np.where(at >= jump, 10.0, 1.0)
    return {
        "loss/cycle_s": 0.5 * noise["loss/cycle_s"],
        "loss/cycle_t": 0.1 * blown * noise["loss/cycle_t"],
        "loss/segmentation": 0.3 * noise["loss/segmentation"],
        "loss/generator": 6 * noise["loss/generator"],
        "critic/loss_t": 0.25 * noise["loss/cycle_s"],
        **{f"auc/{critic}": np.full(STEPS, 0.8) for critic in counted(CONFIG)},
        "saturation/st": np.zeros(STEPS),
        "probe/diversity_st": np.where(at >= collapse, 0.1, 0.9),
    }


def trained(folder: Path, said: Mapping[str, np.ndarray], config: RunConfig = CONFIG, stop: int = STEPS) -> Verdict:
    """Leave a record behind as a live run does, watched by a monitor at every step; the monitor's verdict."""
    record = Record(folder)
    record.open(config, torch.device("cpu"))
    monitor = Monitor(config.monitor, config.steps, watched(config), counted(config))
    names = [name for name in said if not name.startswith("probe/")]
    table = np.stack([said[name] for name in names], axis=1)
    block = monitor.horizon.block
    for first in range(1, stop + 1, block):
        step = min(first + block - 1, stop)
        means = monitor.observe(first, names, table[first - 1 : step])
        looked = step % 100 == 0
        if looked:
            seen = {name: float(said[name][step - 1]) for name in said if name.startswith("probe/")}
            monitor.look(step, seen)
            means |= seen
        record.add(Progress(step, means, 0.1, looked, None, monitor.stability(), None, lambda: State({}, {})))
        if monitor.diverged:
            break
    verdict = monitor.verdict(step)
    if verdict.kind != "censored":
        record.close(verdict)
    return verdict


@pytest.mark.parametrize(
    ("events", "kind"),
    [({}, "stable"), ({"jump": 1000}, "diverged"), ({"collapse": 1200}, "collapsed"), ({"jump": 1990}, "stable")],
)
def test_a_run_of_ours_gets_the_very_verdict_it_got_while_it_trained(
    tmp_path: Path, events: dict[str, int], kind: str
) -> None:
    live = trained(tmp_path / "run", signals(**events))
    (found,) = diagnoses(tmp_path / "run").runs
    assert live.kind == kind
    assert found.verdict == live
    assert found.notes == []
    assert found.horizon == Monitor(CONFIG.monitor, STEPS, {}).horizon


def test_a_run_is_judged_by_its_own_limits(tmp_path: Path) -> None:
    patient = CONFIG.having({"monitor.cycle_growth": 50.0, "monitor.diversity": 0.05})
    trained(tmp_path / "run", signals(jump=1000, collapse=1200), patient)
    (found,) = diagnoses(tmp_path / "run").runs
    assert found.verdict.kind == "stable"


def test_a_run_that_still_trains_is_judged_as_far_as_it_has_come(tmp_path: Path, typed: Typed) -> None:
    trained(tmp_path / "run", signals(), stop=600)
    done = typed(tmp_path / "run")
    assert done.returncode == 0
    assert "run: censored after 600 of 2000 steps" in done.stdout
    assert "it still trains, or was stopped" in done.stdout


def test_a_run_of_ours_cut_short_had_not_diverged_yet(tmp_path: Path) -> None:
    trained(tmp_path / "run", signals(jump=1000))
    (found,) = diagnoses(tmp_path / "run", upto=990).runs
    assert (found.verdict.kind, found.verdict.step, found.verdict.findings) == ("censored", 990, ())


def test_a_divergence_that_a_run_went_back_from_counts_from_its_alarm_on(tmp_path: Path) -> None:
    trained(tmp_path / "run", signals())
    gone = Finding("explosion", "loss/cycle_t", onset=400, alarm=500, value=1.0, limit=0.2)
    back = {"verdict": Verdict("diverged", 500, STEPS, 0.2, (gone,)).to_dict(), "step": 300, "remedy": "a lower rate"}
    (tmp_path / "run" / "returns.json").write_text(json.dumps([back]))
    (found,) = diagnoses(tmp_path / "run").runs
    assert (found.verdict.kind, found.verdict.onset, found.verdict.stability) == ("recovered", 400, 0.2)
    assert found.notes == ["while it trained it was found to be stable after 2000 of 2000 steps"]
    (before,) = diagnoses(tmp_path / "run", upto=495).runs
    assert before.verdict.findings == ()


def test_a_block_that_was_not_finite_is_found_in_a_run_of_ours(tmp_path: Path) -> None:
    said = dict(signals())
    said["loss/generator"] = np.where(np.arange(1, STEPS + 1) == 703, math.nan, said["loss/generator"])
    live = trained(tmp_path / "run", said)
    (found,) = diagnoses(tmp_path / "run").runs
    assert live.onset == 703
    assert (found.verdict.kind, found.verdict.onset) == ("diverged", 705), "a record knows blocks of 5 steps"


def test_what_masks_are_worth_is_never_judged_finite_or_not(tmp_path: Path) -> None:
    live = trained(tmp_path / "run", signals())
    record = Record(tmp_path / "run")
    worth = {"quality/composite": math.nan, "validator/entropy": math.nan}
    record.add(Progress(STEPS, worth, 0.1, True, None, 1.0, None, lambda: State({}, {})))
    (found,) = diagnoses(tmp_path / "run").runs
    assert found.verdict == live
    assert not set(found.seen) & set(worth)


def test_critics_whose_schedule_is_not_recorded_are_not_judged(tmp_path: Path) -> None:
    config = CONFIG.having({"loss.adv_p_from_epoch": 5, "loss.adv_p_full_epoch": 7})
    said = {**signals(), "auc/p": np.full(STEPS, 1.0)}
    trained(tmp_path / "run", said, config)
    (found,) = diagnoses(tmp_path / "run").runs
    assert not [f for f in found.verdict.findings if f.signal == "auc/p"]
    assert "auc/p and auc/p_low are not judged: how many steps an epoch had is not recorded" in found.notes


def test_a_study_is_told_in_a_line_a_run(tmp_path: Path, typed: Typed) -> None:
    study = Study(name="sweep", question="Which rates?", run=CONFIG, space={"optim.lr": Range(1e-5, 1e-2)}, points=3)
    folder = StudyFolder.create(tmp_path / "study", study, "python studies/sweep.py", {})
    trained(folder.runs / "point-0", signals())
    trained(folder.runs / "point-1", signals(jump=1000))
    Record(folder.runs / "point-2").open(CONFIG, torch.device("cpu"))
    first, second, third = typed(tmp_path / "study").stdout.splitlines()
    assert first == "point-0: stable after 2000 of 2000 steps"
    assert second.startswith("point-1: diverged after ")
    assert third == "point-2: no block of signals yet"
    alone = typed(tmp_path / "study", "--run", "point-1").stdout
    assert "judged in blocks of 5 steps, after a warm-up of 100; a rule must hold for 50" in alone


@pytest.mark.parametrize("option", [("--steps", 4000), ("--term", "loss/cycle_t=mine")])
def test_what_a_run_of_ours_says_itself_cannot_be_said_otherwise(
    tmp_path: Path, typed: Typed, option: tuple[object, ...]
) -> None:
    trained(tmp_path / "run", signals(), stop=600)
    refused(typed(tmp_path / "run", *option), str(option[0]), "its config.json says it")


# --- anybody's curves -------------------------------------------------------------------------------------------------


def table(path: Path, curves: Mapping[str, Sequence[float]], every: int = 50) -> Path:
    """A wide table, a row every so many steps."""
    rows = zip(*curves.values(), strict=True)
    lines = [",".join(["step", *curves]), *(",".join(map(str, ((k + 1) * every, *row))) for k, row in enumerate(rows))]
    path.write_text("\n".join(lines) + "\n")
    return path


def blown(at: int = 200, blocks: int = 400) -> list[float]:
    """A cycle loss that rises from .1 to 10 after `at` blocks of 50 steps."""
    return [0.1 if k < at else 10.0 for k in range(blocks)]


CALM = [0.5] * 400


def test_curves_are_judged_and_what_was_guessed_is_told(tmp_path: Path, typed: Typed) -> None:
    file = table(tmp_path / "theirs.csv", {"cycle_A": CALM, "cycle_B": blown(), "D_A": CALM, "lr": CALM})
    done = typed(file)
    assert done.returncode == 0
    verdict, finding, stability, *rest = done.stdout.splitlines()
    assert verdict == (
        "theirs: diverged after 20 000 of 20 000 steps: "
        "target cycle loss left its plateau at step 10 000, from .10 to 10"
    )
    assert finding.startswith("  explosion, loss/cycle_t: onset at step 10 000, certain at step 10 ")
    assert stability.startswith("  stability S .0")
    assert rest == [
        "  judged in blocks of 50 steps, after a warm-up of 1000; a rule must hold for 500",
        "  judged: loss/cycle_s (cycle_A), loss/cycle_t (cycle_B), critic/loss_t (D_A)",
        "  not judged: lr",
    ]


def test_a_stable_run_exits_with_0_as_well(tmp_path: Path, typed: Typed) -> None:
    done = typed(table(tmp_path / "a.csv", {"cycle_B": CALM}))
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "a: stable after 20 000 of 20 000 steps")


def test_a_tag_is_judged_once_it_is_told_what_it_means(tmp_path: Path, typed: Typed) -> None:
    file = table(tmp_path / "a.csv", {"round/trip": blown(), "cycle_A": CALM, "other": CALM})
    assert "stable" in typed(file).stdout
    done = typed(file, "--term", "loss/cycle_t=round/trip", "loss/segmentation=other")
    assert "diverged" in done.stdout
    assert "loss/cycle_t (round/trip), loss/segmentation (other)" in done.stdout


def test_text_that_is_no_number_is_a_finding_at_its_step_whoever_knows_its_name(tmp_path: Path) -> None:
    values = [*CALM[:99], math.nan, *CALM[100:]]
    (found,) = diagnoses(table(tmp_path / "a.csv", {"cycle_A": CALM, "D_A": values})).runs
    (finding,) = found.verdict.findings
    assert (finding.kind, finding.signal, finding.onset) == ("non_finite", "critic/loss_t", 5000)
    (found,) = diagnoses(table(tmp_path / "b.csv", {"cycle_A": CALM, "mine": values})).runs
    assert found.verdict.kind == "stable"
    assert found.notes == ["mine, which is not judged, is nan at step 5000"]


def test_a_loss_that_stops_before_others_is_told(tmp_path: Path) -> None:
    file = table(tmp_path / "a.csv", {"cycle_A": CALM, "cycle_B": CALM})
    lines = file.read_text().splitlines()
    lines[201:] = [line.rsplit(",", 1)[0] + "," for line in lines[201:]]  # as pandas writes NaN
    file.write_text("\n".join(lines) + "\n")
    (found,) = diagnoses(file).runs
    assert found.notes == ["loss/cycle_t has no value after step 10 000, where others go on to 20 000"]


def test_a_cut_record_is_a_run_of_that_length_and_a_longer_plan_leaves_it_open(tmp_path: Path, typed: Typed) -> None:
    file = table(tmp_path / "a.csv", {"cycle_B": blown()})
    assert typed(file, "--upto", 9000).stdout.startswith("a: stable after 9000 of 9000 steps")
    assert typed(file, "--upto", 9000, "--steps", 20000).stdout.startswith("a: censored after 9000 of 20 000 steps")
    refused(typed(file, "--steps", 9000), "--steps 9000", "curves of a up to step 20000", "--upto")


def test_a_loss_that_may_be_negative_is_not_judged_and_told_so(tmp_path: Path) -> None:
    file = table(tmp_path / "a.csv", {"cycle_A": CALM, "loss_G": [-1.0, *CALM[1:]]})
    (found,) = diagnoses(file).runs
    assert list(found.judged) == ["loss/cycle_s"]
    assert list(found.seen) == ["loss/generator"]


def test_one_of_several_runs_is_chosen_by_its_name(tmp_path: Path, typed: Typed) -> None:
    file = tmp_path / "a.csv"
    rows = [f"{run},{step},0.5" for run in ("x", "y") for step in range(50, 20001, 50)]
    file.write_text("\n".join(["run,step,cycle_A", *rows]) + "\n")
    both = typed(file).stdout
    assert "x: stable" in both
    assert "y: stable" in both
    assert "x: stable" not in typed(file, "--run", "y").stdout
    refused(typed(file, "--run", "z"), "found no run z", "its runs are x, y")


def test_a_run_without_anything_to_judge_does_not_stand_in_the_way_of_others(tmp_path: Path, typed: Typed) -> None:
    (tmp_path / "of").mkdir()
    table(tmp_path / "of" / "train.csv", {"cycle_A": CALM})
    table(tmp_path / "of" / "val.csv", {"accuracy": CALM})
    done = typed(tmp_path / "of")
    assert "train: stable" in done.stdout
    assert done.stdout.splitlines()[-1] == "val: nothing to judge in accuracy"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("nowhere.csv",), ("nowhere.csv", "found nothing")),
        (("events.out.tfevents.1",), ("nothing to judge; read as far as it is whole", "record 1")),
        (("val.csv",), ("nothing to judge in accuracy", "--term loss/cycle_t=TAG")),
        (("a.csv", "--term", "loss/cycle_t"), ("--term", "our name = a tag")),
        (("a.csv", "--term", "cycle=cycle_A"), ("--term cycle", "a name that is never judged")),
        (("a.csv", "--term", "loss/cycle_t=b"), ("found no signal b", "one of: cycle_A")),
        (("a.csv", "--steps", 0), ("--steps", "found 0")),
        (("a.csv", "--upto", 49), ("nothing to judge up to step 49",)),
        (("a.csv", "--picture", "a.pdf"), ("--picture", "found a.pdf", "PNG")),
        (("a.csv", "--picture", "nowhere/a.png"), ("--picture", "no folder nowhere")),
    ],
)
def test_what_cannot_be_done_is_told_with_its_remedy(
    tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...], parts: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "a.csv", {"cycle_A": CALM})
    table(tmp_path / "val.csv", {"accuracy": CALM})
    (tmp_path / "events.out.tfevents.1").write_bytes(b"cut")
    refused(typed(*words), *parts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "events.out.tfevents.1", "val.csv"]


# --- the picture ------------------------------------------------------------------------------------------------------


def colours(path: Path) -> set[tuple[int, int, int]]:
    with Image.open(path) as picture:
        return {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or ()}  # type: ignore[misc]


def test_a_picture_shows_a_column_a_run_and_nothing_of_their_names(tmp_path: Path, typed: Typed) -> None:
    folder = tmp_path / "Mueller_Hans_1961"
    folder.mkdir()
    for name in ("anna", "bert"):
        table(folder / f"{name}.csv", {"cycle_A": CALM, "cycle_B": blown(), "D_A": CALM})
    assert typed(folder / "anna.csv", "--picture", tmp_path / "one.png").returncode == 0
    assert typed(folder, "--picture", tmp_path / "two.png").returncode == 0
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert one.text == two.text == {}, "nothing but pixels"  # type: ignore[attr-defined]
        assert two.width > 1.3 * one.width
        assert two.height == pytest.approx(one.height, rel=0.1)
    (folder / "anna.csv").rename(folder / "aaron.csv")
    assert typed(folder, "--picture", tmp_path / "renamed.png").returncode == 0
    assert (tmp_path / "renamed.png").read_bytes() == (tmp_path / "two.png").read_bytes(), "a name changes nothing"


def test_onset_and_the_curves_are_there_to_be_seen(tmp_path: Path, typed: Typed) -> None:
    calm, bad = (table(tmp_path / f"{n}.csv", {"cycle_B": c}) for n, c in (("calm", CALM), ("bad", blown())))
    for file in (calm, bad):
        typed(file, "--picture", file.with_suffix(".png"))
    red = (0xC2, 0x27, 0x2D)
    assert near(red, colours(bad.with_suffix(".png")))
    assert not near(red, colours(calm.with_suffix(".png")))


def near(colour: tuple[int, int, int], among: set[tuple[int, int, int]]) -> bool:
    return min(sum(abs(a - b) for a, b in zip(colour, other, strict=True)) for other in among) < 24


def test_values_that_have_no_place_on_the_axis_leave_gaps_and_never_an_error(tmp_path: Path, typed: Typed) -> None:
    values = [*CALM[:200], 0.0, -1.0, math.inf, *([math.nan] * 197)]
    file = table(tmp_path / "a.csv", {"cycle_A": CALM, "G_A": values, "cycle_B": [math.nan] * 400})
    assert typed(file, "--picture", tmp_path / "a.png").returncode == 0
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_run_of_ours_is_drawn_too(tmp_path: Path, typed: Typed) -> None:
    trained(tmp_path / "run", signals(jump=1000))
    assert typed(tmp_path / "run", "--picture", tmp_path / "a.png").returncode == 0
    assert (tmp_path / "a.png").is_file()


def test_more_runs_than_fit_are_refused_by_the_picture_after_they_were_told(tmp_path: Path, typed: Typed) -> None:
    (tmp_path / "many").mkdir()
    for k in range(MOST_RUNS + 1):
        table(tmp_path / "many" / f"{k}.csv", {"cycle_A": CALM})
    done = typed(tmp_path / "many", "--picture", tmp_path / "a.png")
    refused(done, "--picture", f"found {MOST_RUNS + 1} runs", "--run")
    assert done.stdout.count("stable") == MOST_RUNS + 1


def test_nothing_is_drawn_with_before_a_picture_is_asked_for() -> None:
    code = (
        "import sys, equipoise.cli, equipoise.diagnose, equipoise.curve_picture; sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the 2022 study ---------------------------------------------------------------------------------------------------


def test_both_blow_ups_of_the_first_study_are_found_and_none_before(real: Path, tmp_path: Path, typed: Typed) -> None:
    file, picture = real / "first_study_losses.csv", tmp_path / "first_study.png"
    vessel, brain = diagnoses(file).runs
    for run, name, onset in ((vessel, "vessel", 15_200), (brain, "brain", 5_600)):
        assert (run.run, run.verdict.kind) == (name, "diverged")
        (explosion,) = [f for f in run.verdict.findings if f.diverged]
        assert (explosion.kind, explosion.signal) == ("explosion", "loss/cycle_t")
        assert abs(explosion.onset - onset) <= 500
    done = typed(file, "--picture", picture)
    assert done.returncode == 0
    assert [line.split(" after ")[0] for line in done.stdout.splitlines() if not line.startswith(" ")] == [
        "vessel: diverged",
        "brain: diverged",
    ]
    assert picture.stat().st_size < 200_000
    healthy = typed(file, "--run", "vessel", "--upto", 10_000)
    assert healthy.stdout.startswith("vessel: stable after 10 000 of 10 000 steps\n")
