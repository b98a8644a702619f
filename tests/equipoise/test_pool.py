"""The pool of earlier fakes: its rule, its randomness, its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from equipoise.pool import ImagePool

CPU = torch.device("cpu")


def batch(number: float, size: int = 2) -> Tensor:
    return torch.full((size, 1, 2, 3), float(number))


def put(pool: ImagePool, new: Tensor) -> Tensor:
    pool.turn(len(new), new.device)
    return pool(new)


def numbers(pool: ImagePool, start: int, stop: int) -> list[float]:
    """Give the numbers of the batches that the pool gives back for batches `start` to `stop` - 1."""
    given = [put(pool, batch(i)) for i in range(start, stop)]
    assert all((b == b.flatten()[0]).all() for b in given), "entries are whole batches"
    return [b.flatten()[0].item() for b in given]


def test_until_it_is_full_batches_come_back_as_they_are() -> None:
    pool = ImagePool(5, seed=0)
    for i in range(5):
        new = batch(i)
        assert torch.equal(put(pool, new), new)


def test_size_0_gives_back_every_batch_whatever_its_shape() -> None:
    pool = ImagePool(0, seed=0)
    for size in (2, 3):
        new = batch(1, size)
        assert put(pool, new) is new
    assert pool.state_dict()["images"] is None


def test_a_full_pool_gives_the_new_batch_or_an_earlier_one_that_it_replaces() -> None:
    pool = ImagePool(4, seed=0)
    held = set(numbers(pool, 0, 4))
    for i in range(4, 300):
        (given,) = numbers(pool, i, i + 1)
        if given != i:
            assert given in held, "an earlier batch that was not given out yet"
            held = held - {given} | {float(i)}
    images = pool.state_dict()["images"]
    assert images is not None
    assert set(images[:, 0, 0, 0, 0].tolist()) == held


def test_a_full_pool_swaps_every_other_batch_and_all_entries_alike() -> None:
    pool = ImagePool(4, seed=1)
    numbers(pool, 0, 4)
    swaps, entries = 0, torch.zeros(4)
    for i in range(4, 2004):
        before = pool.state_dict()["images"]
        (given,) = numbers(pool, i, i + 1)
        after = pool.state_dict()["images"]
        assert before is not None
        assert after is not None
        swaps += given != i
        entries += (before != after).flatten(1).any(1)
    assert swaps / 2000 == pytest.approx(0.5, abs=0.05)  # 4.5 standard deviations
    assert (entries / entries.sum() - 0.25).abs().max() < 0.06


def test_batches_given_back_do_not_change_when_the_pool_does() -> None:
    pool = ImagePool(1, seed=0)
    given = [put(pool, batch(i)) for i in range(50)]
    kept = [b.flatten()[0].item() for b in given]
    numbers(pool, 50, 100)
    assert [b.flatten()[0].item() for b in given] == kept


def test_changing_a_batch_later_does_not_change_the_pool() -> None:
    pool = ImagePool(1, seed=0)
    first = batch(1)
    put(pool, first)
    first.fill_(-1)
    assert -1 not in numbers(pool, 2, 20)


def test_what_it_stores_carries_no_gradient() -> None:
    pool = ImagePool(1, seed=0)
    given = [put(pool, batch(i).requires_grad_()) for i in range(20)]
    assert {b.requires_grad for b in given} == {False}


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    runs = [numbers(ImagePool(3, seed), 0, 40) for seed in (7, 7, 8)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seen", [0, 2, 5, 30])
def test_a_saved_pool_continues_exactly(seen: int, tmp_path: Path) -> None:
    pool = ImagePool(5, seed=3)
    numbers(pool, 0, seen)
    torch.save(pool.state_dict(), tmp_path / "pool.pt")
    want = numbers(pool, seen, seen + 60)
    loaded = ImagePool(5, seed=99)
    loaded.load_state_dict(torch.load(tmp_path / "pool.pt", weights_only=True), 2, CPU)
    assert numbers(loaded, seen, seen + 60) == want


def test_loading_forgets_what_the_pool_held() -> None:
    pool = ImagePool(2, seed=0)
    numbers(pool, 0, 9)
    pool.load_state_dict(ImagePool(2, seed=0).state_dict(), 2, CPU)
    assert numbers(pool, 0, 40) == numbers(ImagePool(2, seed=0), 0, 40)


def test_only_filled_entries_are_saved_and_a_state_does_not_follow_the_pool() -> None:
    pool = ImagePool(50, seed=0)
    numbers(pool, 0, 3)
    state = pool.state_dict()
    numbers(pool, 3, 10)
    assert state["images"] is not None
    assert state["images"].shape == (3, 2, 1, 2, 3)
    assert state["images"].untyped_storage().nbytes() == 3 * 12 * 4


def test_a_batch_of_another_shape_or_type_is_refused() -> None:
    pool = ImagePool(3, seed=0)
    put(pool, batch(0))
    with pytest.raises(ValueError, match=r"\(1, 1, 1, 2, 3\).*\(1, 2, 1, 2, 3\)"):
        put(pool, batch(1, size=1))
    with pytest.raises(ValueError, match="bfloat16"):
        put(pool, batch(1).bfloat16())


def test_a_state_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size 3.*size 4"):
        ImagePool(4, seed=0).load_state_dict(ImagePool(3, seed=0).state_dict(), 2, CPU)


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 must not be negative"):
        ImagePool(-1, seed=0)


def test_a_loaded_pool_keeps_its_place_in_memory_where_a_recorded_step_reads_it() -> None:
    pool = ImagePool(3, seed=0)
    numbers(pool, 0, 5)
    state = pool.state_dict()
    numbers(pool, 5, 9)
    assert pool.slots is not None
    place = pool.slots.data_ptr()
    pool.load_state_dict(state, 2, CPU)
    assert pool.slots.data_ptr() == place


class TestByImage:
    """CycleGAN's pool, whose entries are single images."""

    @staticmethod
    def images(start: int, count: int = 3) -> Tensor:
        return torch.arange(start, start + count).float().reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()

    def test_it_does_what_one_swap_after_another_would(self) -> None:
        pool, size, batch_size = ImagePool(4, seed=2, by="image"), 4, 3
        draws = torch.Generator().manual_seed(2)
        held: list[float] = []
        twice = 0
        for start in range(0, 300, batch_size):
            want, taken = [], list[int]()
            for new in range(start, start + batch_size):
                if len(held) < size:
                    held.append(new)
                    want.append(float(new))
                    continue
                entry = int(torch.randint(2 * size, (), generator=draws))
                if entry < size:
                    taken.append(entry)
                    want.append(float(held[entry]))
                    held[entry] = new
                else:
                    want.append(float(new))
            twice += len(taken) != len(set(taken))
            got = put(pool, self.images(start))
            assert got[:, 0, 0, 0].tolist() == want
            assert (got == got[:, :1, :1, :1]).all()
        assert twice > 5, "batches that swap one entry twice were among them"
        state = pool.state_dict()["images"]
        assert state is not None
        assert state[:, 0, 0, 0].tolist() == held

    def test_a_pool_that_does_not_divide_into_batches_fills_up_within_one(self) -> None:
        pool = ImagePool(4, seed=0, by="image")
        put(pool, self.images(0))
        put(pool, self.images(3))
        state = pool.state_dict()["images"]
        assert state is not None
        assert len(state) == 4

    def test_it_continues_exactly(self) -> None:
        pool = ImagePool(4, seed=5, by="image")
        for start in range(0, 30, 3):
            put(pool, self.images(start))
        loaded = ImagePool(4, seed=9, by="image")
        loaded.load_state_dict(pool.state_dict(), 3, CPU)
        for start in range(30, 90, 3):
            assert torch.equal(put(pool, self.images(start)), put(loaded, self.images(start)))
