"""Penalties against closed forms, against finite differences, and on two real processes against one.

This file is also the program that each rank runs (`python test_penalties.py RANK FOLDER`): it leaves what it found in
`rank-R.pt`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from equipoise.config import RunConfig
from equipoise.config_game import CriticConfig, PenaltyName
from equipoise.nets import Critic
from equipoise.nets.layers import compile_tails
from equipoise.nets.norms import GroupNorm, InstanceNorm, SpectralNorm, hold_spectrally, is_channels_last
from equipoise.penalties import PENALTIES, Judge, penalty
from equipoise.ranks import Ranks
from equipoise.referee import Match, Referee
from equipoise.schedules import rates

NAMES: tuple[PenaltyName, ...] = ("r1", "r1r2", "gp0_mix", "gp")
EVERY = pytest.mark.parametrize("name", NAMES)
NORMS = ("none", "instance", "spectral", "both")
LAST = torch.channels_last


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def critic(norm: str = "both", dtype: torch.dtype = torch.float64) -> Critic:
    """A narrow one whose layers are all heard in its logits."""
    torch.manual_seed(1)
    made = Critic(1, width=0.05, norm="instance" if norm in ("instance", "both") else "none").to(dtype)
    for name, parameter in made.named_parameters():
        parameter.data.mul_(8 if parameter.dim() == 4 else 1).add_(0.1 if name.endswith("bias") else 0)
    if norm in ("spectral", "both"):
        hold_spectrally(made)
    return made


def images(batch: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Real and fake (B, 1, 16, 16); the second half of each is fainter."""
    g = torch.Generator().manual_seed(2)
    real, fake = (torch.rand(batch, 1, 16, 16, generator=g, dtype=torch.float64) * 2 - 1 for _ in range(2))
    faint = torch.linspace(1, 0.2, batch, dtype=torch.float64).view(-1, 1, 1, 1)
    return (faint * real).to(dtype), (0.5 * faint * fake).to(dtype)


