"""Networks are shown of a raw volume what they were trained on, and a volume that is unlike that is told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from equipoise.batches import Cohort
from equipoise.config import RunConfig
from equipoise.intake import SLICE_MM, Intake
from equipoise.predict import batches
from slicestore.errors import InputError
from slicestore.ingest import ingest
from slicestore.inputs import inputs_from_folder
from slicestore.preprocess import prepare
from slicestore.settings import Preprocessing
from slicestore.store import Store
from slicestore.volume import Volume, read

CPU = torch.device("cpu")


def raw_of(store: Store, split: str, domain: str) -> Volume:
    """The raw volume of the split's first subject: the one whose mean the store tells."""
    entry = store.select(domain, split)[0]  # type: ignore[arg-type]
    for path in sorted(Path(store.path).parent.glob(f"{domain}-[0-9].nii.gz")):
        volume = read(path)
        if prepare(volume, None, store.preprocessing).record["mean"] == entry.mean:
            return volume
    raise AssertionError("no such volume")


@pytest.fixture(scope="module")
def padded(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The same volumes in larger slices, with a frame of zero."""
    raw = Path(store.path).parent
    inputs = [
        one
        for domain in ("source", "target")
        for one in inputs_from_folder(raw, domain)  # type: ignore[arg-type]
        if one.subject.startswith(domain)
    ]
    return ingest(
        inputs, tmp_path_factory.mktemp("padded") / "c.zarr", Preprocessing(size=40, spacing_mm=1.0, pad="zero")
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"data.percentile": 5.0},
        {"data.frame": 4},
        {"net.channels": 3},
        {"data.limits": "pooled"},
        {"data.limits": "fixed"},
    ],
    ids=str,
)
@pytest.mark.parametrize("domain", ["source", "target"])
def test_a_raw_volume_is_shown_as_training_shows_it_bit_for_bit(
    store: Store, tiny: RunConfig, settings: dict[str, float], domain: str
) -> None:
    config = tiny.having(settings)
    cohort = Cohort(store, config, CPU)
    prepared = prepare(raw_of(store, "val", domain), None, store.preprocessing)
    shown = torch.cat(list(batches(cohort.intake, prepared, CPU, 4, domain)))  # type: ignore[arg-type]
    assert torch.equal(shown, cohort.val[domain].image)  # type: ignore[index]


def test_a_frame_of_zero_becomes_the_middle_of_the_limits_as_in_training(padded: Store, store: Store) -> None:
    config = RunConfig(batch=2)
    cohort = Cohort(padded, config, CPU)
    raw = raw_of(store, "val", "target")
    prepared = prepare(raw, None, padded.preprocessing)
    shown = torch.cat(list(batches(cohort.intake, prepared, CPU, 4, "target")))
    assert torch.equal(shown, cohort.val["target"].image)
    assert shown[0, 0, 0, 0] == 0


def test_it_is_kept_as_plain_data_without_a_subject_in_it(store: Store, tiny: RunConfig, tmp_path: Path) -> None:
    intake = Intake.of(store, tiny)
    said = json.dumps(intake.to_dict())
    assert Intake.from_dict(json.loads(said)) == intake
    assert not any(entry.subject in said or entry.key in said for entry in store.entries)
    (tmp_path / "intake.json").write_text(said[:-9])
    with pytest.raises(InputError, match="no readable account of preprocessing"):
        Intake.read(tmp_path / "intake.json")


def test_a_volume_of_the_training_subjects_kind_is_not_odd(store: Store, tiny: RunConfig) -> None:
    intake = Intake.of(store, tiny)
    for domain in ("source", "target"):
        record = prepare(raw_of(store, "val", domain), None, store.preprocessing).record
        assert intake.oddities(record, domain) == []  # type: ignore[arg-type]


def test_a_volume_of_the_other_modality_is_told_with_its_numbers_and_the_trainings(
    store: Store, tiny: RunConfig
) -> None:
    intake = Intake.of(store, tiny)
    record = prepare(raw_of(store, "val", "source"), None, store.preprocessing).record
    (said,) = intake.oddities(record, "target")
    assert re.search(r"[\d.]+ % of its values lie below -?[\d.]+ standard deviations from its mean", said)
    assert re.search(r"of those of target training subjects, below -?[\d.]+ to -?[\d.]+", said)
    assert "looks more like the source modality" in said


def test_other_distances_between_slices_and_what_is_cut_off_are_told(store: Store, tiny: RunConfig) -> None:
    intake = Intake.of(store, tiny)
    record = prepare(raw_of(store, "val", "target"), None, store.preprocessing).record
    oriented = {**record["oriented"], "spacing_mm": [1.0, 1.0, 9.0]}
    resampled = {**record["resampled"], "size": [42, 33, 6]}
    said = intake.oddities({**record, "oriented": oriented, "resampled": resampled}, "target")
    assert said == [
        "its slices are 9 mm apart; in training they were 3 mm",
        "it is larger than what the network sees, so that no structure is looked for in 10 mm of 42 along x "
        "and 1 mm of 33 along y",
    ]


def test_ranges_span_the_training_subjects_alone(store: Store, tiny: RunConfig) -> None:
    intake = Intake.of(store, tiny)
    train = [store.record(entry)["percentiles"]["5"] for entry in store.select("source", "train")]
    assert intake.usual["source"]["5"] == (min(low for low, _ in train), max(low for low, _ in train))
    assert intake.usual["source"]["95"] == (min(high for _, high in train), max(high for _, high in train))
    assert intake.usual["source"][SLICE_MM] == (3.0, 3.0)
    assert np.isfinite([end for ends in intake.usual["target"].values() for end in ends]).all()
