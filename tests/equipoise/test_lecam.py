"""LeCam's term by hand, its running means, and two real processes against one.

This file is also the program that each rank runs (`python test_lecam.py RANK FOLDER`): it leaves what it found in
`rank-R.pt`.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.lecam import LeCam
from equipoise.losses import Total, here
from equipoise.ranks import Ranks

CPU = torch.device("cpu")


def steps() -> list[tuple[Tensor, Tensor]]:
    """Three steps' real and fake logits of a joint batch of four whose halves differ."""
    g = torch.Generator().manual_seed(1)
    level = torch.tensor([2.0, 1.5, -0.5, -1.0], dtype=torch.float64).view(4, 1, 1, 1)
    draw = torch.randn(3, 2, 4, 1, 3, 3, generator=g, dtype=torch.float64)
    return [(real + level, fake - level) for real, fake in draw]


def half(rank: int) -> slice:
    return slice(2 * rank, 2 * rank + 2)


def followed(part: slice, total: Total) -> list[Tensor]:
    """Value, gradient by a shared factor and means after each step."""
    lecam, found = LeCam(("t",), CPU), []
    for real, fake in steps():
        factor = torch.ones((), dtype=torch.float64, requires_grad=True)
        value = lecam.term("t", real[part] * factor, fake[part] * factor, total)
        (gradient,) = torch.autograd.grad(value, factor)
        found += [value.detach(), gradient, lecam.tensors()[0].clone()]
    return found


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        ranks = Ranks()
        found = followed(half(rank), ranks.total)
        means = found[2::3]
        found = [x if n % 3 == 2 else ranks.average([x])[0] for n, x in enumerate(found)]
        torch.save({"found": found, "means": means}, folder / f"rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))


def say(lecam: LeCam, real: list[float], fake: list[float], name: str = "t") -> float:
    return lecam.term(name, torch.tensor(real), torch.tensor(fake), here).item()


class TestByHand:
    def test_each_side_is_held_to_the_running_mean_of_the_other_and_the_first_step_to_its_own(self) -> None:
        lecam = LeCam(("t",), CPU)
        # Means 2 and -1: ((1+1)^2 + (3+1)^2) / 2 + ((0-2)^2 + (-2-2)^2) / 2
        assert say(lecam, [1.0, 3.0], [0.0, -2.0]) == 20
        assert say(lecam, [4.0, 4.0], [1.0, 1.0]) == (4 + 1) ** 2 + (1 - 2) ** 2, "of the steps before alone"
        # They are now .99 x 2 + .01 x 4 = 2.02 and .99 x -1 + .01 x 1 = -.98.
        assert say(lecam, [0.0], [0.0]) == pytest.approx(0.98**2 + 2.02**2)
        assert lecam.state_dict()["t"].tolist() == pytest.approx([0.99 * 2.02, -0.99 * 0.98, 1])

    def test_games_keep_means_of_their_own(self) -> None:
        lecam = LeCam(("t", "s"), CPU)
        say(lecam, [5.0], [5.0], "t")
        assert say(lecam, [1.0], [0.0], "s") == 2
        assert say(lecam, [0.0], [0.0], "t") == 50
        with pytest.raises(KeyError):
            say(lecam, [0.0], [0.0], "p")

    def test_means_are_constants_also_in_the_first_step(self) -> None:
        real, fake = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([0.0, -2.0], requires_grad=True)
        LeCam(("t",), CPU).term("t", real, fake, here).backward()
        assert real.grad is not None
        assert fake.grad is not None
        assert real.grad.tolist() == [1 + 1, 3 + 1]  # 2 (D(x) + 1) / 2
        assert fake.grad.tolist() == [0 - 2, -2 - 2]

    def test_sides_may_differ_in_number(self) -> None:
        assert say(LeCam(("t",), CPU), [1.0, 3.0, 5.0], [0.0]) == pytest.approx((1 + 9 + 25) / 3 + 9)

    def test_half_precision_logits_are_averaged_in_float32(self) -> None:
        real, fake = (x.bfloat16() for x in steps()[0])
        value = LeCam(("t",), CPU).term("t", real, fake, here)
        assert value.dtype == torch.float32
        assert value == LeCam(("t",), CPU).term("t", real.float(), fake.float(), here)

    def test_a_nan_is_not_forgotten(self) -> None:
        lecam = LeCam(("t",), CPU)
        say(lecam, [1.0], [0.0])
        assert math.isnan(say(lecam, [math.nan], [0.0]))
        assert math.isnan(say(lecam, [1.0], [0.0]))


class TestState:
    def test_it_moves_in_place_so_that_a_recorded_step_finds_it(self) -> None:
        lecam = LeCam(("t", "s"), CPU)
        places = [x.data_ptr() for x in lecam.tensors()]
        state = copy.deepcopy(lecam.state_dict())
        say(lecam, [1.0], [0.0])
        lecam.load_state_dict(state)
        assert [x.data_ptr() for x in lecam.tensors()] == places
        assert not any(x.any() for x in lecam.tensors())
        assert len(places) == 2

    def test_a_run_that_is_continued_says_what_one_that_never_stopped_does(self) -> None:
        lecam, later = LeCam(("t",), CPU), LeCam(("t",), CPU)
        for real, fake in steps()[:2]:
            lecam.term("t", real, fake, here)
        later.load_state_dict(copy.deepcopy(lecam.state_dict()))
        assert later.term("t", *steps()[2], here) == lecam.term("t", *steps()[2], here)

    def test_that_of_other_games_is_refused(self) -> None:
        with pytest.raises(KeyError, match=r"'p_low'.*must be of.*'t'"):
            LeCam(("t",), CPU).load_state_dict(LeCam(("t", "p_low"), CPU).state_dict())

    def test_it_needs_no_look_at_data_on_the_way(self) -> None:
        # Tensors without values: what asks for one, in a branch, a size or by `item`, is an error.
        real, fake = (x.to("meta").requires_grad_() for x in steps()[0])
        value = LeCam(("t",), torch.device("meta")).term("t", real, fake, here)
        assert torch.autograd.grad(value, real)[0].shape == real.shape


def test_two_ranks_hold_the_means_of_the_joint_batch_and_their_mean_is_its_term(
    tmp_path: Path, two_ranks: Callable[..., None]
) -> None:
    two_ranks(__file__, tmp_path, patience_s=120)
    want = followed(slice(None), here)
    own = followed(half(0), here)
    assert abs(own[2][0] - want[2][0]) > 0.1, "halves must differ in this test"
    for rank in (0, 1):
        found: dict[str, Any] = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["found"], want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["means"], want[2::3], rtol=1e-6, atol=1e-6)
