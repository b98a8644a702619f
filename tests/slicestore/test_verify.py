"""Looking for damage: everything that is wrong is told at once, nothing that is right is."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slicestore.errors import InputError
from slicestore.ingest import ingest
from slicestore.manifest import to_json
from slicestore.settings import Preprocessing
from slicestore.store import Entry, Store
from slicestore.verify import verify


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, make_cohort, small: Preprocessing) -> Store:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("verify")
    return ingest(make_cohort(folder / "raw", sources=2, targets=1), folder / "cohort.zarr", small)


@pytest.fixture
def store(original: Store, tmp_path: Path) -> Store:
    """A copy to damage."""
    shutil.copytree(original.path, tmp_path / "cohort.zarr")
    return Store.open(tmp_path / "cohort.zarr")


def shard(store: Store, entry: Entry, name: str) -> Path:
    return Path(store.path) / entry.group / name / "c" / "0" / "0" / "0"


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def only(problems: tuple[str, ...], *words: str) -> None:
    """There is one problem, and it says these words."""
    assert len(problems) == 1, problems
    for word in words:
        assert word in problems[0]


def test_a_sound_store_has_no_problem_and_is_not_touched(original: Store) -> None:
    def state() -> dict[Path, tuple[int, int]]:
        return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in Path(original.path).rglob("*")}

    before = state()
    report = original.verify()
    assert report.intact
    assert report.finished
    assert report.deep
    assert (report.volumes, report.slices, report.problems, report.leftovers) == (3, 15, (), ())
    files = [p for p in Path(original.path).rglob("*") if p.is_file()]
    assert (report.objects, report.bytes) == (len(files), sum(p.stat().st_size for p in files))
    assert state() == before
    assert not verify(original.path, deep=False).deep


def test_all_damage_is_told_at_once_with_subject_and_slice(store: Store) -> None:
    first, second, target = store.entries
    file = shard(store, first, "image")
    index = np.frombuffer(file.read_bytes()[-16 * 5 - 4 : -4], dtype="<u8").reshape(5, 2)
    flip(file, int(index[1][0]) + 20)
    flip(file, int(index[4][0]) + 20)
    flip(shard(store, first, "label"), -10)
    shard(store, second, "fraction").unlink()
    with shard(store, target, "image").open("r+b") as cut:
        cut.truncate(100)
    (Path(store.path) / "strange.txt").write_text("")
    problems = "\n".join(verify(store.path).problems)
    for told in (
        f"source subject s000: {first.group}/image/c/0/0/0 is not what was written (sha256)",
        "source subject s000: image: slice 1 (position 1 from the feet) does not match its checksum; slice 4",
        f"source subject s000: {first.group}/label/c/0/0/0: the shard's index does not match its checksum",
        f"source subject s001: {second.group}/fraction/c/0/0/0 is missing",
        f"target subject t000: {target.group}/image/c/0/0/0 has 100 bytes instead of",
        "strange.txt: no part of a store",
    ):
        assert told in problems
    shallow = "\n".join(verify(store.path, deep=False).problems)
    assert "checksum" not in shallow
    assert "is missing" in shallow
    assert "has 100 bytes" in shallow


@pytest.mark.parametrize("at", ["zarr.json", "image/zarr.json", "label/c/0/0/0"])
def test_a_byte_flipped_in_any_object_is_found(store: Store, at: str) -> None:
    file = Path(store.path) / store.entries[0].group / at
    whole = file.read_bytes()
    for place in np.random.default_rng(1).integers(0, len(whole), 10):
        flip(file, int(place))
        assert any(f"{at} is not what was written (sha256)" in told for told in verify(store.path).problems)
        file.write_bytes(whole)


def rewritten(store: Store, entry: Entry, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a volume's commit record."""
    file = Path(store.path) / "commits" / f"{entry.group.replace('/', '-')}.json"
    commit = json.loads(file.read_text())
    change(commit)
    file.write_bytes(to_json(commit))


def test_a_manifest_and_a_commit_record_that_differ_are_found(store: Store) -> None:
    def change(commit: dict[str, Any]) -> None:
        commit["maximum"] += 1

    rewritten(store, store.entries[1], change)
    only(verify(store.path, deep=False).problems, "s001: commit record and manifest differ in maximum")


