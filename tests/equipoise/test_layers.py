"""Units of the networks: padding, norms over images and over workers, dropout, residual units, compiled tails.

This file is also the program of each of two workers (`python test_layers.py RANK FOLDER`), whose batch norms are held
to one process on the joined batch. Each leaves what it found in `rank-R.pt`.
"""

from __future__ import annotations

import copy
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from equipoise.nets.layers import (
    AlwaysDropout,
    Conv,
    Dropout,
    Residual,
    Tail,
    ToMap,
    Unit,
    Upsample,
    compile_tails,
    initialise_glorot,
    same_padding,
)
from equipoise.nets.norms import (
    BatchNorm,
    Domain,
    GroupNorm,
    InstanceNorm,
    SpectralNorm,
    encoder_norm,
    image_norm,
    is_channels_last,
)

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# --- two workers, and the one they are held to ------------------------------------------------------------------------


class Total(torch.autograd.Function):
    """The sum over workers; on the way back, the sum of gradients."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        return Total.forward(_ctx, gradients[0])


def total(x: Tensor) -> Tensor:
    summed: Tensor = Total.apply(x)  # type: ignore[no-untyped-call]
    return summed


def unequal() -> tuple[Tensor, Tensor]:
    """A joint batch of four maps whose halves differ in mean and spread, far from zero, and a weight for each value."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(4, 3, 5, 6, generator=g) * torch.tensor([1.0, 2.0, 0.1, 0.2]).view(4, 1, 1, 1)
    x += torch.tensor([10.0, 12.0, -3.0, -3.5]).view(4, 1, 1, 1)
    return x, torch.randn(4, 3, 5, 6, generator=g)


def normalised(norm: BatchNorm, part: slice, domain: Domain = "target") -> dict[str, Tensor]:
    """Two batches, the second shifted; values and gradients of the second, and what was kept of both."""
    norm.weight.data.copy_(torch.tensor([1.0, 2.0, 0.5]))
    x, weight = (t[part] for t in unequal())
    norm(x, domain)
    leaf = (x + 1).requires_grad_()
    out: Tensor = norm(leaf, domain)
    (out.square() * weight).sum().backward()
    assert leaf.grad is not None
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    found = {"out": out.detach(), "x": leaf.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return found | {name: buffer.clone() for name, buffer in norm.named_buffers()}


CASES: dict[str, Callable[[], BatchNorm]] = {
    "shared": lambda: BatchNorm(3),
    "per domain": lambda: BatchNorm(3, per_domain=True),
    "stale": lambda: BatchNorm(3, statistics="stale"),
}


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        found = {}
        for name, make in CASES.items():
            norm = make()
            norm.total = total
            found[name] = normalised(norm, slice(2 * rank, 2 * rank + 2), "translated")
        torch.save(found, folder / f"rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, two_ranks: Callable[..., None]
) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("workers")
    two_ranks(__file__, folder, patience_s=120)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1)]


class TestBatchNormOverWorkers:
    @pytest.mark.parametrize("name", CASES)
    def test_two_workers_normalise_as_one_process_does_on_the_joined_batch(
        self, name: str, found: list[dict[str, dict[str, Tensor]]]
    ) -> None:
        want, (one, other) = normalised(CASES[name](), slice(0, 4), "translated"), (f[name] for f in found)
        for key in ("out", "x"):
            torch.testing.assert_close(torch.cat([one[key], other[key]]), want[key], rtol=1e-5, atol=1e-5)
        for key in ("weight", "bias"):
            torch.testing.assert_close(one[key] + other[key], want[key], rtol=1e-5, atol=1e-5)
        for key in want.keys() - {"out", "x", "weight", "bias"}:
            torch.testing.assert_close(one[key], want[key], rtol=1e-5, atol=1e-5)
            assert torch.equal(one[key], other[key])

    def test_their_running_statistics_are_those_of_the_joined_batch(
        self, found: list[dict[str, dict[str, Tensor]]]
    ) -> None:
        x = unequal()[0].double().numpy()
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), ddof=1)
        kept = found[0]["per domain"]
        np.testing.assert_allclose(kept["translated_mean"], 0.1 * (0.9 * mean + mean + 1), rtol=1e-5)
        np.testing.assert_allclose(kept["translated_var"], 0.81 + 0.19 * var, rtol=1e-5)
        assert not kept["running_mean"].any(), "target images were not shown"

    def test_each_workers_own_statistics_are_others(self, found: list[dict[str, dict[str, Tensor]]]) -> None:
        alone = normalised(BatchNorm(3), slice(0, 2))
        assert (alone["out"] - found[0]["shared"]["out"]).abs().max() > 0.1

    def test_in_evaluation_nothing_is_exchanged(self) -> None:
        norm = BatchNorm(3).eval()
        norm.total = lambda x: pytest.fail("exchanged")
        x, _ = unequal()
        torch.testing.assert_close(norm(x), x / math.sqrt(1 + 1e-3))