def by_weights(name: PenaltyName, judged: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Value, and gradient by the critic's weights; what is random repeats."""
    torch.manual_seed(5)
    value = penalty(name, judged, real, fake)
    found = torch.autograd.grad(value, list(judged.parameters()), allow_unused=True)
    return value.detach(), [
        torch.zeros_like(p) if g is None else g for p, g in zip(judged.parameters(), found, strict=True)
    ]


# --- a rank -----------------------------------------------------------------------------------------------------------


def pairs(name: PenaltyName) -> tuple[Tensor, Tensor]:
    """The joint batch; where points are drawn between two images these are equal, so that all draws give the same."""
    real, fake = images()
    return (real, fake) if name in ("r1", "r1r2") else (real, real)


def half(rank: int) -> slice:
    return slice(2 * rank, 2 * rank + 2)


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        ranks, out = Ranks(), {}
        for name in NAMES:
            real, fake = (x[half(rank)] for x in pairs(name))
            value, gradients = by_weights(name, critic(), real, fake)
            out[name] = ranks.average([value, *gradients])
        torch.save(out, folder / f"rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))


# --- the tests --------------------------------------------------------------------------------------------------------


def quadratic(x: Tensor) -> Tensor:
    """D(x) = |x|^2 / 2, all in one patch: its slope at x is |x|."""
    return 0.5 * x.square().sum((1, 2, 3), keepdim=True)


class TestClosedForms:
    @pytest.mark.parametrize(("name", "want"), [("r1", 12.5), ("r1r2", 25.0), ("gp0_mix", 12.5), ("gp", 16.0)])
    def test_of_a_linear_critic_the_slope_is_the_length_of_its_weights_everywhere(
        self, name: PenaltyName, want: float
    ) -> None:
        weight = torch.tensor([3.0, 0.0, -4.0, 0.0]).view(1, 1, 2, 2).requires_grad_()  # of length 5
        real, fake = torch.randn(2, 7, 1, 2, 2).unbind()
        value = penalty(name, lambda x: (weight * x).sum((1, 2, 3), keepdim=True) + 3, real, fake)
        assert value.item() == pytest.approx(want)
        # By the weights: |w|^2 / 2 has the gradient w, and (|w| - 1)^2 has 2 (|w| - 1) w / |w|.
        factor = {"r1": 1, "r1r2": 2, "gp0_mix": 1, "gp": 2 * 4 / 5}[name]
        torch.testing.assert_close(torch.autograd.grad(value, weight)[0], factor * weight.detach())

    def test_of_a_quadratic_one_they_are_means_of_squared_lengths(self) -> None:
        real = torch.tensor([[3.0, 4.0], [0.0, 1.0]]).view(2, 1, 1, 2)
        fake = torch.tensor([[0.0, 2.0], [6.0, 8.0]]).view(2, 1, 1, 2)
        assert penalty("r1", quadratic, real, fake).item() == pytest.approx((25 + 1) / 2 / 2)
        assert penalty("r1r2", quadratic, real, fake).item() == pytest.approx((25 + 1) / 2 / 2 + (4 + 100) / 2 / 2)

    def test_gradients_of_all_patches_are_added_before_the_norm(self) -> None:
        def two_patches(x: Tensor) -> Tensor:
            return torch.stack([3 * x[:, 0, 0, 0], 4 * x[:, 0, 0, 1] - 1 * x[:, 0, 0, 0]], 1).view(-1, 1, 1, 2)

        x = torch.randn(5, 1, 1, 2)
        assert penalty("r1", two_patches, x, x).item() == pytest.approx((2**2 + 4**2) / 2)

    @pytest.mark.parametrize(("name", "want"), [("gp0_mix", 4 / 3 / 2), ("gp", 1 / 3)])
    def test_mixes_lie_uniformly_between_a_pair_one_share_an_image(self, name: PenaltyName, want: float) -> None:
        # Between 4 zeros and 4 ones at e the slope is 2 e: E (2 e)^2 = 4/3, and E (2 e - 1)^2 = 1/3.
        # A share for each pixel would make the second .09.
        real, fake = torch.ones(20_000, 1, 2, 2), torch.zeros(20_000, 1, 2, 2)
        assert penalty(name, quadratic, real, fake).item() == pytest.approx(want, rel=0.02)
        torch.manual_seed(3)
        share = torch.rand(20_000, 1, 1, 1)
        torch.manual_seed(3)
        slopes = 2 * share
        exact = 0.5 * slopes.square().mean() if name == "gp0_mix" else (slopes - 1).square().mean()
        assert penalty(name, quadratic, real, fake).item() == pytest.approx(exact.item(), rel=1e-5)

    def test_no_penalty_is_not_one(self) -> None:
        assert tuple(PENALTIES) == NAMES
        with pytest.raises(KeyError):
            penalty("none", quadratic, *images())


class TestRealCritics:
    @pytest.mark.parametrize("memory", [torch.contiguous_format, LAST])
    @pytest.mark.parametrize("norm", NORMS)
    @EVERY
    def test_the_gradient_by_the_weights_is_that_of_finite_differences(
        self, name: PenaltyName, norm: str, memory: torch.memory_format
    ) -> None:
        judged = critic(norm).to(memory_format=memory).eval()  # type: ignore[call-overload]
        real, fake = images()
        value, gradients = by_weights(name, judged, real, fake)
        assert value > 0.01
        begun = [p.detach().clone() for p in judged.parameters()]
        for seed in range(3):
            torch.manual_seed(20 + seed)
            ways = [p.std() * torch.randn_like(p) if p.dim() == 4 else torch.randn_like(p) for p in begun]
            there = []
            for step in (1e-6, -1e-6):
                for p, was, way in zip(judged.parameters(), begun, ways, strict=True):
                    p.data.copy_(was + step * way)
                there.append(by_weights(name, judged, real, fake)[0])
            want = (there[0] - there[1]) / 2e-6
            got = torch.stack([(g * way).sum() for g, way in zip(gradients, ways, strict=True)]).sum()
            assert got.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-6)

    @EVERY
    def test_both_memory_formats_give_the_same(self, name: PenaltyName) -> None:
        found = []
        for memory in (torch.contiguous_format, LAST):
            judged = critic().to(memory_format=memory)  # type: ignore[call-overload]
            inner: list[Tensor] = []
            judged.body[1].register_forward_hook(lambda _m, _i, out, inner=inner: inner.append(out))
            found.append(by_weights(name, judged, *images()))
            assert is_channels_last(inner[0]) == (memory == LAST), "the test must meet both"
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)

    @EVERY
    def test_autocast_around_it_changes_nothing(self, name: PenaltyName) -> None:
        judged, (real, fake) = critic(dtype=torch.float32).eval(), images(dtype=torch.float32)
        want, (first, *_) = by_weights(name, judged, real, fake)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, (other, *_) = by_weights(name, judged, real, fake)
            assert judged(real).dtype == torch.bfloat16
        assert got.dtype == torch.float32
        assert torch.equal(got, want)
        assert torch.equal(first, other)

    @EVERY
    def test_half_precision_input_is_widened(self, name: PenaltyName) -> None:
        judged, (real, fake) = critic(dtype=torch.float32).eval(), images(dtype=torch.bfloat16)
        assert torch.equal(
            by_weights(name, judged, real, fake)[0], by_weights(name, judged, real.float(), fake.float())[0]
        )

    @EVERY
    def test_no_gradient_goes_to_what_is_shown(self, name: PenaltyName) -> None:
        real, fake = (x.requires_grad_() for x in images())
        penalty(name, critic(), real, fake).backward()
        assert real.grad is None
        assert fake.grad is None
        plain = images()
        penalty(name, critic(), *plain)
        assert not any(x.requires_grad for x in plain)

    @EVERY
    def test_it_needs_no_look_at_data_on_the_way(self, name: PenaltyName) -> None:
        judged = critic()
        # Tensors without values: what asks for one, in a branch or by `item`, is an error.
        with FakeTensorMode(allow_non_fake_inputs=True):
            real, fake = torch.zeros(2, 2, 1, 16, 16, dtype=torch.float64).unbind()
            _, gradients = by_weights(name, judged, real, fake)
        assert [g.shape for g in gradients] == [p.shape for p in judged.parameters()]

    def test_each_critic_is_asked_once_of_as_many_images_as_are_looked_at(self) -> None:
        for name, count in (("r1", 4), ("r1r2", 8), ("gp0_mix", 4), ("gp", 4)):
            asked: list[int] = []

            def judge(x: Tensor, asked: list[int] = asked) -> Tensor:
                asked.append(len(x))
                return quadratic(x)

            penalty(name, judge, *images())  # type: ignore[arg-type]
            assert asked == [count], name

    def test_one_of_a_critics_games_can_be_looked_at(self) -> None:
        both = Critic(1, 2, width=0.05).double()
        real, fake = images()

        def only(place: int) -> Judge:
            return lambda x: both(x)[:, place : place + 1]

        value = penalty("r1", only(1), real, fake)
        (last,) = torch.autograd.grad(value, both.body[-1].weight)  # type: ignore[arg-type]
        assert last[1].abs().sum() > 0
        assert not last[0].any(), "the other game's kernel has no part in it"


