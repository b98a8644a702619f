"""Games against values worked out by hand, against a few lines of numpy, and on two real processes against one.

This file is also the program that each rank runs (`python test_games.py RANK FOLDER`): it leaves what it found in
`rank-R.pt`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from equipoise.config import AdversarialName, LossConfig
from equipoise.config_game import CriticConfig
from equipoise.games import GAMES, Game, game, lsgan, ns
from equipoise.losses import Total, here
from equipoise.ranks import Ranks

Array = NDArray[np.float64]
Reference = Callable[[Array, Array], float]
LOG2 = math.log(2)
NAMES: tuple[AdversarialName, ...] = get_args(AdversarialName)
EVERY = pytest.mark.parametrize("name", NAMES)


def made(name: AdversarialName, total: Total = here) -> Game:
    return game(LossConfig(adversarial=name), CriticConfig(), total)


# --- the formulas once more, in numpy ---------------------------------------------------------------------------------


def sp(z: Array) -> Array:
    return np.logaddexp(0, z)


def average(x: Array, y: Array, margin: float) -> float:
    """Relativistic average least squares: x is to lie `margin` above the mean of y, and y as far below that of x."""
    return float((np.mean((x - y.mean() - margin) ** 2) + np.mean((y - x.mean() + margin) ** 2)) / 2)


def mean(values: Array) -> float:
    return float(values.mean())


REFERENCES: dict[AdversarialName, tuple[Reference, Reference]] = {
    "lsgan": (lambda x, y: 0.5 * mean((x - 1) ** 2) + 0.5 * mean(y**2), lambda x, y: mean((y - 1) ** 2)),
    "ns": (lambda x, y: mean(sp(-x)) + mean(sp(y)), lambda x, y: mean(sp(-y))),
    "hinge": (lambda x, y: mean(np.maximum(1 - x, 0)) + mean(np.maximum(1 + y, 0)), lambda x, y: -mean(y)),
    "ra_lsgan": (lambda x, y: average(x, y, 1), lambda x, y: average(x, y, -1)),
    "rp": (lambda x, y: mean(sp(y - x)), lambda x, y: mean(sp(x - y))),
    "wgan_gp": (lambda x, y: mean(y) - mean(x), lambda x, y: -mean(y)),
}


# --- a rank -----------------------------------------------------------------------------------------------------------


def logits(batch: int = 4) -> tuple[Tensor, Tensor]:
    """Of real and fake (B, 1, 5, 4); the halves of the joint batch have very different means."""
    g = torch.Generator().manual_seed(1)
    level = torch.linspace(-2, 1.5, batch, dtype=torch.float64).view(-1, 1, 1, 1)
    real, fake = (torch.randn(batch, 1, 5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    return real + level, fake - 0.5 * level


def half(rank: int) -> slice:
    return slice(2 * rank, 2 * rank + 2)


def both(game: Game) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return {"critic": game.critic, "generator": game.generator}


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        ranks, out = Ranks(), {}
        for name in NAMES:
            for side, loss in both(made(name, ranks.total)).items():
                real, fake = (x[half(rank)] for x in logits())
                factor = torch.ones((), dtype=torch.float64, requires_grad=True)  # a parameter that all ranks share
                value = loss(real * factor, fake * factor)
                (shared,) = torch.autograd.grad(value, factor)
                out[f"{name} {side}"] = torch.stack(ranks.average([value, shared]))
        torch.save(out, folder / f"rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))


# --- the tests --------------------------------------------------------------------------------------------------------


class TestTable:
    def test_it_has_every_name_that_a_config_takes_and_cannot_be_changed(self) -> None:
        assert tuple(GAMES) == NAMES == tuple(REFERENCES)
        with pytest.raises(TypeError):
            GAMES["rp"] = GAMES["ns"]  # type: ignore[index]

    def test_the_relativistic_games_are_those_whose_generator_reads_real_logits(self) -> None:
        _, fake = logits()
        for name in NAMES:
            value = made(name).generator(torch.full_like(fake, math.nan), fake)
            assert made(name).relative == value.isnan().item() == (name in ("ra_lsgan", "rp")), name


class TestValues:
    @pytest.mark.parametrize(
        ("name", "critic", "generator"),
        [
            # real (2, .5), fake (0, -1): means 1.25 and -.5, differences 2 and 1.5
            ("lsgan", 0.5 * ((1 + 0.25) / 2 + (0 + 1) / 2), (1 + 4) / 2),
            ("ns", (math.log1p(math.exp(-2)) + math.log1p(math.exp(-0.5)) + LOG2 + math.log1p(math.exp(-1))) / 2, None),
            ("hinge", (0 + 0.5) / 2 + (1 + 0) / 2, 0.5),
            ("ra_lsgan", 0.5 * ((1.5**2 + 0) / 2 + (0.25**2 + 1.25**2) / 2), None),
            ("ra_lsgan", None, 0.5 * ((3.5**2 + 2**2) / 2 + (2.25**2 + 3.25**2) / 2)),
            ("rp", (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1.5))) / 2, None),
            ("rp", None, (math.log1p(math.exp(2)) + math.log1p(math.exp(1.5))) / 2),
            ("wgan_gp", -0.5 - 1.25, 0.5),
        ],
    )
    def test_they_are_those_worked_out_by_hand(
        self, name: AdversarialName, critic: float | None, generator: float | None
    ) -> None:
        real, fake = torch.tensor([2.0, 0.5]), torch.tensor([0.0, -1.0])
        for side, want in ((made(name).critic, critic), (made(name).generator, generator)):
            assert want is None or side(real, fake).item() == pytest.approx(want, abs=1e-6)

    @EVERY
    def test_they_are_those_of_numpy_as_scalars(self, name: AdversarialName) -> None:
        real, fake = logits(6)
        for side, reference in zip(both(made(name)).values(), REFERENCES[name], strict=True):
            want = reference(real.numpy(), fake.numpy())
            assert side(real, fake).shape == ()
            assert side(real, fake).item() == pytest.approx(want, abs=1e-12)
            assert side(real.float(), fake.float()).item() == pytest.approx(want, abs=1e-6)

    @EVERY
    def test_gradients_are_numpys_finite_differences(self, name: AdversarialName) -> None:
        real, fake = (x.requires_grad_() for x in logits(2))
        critic, generator = REFERENCES[name]

        def differences(reference: Reference, of: int) -> Array:
            points = [real.detach().numpy(), fake.detach().numpy()]
            found = np.zeros_like(points[of])
            for index in np.ndindex(found.shape):
                there, back = ([p.copy() for p in points] for _ in range(2))
                there[of][index] += 1e-6
                back[of][index] -= 1e-6
                found[index] = (reference(there[0], there[1]) - reference(back[0], back[1])) / 2e-6
            return found

        for got, of in zip(torch.autograd.grad(made(name).critic(real, fake), [real, fake]), (0, 1), strict=True):
            np.testing.assert_allclose(got.numpy(), differences(critic, of), rtol=1e-5, atol=1e-9)
        (got,) = torch.autograd.grad(made(name).generator(real, fake), fake)
        np.testing.assert_allclose(got.numpy(), differences(generator, 1), rtol=1e-5, atol=1e-9)


@EVERY
class TestSides:
    def test_the_critic_pulls_real_up_and_fake_down_and_the_generator_fake_up(self, name: AdversarialName) -> None:
        real, fake = (torch.tensor([value], requires_grad=True) for value in (0.4, 0.3))
        up, down = torch.autograd.grad(made(name).critic(real, fake), [real, fake])
        assert up.item() < 0 < down.item()
        assert torch.autograd.grad(made(name).generator(real, fake), fake)[0].item() < 0

    def test_the_generators_gradient_reaches_the_fake_alone(self, name: AdversarialName) -> None:
        real, fake = (x.requires_grad_() for x in logits())
        made(name).generator(real, fake).backward()
        assert real.grad is None
        assert fake.grad is not None
        assert fake.grad.abs().sum() > 0

    def test_half_precision_logits_are_averaged_in_float32(self, name: AdversarialName) -> None:
        real, fake = (x.bfloat16() for x in logits(8))
        for side in both(made(name)).values():
            assert side(real, fake).dtype == torch.float32
            assert side(real, fake) == side(real.float(), fake.float())

    @pytest.mark.parametrize("poisoned", [0, 1])
    def test_one_nan_among_the_logits_gives_nan(self, name: AdversarialName, poisoned: int) -> None:
        both = logits()
        both[poisoned][1, 0, 2, 2] = math.nan
        assert made(name).critic(*both).isnan()
        assert made(name).generator(*both).isnan() or (poisoned == 0 and not made(name).relative)

    def test_values_and_gradients_are_finite_at_extreme_logits(self, name: AdversarialName) -> None:
        far = torch.tensor([1e4, -1e4, 0.0])
        real, fake = (x.clone().requires_grad_() for x in (far, far.flip(0)))
        for side in both(made(name)).values():
            value = side(real, fake)
            found = torch.autograd.grad(value, [real, fake], allow_unused=True)
            assert value.isfinite()
            assert all(g is None or g.isfinite().all() for g in found)

    def test_it_needs_no_look_at_data_on_the_way(self, name: AdversarialName) -> None:
        # Tensors without values: what asks for one, in a branch, a size or by `item`, is an error.
        real, fake = (x.to("meta").requires_grad_() for x in logits())
        for side in both(made(name)).values():
            assert torch.autograd.grad(side(real, fake), fake)[0].shape == fake.shape


class TestLeastSquaresTargets:
    def test_minus_1_1_and_0_by_hand(self) -> None:
        # real (2, .5) wants 1; fake (0, -1) is to be told -1, and its maker wants 0.
        real, fake = torch.tensor([2.0, 0.5]), torch.tensor([0.0, -1.0])
        chosen = lsgan(fake=-1.0, real=1.0, wanted=0.0)
        assert chosen.critic(real, fake).item() == 0.5 * ((1 + 0.25) / 2 + (1 + 0) / 2)
        assert chosen.generator(real, fake).item() == (0 + 1) / 2

    def test_each_side_is_0_at_its_own_targets_and_only_there(self) -> None:
        chosen = lsgan(fake=-0.5, real=0.75, wanted=2.0)
        a, b, c = (torch.full((3,), value) for value in (-0.5, 0.75, 2.0))
        assert chosen.critic(b, a) == 0
        assert chosen.generator(b, c) == 0
        others = [chosen.critic(a, a), chosen.critic(b, b), chosen.generator(b, a), chosen.generator(b, b)]
        assert min(others) > 0.5

    def test_a_config_sets_them_and_by_default_they_are_the_published_ones(self) -> None:
        real, fake = torch.tensor([2.0, 0.5]), torch.tensor([0.0, -1.0])

        def told(chosen: Game) -> tuple[float, float]:
            return chosen.critic(real, fake).item(), chosen.generator(real, fake).item()

        config = LossConfig(lsgan_fake=-1.0, lsgan_real=1.0, lsgan_wanted=0.0)
        assert told(game(config, CriticConfig())) == told(lsgan(fake=-1.0, real=1.0, wanted=0.0))
        assert told(made("lsgan")) == told(lsgan()) == (0.5625, 2.5)


class TestSmoothing:
    def test_real_patches_are_to_be_called_real_with_less_than_1_and_fake_ones_fake_with_1(self) -> None:
        # -.9 log s(2) - .1 log s(-2), and -log s(-.5) for the fake one
        real, fake = torch.tensor([2.0]), torch.tensor([0.5])
        want = 0.9 * math.log1p(math.exp(-2)) + 0.1 * math.log1p(math.exp(2)) + math.log1p(math.exp(0.5))
        config = LossConfig(adversarial="ns"), CriticConfig(smoothing=0.1)
        assert game(*config).critic(real, fake).item() == pytest.approx(want, abs=1e-6)
        assert game(*config).generator(real, fake) == ns().generator(real, fake), "one side only"

    def test_the_critic_rests_where_it_says_just_that(self) -> None:
        real = torch.tensor([math.log(0.8 / 0.2)], dtype=torch.float64, requires_grad=True)  # s(real) = .8
        (pull,) = torch.autograd.grad(ns(smoothing=0.2).critic(real, torch.zeros(1)), real)
        assert pull.item() == pytest.approx(0, abs=1e-15)
        (pull,) = torch.autograd.grad(ns().critic(real, torch.zeros(1)), real)
        assert pull.item() == pytest.approx(-0.2)


class TestRelativity:
    @pytest.mark.parametrize("name", ["ra_lsgan", "rp", "wgan_gp"])
    def test_a_critic_gains_nothing_by_raising_all_logits(self, name: AdversarialName) -> None:
        real, fake = logits()
        torch.testing.assert_close(made(name).critic(real + 7, fake + 7), made(name).critic(real, fake))

    def test_rp_pairs_patches_and_ra_lsgan_does_not(self) -> None:
        real, fake = logits()
        for name, paired in (("rp", True), ("ra_lsgan", False)):
            shuffled = made(name).critic(real, fake.flip(0))  # type: ignore[arg-type]
            there = made(name).critic(real, fake)  # type: ignore[arg-type]
            assert (abs(shuffled - there) > 1e-3) == paired, name

    def test_in_ra_lsgan_one_exchange_a_side_carries_both_sums_and_their_number(self) -> None:
        real, fake = logits()
        seen: list[Tensor] = []

        def total(sums: Tensor) -> Tensor:
            seen.append(sums.detach())
            return sums

        for name in NAMES:
            for side in both(made(name, total)).values():
                side(real, fake)
        want = torch.stack([real.sum(), fake.sum(), torch.tensor(80.0, dtype=torch.float64)])
        assert len(seen) == 2
        torch.testing.assert_close(torch.stack(seen), want.expand(2, 3))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, two_ranks: Callable[..., None]) -> tuple[dict[str, Any], ...]:
    """What two real processes found, each on its half of the joint batch."""
    folder = tmp_path_factory.mktemp("games")
    two_ranks(__file__, folder, patience_s=120)
    return tuple(torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))


@pytest.mark.parametrize("side", ["critic", "generator"])
@EVERY
def test_the_mean_of_two_ranks_values_and_gradients_is_that_of_the_joint_batch(
    pair: tuple[dict[str, Any], ...], name: AdversarialName, side: str
) -> None:
    real, fake = logits()
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = both(made(name))[side]
    value = loss(real * factor, fake * factor)
    (shared,) = torch.autograd.grad(value, factor)
    if name == "ra_lsgan":
        alone = torch.stack([loss(real[half(rank)], fake[half(rank)]) for rank in (0, 1)]).mean()
        assert abs(alone - value.detach()) > 0.01, "ranks by themselves must differ from the whole in this test"
    for found in pair:
        torch.testing.assert_close(found[f"{name} {side}"], torch.stack([value.detach(), shared]))