def test_attributes_that_differ_from_the_commit_record_are_found(store: Store) -> None:
    entry = store.entries[2]
    file = Path(store.path) / entry.group / "zarr.json"
    data = json.loads(file.read_text())
    data["attributes"]["record"]["std"] += 1
    file.write_text(json.dumps(data))

    def change(commit: dict[str, Any]) -> None:  # as one who forges both would
        name = f"{entry.group}/zarr.json"
        commit["objects"][name] = {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }

    rewritten(store, entry, change)
    problems = verify(store.path).problems
    assert any("group's attributes and its commit record differ in record" in told for told in problems)


def test_values_that_no_ingest_writes_are_found(original: Store, tmp_path: Path, small: Preprocessing) -> None:
    """Whole chunks with sound checksums, made of what must not be in them."""
    from slicestore import writer
    from slicestore.place import Place
    from slicestore.settings import Prepared

    entry = original.entries[0]
    image, label = original.read(entry, "image"), original.read(entry, "label")
    image[2, 3, 3], label[1, 0, 0], label[4, 0, 0] = np.inf, 255, 9
    place = Place.at(tmp_path / "odd.zarr")
    writer.create(place)
    made = Prepared(image, label, label, dict(entry.record))
    writer.write_volume(place, made, domain="source", subject="s000", key=entry.key, settings=small)
    problems = verify(place.url).problems
    assert any("image: slice 2 (position 2 from the feet) has values that are not finite" in told for told in problems)
    only(
        tuple(told for told in problems if "label:" in told),
        "slice 1 (position 1 from the feet) is missing",
        "slice 4 (position 4 from the feet) has class 9; classes are below 2",
    )


def test_an_unfinished_store_says_how_far_it_is_and_that_all_of_it_is_sound(store: Store) -> None:
    path = Path(store.path)
    (path / "manifest.json").unlink()
    (path / "commits" / f"{store.entries[1].group.replace('/', '-')}.json").unlink()
    (path / ".manifest.json.0123abcd.tmp").write_text("{")
    report = verify(path)
    assert report.intact
    assert not report.finished
    assert (report.volumes, report.slices) == (2, 10)
    assert report.leftovers == (
        ".manifest.json.0123abcd.tmp (a write that was broken off)",
        f"{store.entries[1].group} (not committed)",
    )


def test_what_an_update_that_was_broken_off_left_is_no_damage(store: Store) -> None:
    path, entry = Path(store.path), store.entries[0]
    twin = f"{entry.group[:-1]}{'0' if entry.group[-1] != '0' else '1'}"
    shutil.copytree(path / entry.group, path / twin)
    report = verify(path)
    assert report.intact
    assert report.volumes == 3
    assert report.leftovers == (f"{twin} (not committed)",)
    commit = json.loads((path / "commits" / f"{entry.group.replace('/', '-')}.json").read_text())
    commit["group"] = twin
    commit["objects"] = {name.replace(entry.group, twin): facts for name, facts in commit["objects"].items()}
    (path / "commits" / f"{twin.replace('/', '-')}.json").write_bytes(to_json(commit))
    report = verify(path)
    assert report.intact
    assert report.volumes == 3
    assert report.leftovers == (f"{twin} (committed, and not in the manifest)",)
    flip(path / twin / "image" / "c" / "0" / "0" / "0", 30)  # but it must be sound to be taken up again
    assert not verify(path).intact


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("manifest.json", "manifest.json: damaged JSON"),
        ("commits", "damaged"),
        ("target/zarr.json", "target/zarr.json is missing"),
    ],
)
def test_damaged_records_are_found(store: Store, name: str, told: str) -> None:
    path = Path(store.path)
    if name == "commits":
        file = path / "commits" / f"{store.entries[0].group.replace('/', '-')}.json"
        file.write_text("{")
        assert any("the manifest names it, and its commit record is missing" in p for p in verify(path).problems)
        assert any(f"{file.name}: damaged" in p for p in verify(path).problems)
    elif name == "manifest.json":
        (path / name).write_text("{")
        only(verify(path).problems, told)
    else:
        (path / name).unlink()
        only(verify(path).problems, told)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing there"):
        verify(tmp_path / "gone")