class TestPadding:
    @pytest.mark.parametrize(
        ("side", "kernel", "stride", "zeros"),
        [
            (8, 3, 2, (0, 1)),
            (7, 3, 2, (1, 1)),
            (8, 3, 1, (1, 1)),
            (8, 7, 1, (3, 3)),
            (8, 4, 2, (1, 1)),
            (8, 1, 2, (0, 0)),
        ],
    )
    def test_zeros_follow_tensorflows_rule(self, side: int, kernel: int, stride: int, zeros: tuple[int, int]) -> None:
        assert same_padding(side, kernel, stride) == zeros

    def test_a_stride_two_convolution_pads_bottom_and_right_only(self) -> None:
        conv = Conv(1, 1, 3, stride=2, sigma=0.1)
        conv.weight.data.zero_()[0, 0, 0, 0] = 1  # picks the top left pixel of each window
        image = torch.arange(16.0).view(1, 1, 4, 4)
        assert conv(image)[0, 0].tolist() == [[0, 2], [8, 10]]
        conv.weight.data.zero_()[0, 0, 2, 2] = 1  # picks the bottom right one: outside for the last windows
        assert conv(image)[0, 0].tolist() == [[10, 0], [0, 0]]

    @pytest.mark.parametrize("memory", [torch.contiguous_format, LAST])
    def test_upsampling_is_the_adjoint_of_the_stride_two_convolution(self, memory: torch.memory_format) -> None:
        down, up = Conv(3, 2, 3, stride=2, sigma=1.0).double(), Upsample(2, 3, sigma=1.0).double()
        up.weight.data.copy_(down.weight.data)
        x, y = torch.randn(1, 3, 8, 6).double(), torch.randn(1, 2, 4, 3).double().to(memory_format=memory)
        assert up(y).shape == x.shape
        assert memory != LAST or is_channels_last(up(y))
        assert (down(x) * y).sum().item() == pytest.approx((x * up(y)).sum().item())

    def test_dilation_keeps_the_size(self) -> None:
        assert Conv(1, 2, 3, dilation=2, sigma=0.1)(torch.zeros(1, 1, 5, 6)).shape == (1, 2, 5, 6)


