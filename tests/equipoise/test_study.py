"""A study's declaration and its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from equipoise.config import RunConfig
from equipoise.record import Record
from equipoise.search import Choice, Fixed, ObjectiveName, Range
from equipoise.study import Study, StudyFolder
from slicestore.errors import InputError


def study(**changed: Any) -> Study:
    settings: dict[str, Any] = {
        "name": "games",
        "question": "Which game is the most stable?",
        "run": RunConfig(steps=100),
        "space": {
            "optim.lr": Range(1e-4, 1e-2),
            "loss.cycle": Range(1, 20, log=False),
            "loss.adversarial": Choice(("lsgan", "ns")),
        },
        "first": ({"optim.lr": 1e-3}, {"loss.adversarial": "ns", "loss.cycle": 5}),
        "labels": ("tenfold", "other game"),
        "objective": "target_dice",
        "feasible": 0.8,
        "points": 5,
        "seed": 3,
    }
    return Study(**settings | changed)


class TestDeclaration:
    def test_it_survives_json(self) -> None:
        again = Study.from_dict(json.loads(json.dumps(study().to_dict(), allow_nan=False)))
        assert again == study()
        assert list(again.space) == list(study().space), "dimensions keep their order: samplers draw in it"
        assert again.space["loss.cycle"] == Range(1, 20, log=False)

    def test_conditions_cases_and_what_follows_from_others_survive_json(self) -> None:
        space = {
            "loss.adversarial": Choice(("lsgan", "rp")),
            "optim.beta1": Fixed(0.0, when={"loss.adversarial": ("rp",)}),
            "critic.penalty": (Fixed("r1r2", when={"loss.adversarial": ("rp",)}), Choice(("none", "r1"))),
            "critic.gamma": Range(0.1, 10.0, when={"critic.penalty": ("r1", "r1r2")}),
            "loss.identity": Range(0.1, 5.0, off=0.0),
            "net.skip": Choice((True, False)),
            "pool": Choice((0, 50)),
        }
        made = study(space=space)
        again = Study.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False)))
        assert again == made
        assert list(again.space) == list(space)

    @pytest.mark.parametrize("objective", get_args(ObjectiveName))
    def test_it_survives_json_with_any_objective(self, objective: ObjectiveName) -> None:
        again = Study.from_dict(json.loads(json.dumps(study(objective=objective).to_dict())))
        assert again.objective == objective

    def test_its_defaults_survive_json_too(self) -> None:
        plain = Study(name="a", question="b", run=RunConfig(), space={"optim.lr": Range(1e-4, 1e-2)})
        assert Study.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain

    @pytest.mark.parametrize("points", [0, -1])
    def test_fewer_points_than_one_are_an_input_error(self, points: int) -> None:
        with pytest.raises(InputError) as error:
            study(points=points)
        assert error.value.found == str(points)

    @pytest.mark.parametrize("feasible", [-0.1, 1.1, float("nan")])
    def test_a_stability_outside_0_to_1_is_refused(self, feasible: float) -> None:
        with pytest.raises(ValueError, match="feasible"):
            study(feasible=feasible)

    def test_a_misspelt_path_is_found_when_the_study_is_declared(self) -> None:
        with pytest.raises(KeyError, match="cycel"):
            study(space={"loss.cycel": Range(1, 2)}, first=(), labels=())
        with pytest.raises(KeyError, match="cycel"):
            study(first=({"loss.cycel": 1.0},), labels=())

    def test_an_empty_range_and_a_bad_option_are_found_when_the_study_is_declared(self) -> None:
        with pytest.raises(ValueError, match="cycle"):
            study(space={"loss.cycle": Range(2, 1)}, first=(), labels=())
        with pytest.raises(ValueError, match="wgan"):
            study(space={"loss.adversarial": Choice(("lsgan", "wgan"))}, first=(), labels=())

    def test_values_that_cannot_be_had_together_are_found_when_the_study_is_declared(self) -> None:
        space = {"loss.adversarial": Choice(("lsgan", "rp")), "critic.penalty": Choice(("none", "r1r2"))}
        with pytest.raises(ValueError, match=r"the space holds a run that cannot be: loss\.adversarial 'rp': "):
            study(space=space, first=(), labels=())

    def test_a_control_may_set_what_the_space_does_not_hold_but_no_run_that_cannot_be(self) -> None:
        control = {"loss.adversarial": "wgan_gp", "critic.penalty": "gp", "optim.lr": 0.5, "seed": 4}
        assert study(first=(control,), labels=()).first == (control,)
        with pytest.raises(ValueError, match=r"must be 'gp' where loss\.adversarial is 'wgan_gp'"):
            study(first=({"loss.adversarial": "wgan_gp"},), labels=())

    def test_two_controls_that_are_the_same_run_are_found_by_their_names(self) -> None:
        first = ({}, {"optim.lr": 1e-3}, {"optim.lr": 2e-4})
        with pytest.raises(ValueError, match="controls 'published' and 'again' are the same run"):
            study(first=first, labels=("published", "other", "again"))
        with pytest.raises(ValueError, match="controls 0 and 2 are the same run"):
            study(first=first, labels=())

    @pytest.mark.parametrize("labels", [("one",), ("one", "two", "three"), ("one", "one")])
    def test_labels_are_one_a_control_and_different(self, labels: tuple[str, ...]) -> None:
        with pytest.raises(ValueError, match=r"2 controls have \d different labels"):
            study(labels=labels)


class TestGivenPoints:
    def test_a_study_whose_points_are_all_given_needs_no_space_and_searches_nothing(self) -> None:
        grid = study(space={}, points=2)
        assert not grid.searches
        assert study().searches

    def test_it_may_say_in_what_its_points_differ_without_every_combination_being_a_run(self) -> None:
        rp = {"loss.adversarial": "rp", "critic.penalty": "r1r2"}
        space = {"loss.adversarial": Choice(("lsgan", "rp")), "critic.penalty": Choice(("none", "r1r2"))}
        assert not study(space=space, first=({}, rp), points=2).searches

    @pytest.mark.parametrize(("first", "remedy"), [(2, "ask for at most 2"), (0, "give a space, or first points")])
    def test_more_points_than_are_given_need_a_space(self, first: int, remedy: str) -> None:
        given = study().first[:first]
        with pytest.raises(InputError) as error:
            study(space={}, points=3, first=given, labels=())
        assert (error.value.found, error.value.remedy) == ("3", remedy)

    def test_a_control_s_name_is_found_by_its_settings(self) -> None:
        made = study(run=RunConfig(steps=100, seed=3))
        names = made.names()
        assert names == {made.run.at("optim.lr", 1e-3): "tenfold", made.run.having(made.first[1]): "other game"}
        assert names.get(made.run.at("optim.lr", 1e-3).at("seed", 4)) is None
        assert study(labels=()).names() == {}


class TestFolder:
    def test_it_answers_what_it_was_made_with(self, tmp_path: Path) -> None:
        made = StudyFolder.create(tmp_path / "a", study(), "python x.py --y", {"store": "cohort", "workers": 2})
        found = StudyFolder.open(tmp_path / "a")
        assert found.study == study()
        assert found.command == "python x.py --y"
        assert found.options == {"store": "cohort", "workers": 2}
        assert found.id == made.id
        assert found.records() == []

    def test_two_studies_of_one_name_have_two_ids(self, tmp_path: Path) -> None:
        ids = {StudyFolder.create(tmp_path / name, study(), "", {}).id for name in "ab"}
        assert len(ids) == 2

    def test_a_folder_that_holds_a_study_is_refused_and_left_alone(self, tmp_path: Path) -> None:
        StudyFolder.create(tmp_path, study(), "one", {})
        with pytest.raises(InputError, match="resume"):
            StudyFolder.create(tmp_path, study(), "two", {})
        assert StudyFolder.open(tmp_path).command == "one"

    @pytest.mark.parametrize("text", [None, "", "{", "[]", '{"id": 1}'])
    def test_a_folder_without_a_readable_study_is_refused(self, tmp_path: Path, text: str | None) -> None:
        if text is not None:
            (tmp_path / "study.json").write_text(text)
        with pytest.raises(InputError, match=r"study\.json"):
            _ = StudyFolder.open(tmp_path).study

    def test_what_is_of_this_place_alone_lies_apart_and_may_be_left_out_when_a_study_is_handed_on(
        self, tmp_path: Path
    ) -> None:
        folder = StudyFolder.create(tmp_path, study(), "python here/study.py", {"store": "/here/cohort.zarr"})
        assert "here" not in (tmp_path / "study.json").read_text()
        (tmp_path / "local.json").unlink()
        opened = StudyFolder.open(tmp_path)
        assert (opened.study, opened.id, opened.command, opened.options) == (study(), folder.id, "", {})

    def test_runs_are_listed_by_name_and_folders_that_are_none_left_out(self, tmp_path: Path) -> None:
        folder = StudyFolder.create(tmp_path, study(), "", {})
        for name in ("b", "a"):
            Record(folder.runs / name).open(RunConfig(), torch.device("cpu"))
        (folder.runs / "c").mkdir()
        assert [record.name for record in folder.records()] == ["a", "b"]


class TestAgree:
    def test_the_same_declaration_agrees_and_more_points_do_and_are_noted(self, tmp_path: Path) -> None:
        folder = StudyFolder.create(tmp_path, study(), "", {"points": 5, "workers": 2})
        folder.agree(study())
        folder.agree(study(points=50))
        found = StudyFolder.open(tmp_path)
        assert found.study == study(points=50)
        assert found.options == {"points": 50, "workers": 2}
        assert found.id == folder.id

    def test_a_declaration_that_is_refused_is_not_noted(self, tmp_path: Path) -> None:
        folder = StudyFolder.create(tmp_path, study(), "", {})
        before = (tmp_path / "study.json").read_text()
        with pytest.raises(InputError):
            folder.agree(study(points=50, seed=4))
        assert (tmp_path / "study.json").read_text() == before

    @pytest.mark.parametrize(
        ("changed", "values"),
        [
            ({"seed": 4}, ("3", "4")),
            ({"points": 4}, ("5", "4")),
            ({"feasible": 0.5}, ("0.8", "0.5")),
            ({"objective": "translated_dice"}, ("target_dice", "translated_dice")),
            ({"objective": "composite"}, ("target_dice", "composite")),
            ({"run": RunConfig(steps=200)}, ("100", "200")),
            ({"first": ({"optim.lr": 2e-3}, study().first[1])}, ("0.001", "0.002")),
            ({"labels": ("tenfold", "ns")}, ("other game", "ns")),
            ({"space": {"optim.lr": Range(1e-4, 2e-2)}}, ("0.01", "0.02")),
        ],
    )
    def test_another_declaration_is_refused_and_what_differs_is_named_with_both_values(
        self, tmp_path: Path, changed: dict[str, Any], values: tuple[str, str]
    ) -> None:
        folder = StudyFolder.create(tmp_path, study(), "", {})
        with pytest.raises(InputError) as error:
            folder.agree(study(**changed))
        assert error.value.where == str(tmp_path)
        for part in (*changed, *values):
            assert part in error.value.found
        assert "question" not in error.value.found

    def test_another_order_of_dimensions_is_the_same_declaration(self, tmp_path: Path) -> None:
        folder = StudyFolder.create(tmp_path, study(), "", {})
        folder.agree(study(space=dict(reversed(list(study().space.items())))))
