"""Checkpoints on disk: whole or not at all, the newest kept, nothing in them can run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.checkpoint import KEPT, State, latest, load, save
from equipoise.ranks import Ranks
from slicestore.errors import InputError

CPU = torch.device("cpu")


def state(number: float) -> State:
    return State({"step": number, "net": {"w": torch.full((3,), float(number))}}, {"rng": torch.tensor([number])})


def write(folder: Path, *steps: int) -> None:
    for step in steps:
        save(folder, step, state(step), Ranks())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    write(tmp_path, 7)
    found = latest(tmp_path)
    assert found is not None
    shared, own = load(found, 0)
    assert shared["step"] == 7
    assert torch.equal(shared["net"]["w"], torch.full((3,), 7.0))
    assert torch.equal(own["rng"], torch.tensor([7]))


def test_a_folder_without_checkpoints_or_no_folder_has_no_latest(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "nowhere") is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 2, 4, 100, 20_000)
    assert KEPT == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000100", "step-020000"]
    assert latest(tmp_path) == tmp_path / "step-020000"


def test_the_newest_is_the_one_of_the_highest_step_beyond_a_million_too(tmp_path: Path) -> None:
    write(tmp_path, 900_000, 950_000, 1_000_000)
    assert latest(tmp_path) == tmp_path / "step-1000000"


def test_a_partial_checkpoint_is_ignored_and_its_folder_used_again(tmp_path: Path) -> None:
    write(tmp_path, 2)
    partial = tmp_path / ".step-000004.partial"
    partial.mkdir()
    (partial / "shared.pt").write_bytes(b"cut off")
    assert latest(tmp_path) == tmp_path / "step-000002"
    write(tmp_path, 4)
    assert latest(tmp_path) == tmp_path / "step-000004"
    assert load(tmp_path / "step-000004", 0).shared["step"] == 4
    assert not partial.exists()


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, 2)
    save(tmp_path, 2, state(-1), Ranks())
    assert load(tmp_path / "step-000002", 0).shared["step"] == -1


@pytest.mark.parametrize("file", ["shared.pt", "rank-0.pt"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_refused_and_the_one_before_named_as_the_way_out(
    tmp_path: Path, file: str, damage: str
) -> None:
    write(tmp_path, 2, 4)
    path = tmp_path / "step-000004" / file
    data = path.read_bytes()
    if damage == "flipped":
        data = bytes(64) + data[64:]
    path.write_bytes({"cut": data[: len(data) // 2], "flipped": data, "empty": b""}[damage])
    with pytest.raises(InputError) as error:
        load(tmp_path / "step-000004", 0)
    assert error.value.where == str(path)
    assert "step-000004" in error.value.remedy


@pytest.mark.parametrize("file", ["shared.pt", "rank-0.pt"])
def test_a_missing_file_is_refused(tmp_path: Path, file: str) -> None:
    write(tmp_path, 2)
    (tmp_path / "step-000002" / file).unlink()
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "step-000002", 0)


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("sprung", "w")


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_nothing_in_a_checkpoint_can_run(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, 2)
    path = tmp_path / "step-000002" / "shared.pt"
    if how == "torch":
        torch.save({"step": _Trap()}, path)
    else:
        path.write_bytes(pickle.dumps({"step": _Trap()}))
    with pytest.raises(InputError):
        load(tmp_path / "step-000002", 0)
    assert not (tmp_path / "sprung").exists()
