"""Weights lie in files that hold numbers alone, and a run keeps those that a protocol would choose."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from equipoise import weights
from equipoise.config import NetConfig, RunConfig
from equipoise.launch.local import launch
from equipoise.nets import Inference, Sifa
from equipoise.record import Record
from equipoise.selection import PROTOCOLS, best_step
from equipoise.weights import Kept
from slicestore.errors import InputError
from slicestore.store import Store

NARROW = NetConfig(width=0.0625)


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = weights.of(Sifa(NARROW).state_dict(), {})
    weights.write(tmp_path / "w.safetensors", tensors)
    found = weights.read(tmp_path / "w.safetensors")
    assert found.keys() == tensors.keys() == Inference(NARROW).state_dict().keys()
    assert all(torch.equal(found[name], tensors[name]) for name in found)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"encoder": 1}))


def torched(path: Path) -> None:
    torch.save(Sifa(NARROW).state_dict(), path)


def cut(path: Path) -> None:
    weights.write(path, weights.of(Sifa(NARROW).state_dict(), {}))
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "found"), [(pickled, "a pickle"), (torched, "archive of pickles"), (cut, "no safetensors file")]
)
def test_a_pickle_and_a_damaged_file_are_refused(
    spoil: Callable[[Path], None], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(tmp_path / "w.safetensors")
    for module, name in ((pickle, "loads"), (pickle, "load"), (torch, "load")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("something was unpickled"))
    with pytest.raises(InputError, match=rf"w\.safetensors.*{found}"):
        weights.read(tmp_path / "w.safetensors")


def test_weights_of_another_network_and_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    wide = weights.of(Sifa(NetConfig(width=0.125)).state_dict(), {})
    with pytest.raises(InputError, match="weights of another network"):
        weights.fill(Inference(NARROW), wide, tmp_path)
    own = weights.of(Sifa(NARROW).state_dict(), {})
    own["segmenter.classify.weight"] = torch.full_like(own["segmenter.classify.weight"], torch.inf)
    with pytest.raises(InputError, match="NaN or infinite weights in 1 of"):
        weights.fill(Inference(NARROW), own, tmp_path)


def test_means_lie_beside_the_weights_and_are_chosen_by_name(tmp_path: Path) -> None:
    net = Sifa(NARROW).state_dict()
    mean = {name: x + 1 for name, x in net.items() if x.is_floating_point()}
    both = weights.of(net, mean)
    name = "segmenter.classify.weight"
    assert torch.equal(weights.choose(both, ema=False, where=tmp_path)[name], net[name])
    assert torch.equal(weights.choose(both, ema=True, where=tmp_path)[name], mean[name])
    weights.fill(Inference(NARROW), weights.choose(both, ema=True, where=tmp_path), tmp_path)  # counters and all
    with pytest.raises(InputError, match="no running means"):
        weights.choose(weights.of(net, {}), ema=True, where=tmp_path)


def test_of_old_weights_the_held_ones_stay(tmp_path: Path) -> None:
    kept, one = Kept(tmp_path), {"segmenter.x": torch.ones(2)}
    for step, held in ((100, []), (200, [100]), (300, [100]), (1_000_000, [300, 100])):
        kept.keep(step, one, held)
    assert kept.steps() == [100, 300, 1_000_000]


def test_a_run_keeps_its_last_weights_and_those_that_a_protocol_chooses(
    store: Store, tiny: RunConfig, tmp_path: Path
) -> None:
    config = tiny.having({"data.cohort": store.fingerprint, "steps": 24, "evaluations": 6, "optim.ema": 0.9})
    for _ in launch(tmp_path / "run", config, store.path):
        pass
    record = Record(tmp_path / "run")
    chosen = {best_step(record.rows(), protocol) for protocol in PROTOCOLS}
    assert record.weights.steps() == sorted(step for step in chosen if step is not None)
    assert record.weights.steps()[-1] == 24
    last = weights.read(record.weights.path(24))
    assert any(name.startswith("ema.") for name in last)
    assert record.intake.cohort == store.fingerprint