class TestToMap:
    def test_it_is_the_plain_convolution_in_value_and_gradient(self) -> None:
        conv = ToMap(3, 7, sigma=0.1, bias=True).double()
        assert conv.bias is not None
        conv.bias.data.fill_(0.3)
        x = torch.randn(2, 3, 8, 12).double().requires_grad_()
        pair = conv(x), F.conv2d(x, conv.weight, conv.bias, padding=3)
        weight = torch.randn(2, 1, 8, 12).double()
        grads = [torch.autograd.grad((out * weight).sum(), [x, conv.weight, conv.bias]) for out in pair]
        for one, other in zip((pair[0], *grads[0]), (pair[1], *grads[1]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class TestNorms:
    def test_instance_norm_is_affine_and_has_epsilon_1e_6(self) -> None:
        norm, x = InstanceNorm(2), 1e-3 * torch.randn(2, 2, 4, 4)
        norm.weight.data.copy_(torch.tensor([2.0, 3.0]))
        norm.bias.data.copy_(torch.tensor([-1.0, 0.5]))
        a = x.double().numpy()
        mean, var = a.mean((2, 3), keepdims=True), a.var((2, 3), keepdims=True)
        want = (a - mean) / np.sqrt(var + 1e-6) * np.array([2, 3]).reshape(1, 2, 1, 1)
        want += np.array([-1, 0.5]).reshape(1, 2, 1, 1)
        np.testing.assert_allclose(norm(x).detach().numpy(), want, atol=1e-5)

    def test_group_norm_takes_its_statistics_over_neighbouring_channels(self) -> None:
        norm, x = GroupNorm(6, most=4), torch.randn(2, 6, 3, 5)  # 4 does not divide 6: two groups of 3
        a = x.double().numpy().reshape(2, 2, 3 * 15)
        want = (a - a.mean(2, keepdims=True)) / np.sqrt(a.var(2, keepdims=True) + 1e-6)
        for y in (x, x.to(memory_format=LAST)):
            np.testing.assert_allclose(norm(y).detach().numpy(), want.reshape(2, 6, 3, 5), atol=1e-5)

    @pytest.mark.parametrize(("channels", "size"), [(16, 16), (512, 16), (8, 8), (10, 10), (38, 2), (19, 1), (77, 11)])
    def test_a_group_has_up_to_sixteen_channels(self, channels: int, size: int) -> None:
        norm = encoder_norm("group")(channels)
        assert isinstance(norm, GroupNorm)
        assert (norm.size, norm.groups) == (size, channels // size)

    @pytest.mark.parametrize("memory", [torch.contiguous_format, LAST])
    def test_instance_norm_is_pytorchs_in_value_and_gradient(self, memory: torch.memory_format) -> None:
        ours, theirs = InstanceNorm(3).double(), nn.InstanceNorm2d(3, eps=1e-6, affine=True).double()
        x = torch.randn(2, 3, 5, 7).double().to(memory_format=memory)
        grads = []
        for norm in (ours, theirs):
            leaf = x.clone().requires_grad_()
            out: Tensor = norm(leaf)
            out.pow(3).sum().backward()
            assert leaf.grad is not None
            grads.append((out, leaf.grad, norm.weight.grad, norm.bias.grad))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.parametrize("make", [InstanceNorm, GroupNorm])
    def test_group_norms_are_the_same_in_training_and_evaluation_and_for_each_domain(
        self, make: type[GroupNorm]
    ) -> None:
        norm, x = make(4), torch.randn(2, 4, 5, 5)
        assert torch.equal(norm.train()(x, "translated"), norm.eval()(x, "target"))
        assert not list(norm.buffers())

    @pytest.mark.parametrize("memory", [torch.contiguous_format, LAST])
    @pytest.mark.parametrize("make", [InstanceNorm, GroupNorm, BatchNorm])
    def test_bfloat16_maps_stay_so_in_their_format_with_statistics_in_float32(
        self, make: type[GroupNorm] | type[BatchNorm], memory: torch.memory_format
    ) -> None:
        norm = make(32)
        x = (torch.randn(2, 32, 8, 8) + 20).bfloat16().to(memory_format=memory)  # bfloat16 steps by 1/8 here
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = norm(x)
        assert out.dtype == torch.bfloat16
        assert out.is_contiguous(memory_format=memory)
        want = norm(x.float())
        assert (out.float() - want).abs().max() < 2**-7 * want.abs().max(), "no more than the output's rounding"

    def test_no_image_norm_is_the_identity(self) -> None:
        assert image_norm("none")(7) is None
        x = torch.rand(1, 2, 3, 3)
        assert torch.equal(Tail(image_norm("none")(2))(x.clone()), x)

    def test_batch_norm_has_epsilon_1e_3_and_moves_a_tenth_of_the_way_each_step(self) -> None:
        norm = BatchNorm(1)
        x = torch.tensor([0.0, 0.0, 0.2, 0.2]).view(1, 1, 2, 2)  # mean .1, variance .01; of a sample, .04 / 3
        assert norm(x).flatten()[3].item() == pytest.approx(0.1 / math.sqrt(0.01 + 1e-3), rel=1e-5)
        assert norm.running_mean.item() == pytest.approx(0.1 * 0.1)
        assert norm.running_var.item() == pytest.approx(0.9 + 0.1 * 0.04 / 3)
        norm.eval()
        want = (0.2 - 0.01) / math.sqrt(0.9 + 0.004 / 3 + 1e-3)
        assert norm(x).flatten()[3].item() == pytest.approx(want, rel=1e-5)

    def test_batch_norm_is_pytorchs_bit_for_bit(self) -> None:
        ours, theirs = BatchNorm(3), nn.BatchNorm2d(3, eps=1e-3, momentum=0.1)
        for _ in range(2):
            x = torch.randn(4, 3, 5, 7)
            assert torch.equal(ours(x), theirs(x))
        assert torch.equal(ours.running_mean, theirs.running_mean)  # type: ignore[arg-type]
        assert torch.equal(ours.running_var, theirs.running_var)  # type: ignore[arg-type]
        assert torch.equal(ours.eval()(x), theirs.eval()(x))

    def test_one_value_a_channel_has_no_spread_and_is_refused(self) -> None:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            BatchNorm(3)(torch.zeros(1, 3, 1, 1))


class TestSpectralNorm:
    @staticmethod
    def held(*shape: int) -> tuple[SpectralNorm, Tensor]:
        weight = torch.randn(shape).double()
        return SpectralNorm(weight), weight.requires_grad_()

    @pytest.mark.parametrize("shape", [(8, 3, 4, 4), (1, 16, 4, 4), (5, 1, 1, 1)])
    def test_it_divides_by_the_largest_singular_value_of_one_row_an_output(self, shape: tuple[int, ...]) -> None:
        norm, weight = self.held(*shape)
        for _ in range(200):
            held = norm(weight)
        largest = np.linalg.svd(weight.detach().numpy().reshape(shape[0], -1), compute_uv=False)[0]
        torch.testing.assert_close(held, weight / largest)

    def test_its_estimate_is_never_too_large_so_that_a_kernels_norm_is_1_or_a_little_more(self) -> None:
        for seed in range(20):
            torch.manual_seed(seed)
            norm, weight = self.held(32, 4, 4, 4)
            assert 1 - 1e-12 <= torch.linalg.matrix_norm(norm(weight).flatten(1), 2) <= 1.2

    def test_it_follows_weights_that_move(self) -> None:
        norm, weight = self.held(8, 3, 4, 4)
        before = norm(weight)
        for _ in range(200):
            held = norm(10 * weight.flip(0))
        torch.testing.assert_close(held, before.flip(0), atol=2e-2, rtol=0)
        assert torch.linalg.matrix_norm(held.flatten(1), 2).item() == pytest.approx(1)

    def test_evaluation_repeats_itself_and_training_turns_in_place(self) -> None:
        norm, weight = self.held(32, 4, 4, 4)
        begun, places = norm.left.clone(), [b.data_ptr() for b in norm.buffers()]
        norm.eval()
        assert torch.equal(norm(weight), norm(weight))
        assert torch.equal(norm.left, begun)
        norm.train()
        assert not torch.equal(norm(weight), norm(weight))
        assert not torch.equal(norm.left, begun)
        assert [b.data_ptr() for b in norm.buffers()] == places

    def test_two_uses_before_one_backward_each_have_their_own_gradient(self) -> None:
        norm, weight = self.held(6, 2, 3, 3)
        twin, pull = copy.deepcopy(norm), torch.randn(6, 2, 3, 3).double()
        first, second = norm(weight), norm(weight)
        (both,) = torch.autograd.grad((pull * (first + second)).sum(), weight)
        alone = [torch.autograd.grad((pull * twin(weight)).sum(), weight)[0] for _ in range(2)]
        torch.testing.assert_close(both, alone[0] + alone[1])

    def test_first_and_second_gradients_are_those_of_finite_differences(self) -> None:
        norm, weight = self.held(4, 2, 2, 2)
        norm.eval()  # one pair of vectors, or each evaluation is of another function
        assert torch.autograd.gradcheck(norm, weight)
        assert torch.autograd.gradgradcheck(norm, weight)

    def test_scale_has_no_effect_and_no_gradient(self) -> None:
        norm, weight = self.held(6, 2, 3, 3)
        for _ in range(200):
            norm(weight)
        held = norm.eval()(weight)
        torch.testing.assert_close(norm(3 * weight), held)
        (gradient,) = torch.autograd.grad((torch.randn_like(held) * held).sum(), weight)
        assert (gradient * weight).sum().item() == pytest.approx(0, abs=1e-12)


class TestBatchNormStatistics:
    def test_each_domain_has_its_own_while_scale_and_shift_are_shared(self) -> None:
        norm = encoder_norm("batch_per_domain")(2)
        assert isinstance(norm, BatchNorm)
        x = torch.randn(4, 2, 5, 5)
        norm(x + 10, "translated")
        assert norm.translated_mean.mean() > 0.9
        assert not norm.running_mean.any()
        assert (norm.running_var == 1).all()
        norm(x - 10, "target")
        assert norm.running_mean.mean() < -0.9
        assert norm.translated_mean.mean() > 0.9
        norm.eval()
        gap = norm(x, "target") - norm(x, "translated")
        assert gap.mean() > 1, "evaluation uses them too"
        assert [name for name, _ in norm.named_parameters()] == ["weight", "bias"]

    def test_shared_ones_do_not_tell_domains_apart(self) -> None:
        norms = BatchNorm(2), BatchNorm(2)
        x = torch.randn(4, 2, 5, 5)
        assert torch.equal(norms[0](x, "translated"), norms[1](x, "target"))
        assert torch.equal(norms[0].running_mean, norms[1].running_mean)
        assert len(list(norms[0].buffers())) == 2

    def test_stale_ones_never_move_so_that_only_training_is_normalised(self) -> None:
        norm, x = BatchNorm(2, statistics="stale"), 3 + 2 * torch.randn(4, 2, 5, 5)
        out = norm(x)
        assert out.mean().item() == pytest.approx(0, abs=1e-5)
        assert out.std().item() == pytest.approx(1, abs=0.02)
        assert torch.equal(out, BatchNorm(2)(x)), "training sees what correct batch norm sees"
        torch.testing.assert_close(norm.eval()(x), x / math.sqrt(1 + 1e-3))
        assert norm.running_mean.tolist() == [0, 0]
        assert norm.running_var.tolist() == [1, 1]

    def test_fixed_ones_normalise_nothing_in_training_either(self) -> None:
        norm, x = BatchNorm(2, statistics="fixed"), 3 + 2 * torch.randn(1, 2, 1, 1)
        for mode in (True, False):
            torch.testing.assert_close(norm.train(mode)(x), x / math.sqrt(1 + 1e-3))
        assert norm.running_mean.tolist() == [0, 0]
        assert norm.running_var.tolist() == [1, 1]


class TestUnits:
    @pytest.mark.parametrize(("inputs", "outputs", "first"), [(2, 4, 1), (2, 5, 1), (3, 3, 0)])
    def test_a_residual_units_shortcut_gets_zero_channels_on_both_sides(
        self, inputs: int, outputs: int, first: int
    ) -> None:
        unit = Residual(inputs, outputs, BatchNorm, sigma=0.01)
        last = unit.second.tail.norm
        assert isinstance(last, BatchNorm)
        last.weight.data.zero_()  # silences the body: only the shortcut is left
        x = torch.rand(1, inputs, 4, 4)
        want = torch.zeros(1, outputs, 4, 4)
        want[:, first : first + inputs] = x
        assert torch.equal(unit(x), want)

    @pytest.mark.parametrize("norm", [InstanceNorm, image_norm("none")])
    def test_a_residual_unit_rectifies_after_the_sum(self, norm: Any) -> None:
        unit = Residual(2, 2, norm, sigma=0.5)
        x = torch.randn(1, 2, 4, 4)
        normal = norm(2) or (lambda y: y)
        inner = F.relu(normal(F.conv2d(x, unit.first.conv.weight, padding=1)))
        want = F.relu(x + normal(F.conv2d(inner, unit.second.conv.weight, padding=1)))
        torch.testing.assert_close(unit(x.clone()), want)

    def test_a_residual_unit_cannot_lose_channels(self) -> None:
        with pytest.raises(ValueError, match="2 output channels"):
            Residual(4, 2, BatchNorm, sigma=0.01)

    def test_a_residual_unit_leaves_its_input_as_it_was(self) -> None:
        unit, x = Residual(2, 2, image_norm("none"), sigma=0.5), torch.randn(1, 2, 4, 4)
        before = x.clone()
        unit(x)
        assert torch.equal(x, before)

    def test_dropout_comes_between_convolution_and_norm(self) -> None:
        order: list[str] = []
        unit = Unit(Conv(1, 4, 3, sigma=0.1), InstanceNorm(4), dropout=Dropout(0.5), slope=0.2)
        assert unit.dropout is not None
        assert unit.tail.norm is not None
        for name, module in (("conv", unit.conv), ("drop", unit.dropout), ("norm", unit.tail.norm)):
            module.register_forward_hook(lambda _m, _i, _o, name=name: order.append(name))
        out = unit(torch.randn(1, 1, 8, 8))
        assert order == ["conv", "drop", "norm"]
        assert out.min() < 0 < out.max(), "a leaky ReLU lets negatives through"


class TestDropout:
    def test_a_quarter_of_the_values_is_dropped_and_the_rest_scaled(self) -> None:
        out = AlwaysDropout(0.25).eval()(torch.ones(100_000))
        assert sorted(out.unique().tolist()) == pytest.approx([0, 4 / 3])
        assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)

    def test_plain_dropout_acts_in_training_only(self) -> None:
        drop, x = Dropout(0.25), torch.ones(1000)
        assert (drop(x) == 0).any()
        assert torch.equal(drop.eval()(x), x)

    def test_precision_and_memory_format_stay_and_do_not_change_what_is_dropped(self) -> None:
        drop, x = Dropout(0.25), torch.randn(2, 8, 6, 6).bfloat16()
        torch.manual_seed(1)
        want = F.dropout(x.float(), 0.25)
        for memory in (torch.contiguous_format, LAST):
            torch.manual_seed(1)
            assert torch.equal(drop(x.float().to(memory_format=memory)), want)
            torch.manual_seed(1)
            out = drop(x.to(memory_format=memory))
            assert torch.equal(out, want.bfloat16())
            assert out.is_contiguous(memory_format=memory)


class TestGlorot:
    @pytest.mark.parametrize(
        ("conv", "fans"),
        [
            (Conv(8, 32, 3, sigma=1.0, bias=True), 9 * (8 + 32)),
            (Conv(16, 64, 1, sigma=1.0), 16 + 64),
            (Upsample(32, 16, sigma=1.0), 9 * (32 + 16)),
        ],
    )
    def test_weights_are_uniform_within_the_bound_of_both_fans(self, conv: Conv | Upsample, fans: int) -> None:
        if conv.bias is not None:
            conv.bias.data.fill_(1.0)
        initialise_glorot(conv)
        bound, weight = math.sqrt(6 / fans), conv.weight.detach()
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert (weight.abs() < bound / 2).float().mean().item() == pytest.approx(0.5, abs=0.06), "flat, not a bell"
        assert conv.bias is None or not conv.bias.any()


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # of torch's own modules, when they load
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of the compiler's own looking, which it hides
class TestCompiledTails:
    """Only these tests call the compiler; each tail is small."""

    @pytest.fixture(autouse=True)
    @staticmethod
    def settings() -> Iterator[None]:
        torch._dynamo.reset()
        counters.clear()
        with torch._functorch.config.patch(donated_buffer=True):  # torch's default; put back afterwards
            yield

    @staticmethod
    def found(tail: nn.Module, x: Tensor, *more: Any) -> list[Tensor]:
        """Value, then twice the gradients through the same graph, as the step takes them."""
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        shortcut = more[-1].clone().requires_grad_() if more else None
        out: Tensor = tail(leaf, *more[:-1], shortcut) if more else tail(leaf)
        wanted = [t for t in (leaf, shortcut, *tail.parameters()) if t is not None]
        first = torch.autograd.grad(out.float().square().sum(), wanted, retain_graph=True)
        second = torch.autograd.grad(out.float().sin().sum(), wanted)
        return [out.detach(), *first, *second]

    @pytest.mark.parametrize(("make", "dtype"), [(InstanceNorm, torch.float32), (BatchNorm, torch.bfloat16)])
    def test_they_equal_eager_forward_and_twice_backward(
        self, make: type[InstanceNorm] | type[BatchNorm], dtype: torch.dtype
    ) -> None:
        norm = make(6)
        norm.weight.data.uniform_(0.5, 1.5)
        eager, compiled = Tail(norm), Tail(norm)
        compile_tails(compiled)
        x = torch.randn(2, 6, 7, 9).to(dtype).to(memory_format=LAST)
        shortcut = torch.randn(2, 4, 7, 9).to(dtype).to(memory_format=LAST)  # narrower: padded inside
        want, got = (self.found(tail, x, "target", shortcut) for tail in (eager, compiled))
        tolerance = 2e-5 if dtype == torch.float32 else 2e-2
        for one, other in zip(got, want, strict=True):
            assert one.dtype == other.dtype
            assert (one - other).float().norm() <= tolerance * other.float().norm()
        assert is_channels_last(got[0])
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]

    def test_a_hook_over_workers_is_called_from_compiled_code(self) -> None:
        norm = BatchNorm(3)
        tail = Tail(norm)
        x, _ = unequal()
        want = self.found(tail, x)
        called = list[int]()

        @torch.compiler.disable  # type: ignore[untyped-decorator]  # as `Sifa.join_statistics` does
        def total(sums: Tensor) -> Tensor:
            called.append(sums.numel())
            return 1 * sums

        norm.total = total
        counters.clear()
        compile_tails(tail)
        for one, other in zip(self.found(tail, x), want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)
        assert called == [7]
        assert counters["stats"]["unique_graphs"] > 0