class TestEverySoManySteps:
    @pytest.mark.parametrize("every", [1, 4, 16])
    def test_the_mean_over_steps_of_value_and_gradient_is_that_of_a_penalty_at_each(self, every: int) -> None:
        config = RunConfig(critic=CriticConfig(penalty="r1", gamma=0.5, penalty_every=every))
        referee, weight = Referee.of(config, Ranks(), torch.device("cpu")), torch.tensor(3.0, requires_grad=True)
        x = torch.ones(2, 1, 2, 2)  # of slope 3 x 2: half its square is 18

        def judge(x: Tensor) -> Tensor:
            return weight * x.sum((1, 2, 3), keepdim=True)

        values, gradients = list[float](), list[float]()
        for number in range(1, 33):
            referee.set(rates(config, number, 1), number)
            _, signals = referee.judge({"t": Match(judge, x, x, judge(x), judge(x))})
            values.append(signals["critic/penalty_t"].item())
            if values[-1]:
                gradients.append(torch.autograd.grad(signals["critic/penalty_t"], weight)[0].item())
        assert sum(value > 0 for value in values) == 32 // every
        assert sum(values) / 32 == pytest.approx(0.5 * 18)
        assert sum(gradients) / 32 == pytest.approx(0.5 * 2 * 18 / 3)


class TestExtremes:
    @EVERY
    def test_one_nan_in_what_is_looked_at_gives_nan(self, name: PenaltyName) -> None:
        real, fake = images()
        real[2, 0, 3, 3] = math.nan
        assert penalty(name, critic(), real, fake).isnan()

    @EVERY
    def test_one_nan_among_the_weights_gives_nan(self, name: PenaltyName) -> None:
        judged = critic("none")
        judged.body[-1].weight.data[0, 0, 1, 1] = math.nan  # type: ignore[operator]
        assert penalty(name, judged, *images()).isnan()

    @EVERY
    def test_a_flat_critic_has_a_finite_gradient(self, name: PenaltyName) -> None:
        judged = critic("none")
        judged.body[-1].weight.data.zero_()  # type: ignore[operator]
        value, gradients = by_weights(name, judged, *images())
        assert value == (1 if name == "gp" else 0)
        assert all(g.isfinite().all() for g in gradients)

    def test_an_infinite_slope_is_not_hidden(self) -> None:
        x = torch.ones(2, 1, 1, 1)
        assert not penalty("gp", lambda x: x * math.inf, x, x).isfinite()


class TestSecondGradients:
    """Of the layers that critics are made of, by every input at once."""

    @pytest.mark.parametrize("memory", [torch.contiguous_format, LAST])
    @pytest.mark.parametrize("make", [InstanceNorm, lambda channels: GroupNorm(channels, most=2)])
    def test_of_norms_in_either_memory_format(
        self, make: Callable[[int], GroupNorm], memory: torch.memory_format
    ) -> None:
        norm = make(4).double()

        def normalised(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            laid = x.contiguous(memory_format=memory)
            out: Tensor = functional_call(norm, {"weight": weight, "bias": bias}, laid)
            return out

        given = [torch.randn(shape).double().requires_grad_() for shape in ((2, 4, 3, 2), (4,), (4,))]
        assert is_channels_last(given[0].contiguous(memory_format=memory)) == (memory == LAST)
        assert torch.autograd.gradcheck(normalised, given)
        assert torch.autograd.gradgradcheck(normalised, given)

    @pytest.mark.parametrize("memory", [torch.contiguous_format, LAST])
    @pytest.mark.parametrize("norm", NORMS)
    def test_of_a_whole_critic(self, norm: str, memory: torch.memory_format) -> None:
        judged = Critic(1, width=0.03, layers=2, norm="instance" if norm in ("instance", "both") else "none")
        judged = judged.double().eval()
        for parameter in judged.parameters():
            parameter.data.mul_(20 if parameter.dim() == 4 else 1)
        if norm in ("spectral", "both"):
            hold_spectrally(judged)
        judged.to(memory_format=memory)  # type: ignore[call-overload]
        names = [name for name, _ in judged.named_parameters()]

        def logits(x: Tensor, *weights: Tensor) -> Tensor:
            out: Tensor = functional_call(judged, dict(zip(names, weights, strict=True)), x)
            return out

        given = [torch.randn(1, 1, 4, 4).double().requires_grad_(), *judged.parameters()]
        assert torch.autograd.gradgradcheck(logits, given, fast_mode=True)

    def test_spectral_norm_turns_its_vectors_on_the_way(self) -> None:
        judged, (real, fake) = critic("spectral"), images()
        held = next(m for m in judged.modules() if isinstance(m, SpectralNorm))
        begun = held.left.clone()
        penalty("r1r2", judged, real, fake).backward()
        assert not torch.equal(held.left, begun)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # of torch's own modules, when they load
def test_compiled_tails_are_passed_by() -> None:
    """Compiled code has no second gradients; nothing is compiled here, so that no compiler is needed."""
    judged, (real, fake) = critic("instance", torch.float32), images(dtype=torch.float32)
    want, wanted = by_weights("r1r2", judged, real, fake)
    torch._dynamo.reset()
    counters.clear()
    with torch._functorch.config.patch(donated_buffer=True):  # put back afterwards
        compile_tails(judged)
        got, found = by_weights("r1r2", judged, real, fake)
    assert torch.equal(got, want)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert not counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, two_ranks: Callable[..., None]) -> tuple[dict[str, Any], ...]:
    """What two real processes found, each on its half of the joint batch."""
    folder = tmp_path_factory.mktemp("penalties")
    two_ranks(__file__, folder, patience_s=120)
    return tuple(torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))


@EVERY
def test_the_mean_of_two_ranks_values_and_gradients_is_that_of_the_joint_batch(
    pair: tuple[dict[str, Any], ...], name: PenaltyName
) -> None:
    value, gradients = by_weights(name, critic(), *pairs(name))
    alone = by_weights(name, critic(), *(x[half(0)] for x in pairs(name)))[0]
    assert abs(alone - value) > 1e-3 * value, "halves must differ in this test"
    for found in pair:
        for got, want in zip(found[name], [value, *gradients], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
