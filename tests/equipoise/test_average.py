"""The running mean of the weights: by hand, in place, bit for bit."""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
from torch import Tensor

from equipoise.average import Average
from equipoise.config import NetConfig
from equipoise.nets import Sifa

TINY = NetConfig(width=0.0625)


def make_net(seed: int = 0, config: NetConfig = TINY) -> Sifa:
    torch.manual_seed(seed)
    return Sifa(config).train()


def tensors(net: Sifa) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def critics(names: dict[str, Tensor]) -> set[str]:
    return {name for name in names if name.startswith("critic_")}


@torch.no_grad()
def moved(net: Sifa, seed: int) -> Sifa:
    """The same network after what stands for a step: other weights, and running statistics of another batch."""
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.add_(torch.randn(p.shape, generator=g), alpha=0.1)
    net.encoder(torch.rand(2, 1, 32, 32, generator=g) * 2 - 1)
    return net


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


class TestMean:
    @pytest.mark.parametrize(
        ("decay", "number", "share"), [(0.999, 1, 9 / 11), (0.999, 90, 9 / 100), (0.5, 90, 0.5), (0.999, 100_000, 1e-3)]
    )
    def test_after_step_n_it_goes_the_share_1_less_d_of_the_way_to_the_weights(
        self, decay: float, number: int, share: float
    ) -> None:
        net = make_net()
        before = tensors(net)
        average = Average(net, decay)
        after = tensors(moved(net, 1))
        average.follow(number)
        for name, mean in average.state_dict().items():
            want = before[name].double() + share * (after[name].double() - before[name].double())
            torch.testing.assert_close(mean.double(), want, rtol=1e-5, atol=1e-7)

    def test_two_steps_by_hand(self) -> None:
        net = make_net()
        weight = next(net.generator.parameters())
        average = Average(net, 0.2)
        for number, value in ((1, 11.0), (2, 22.0)):
            weight.data.fill_(value)
            average.follow(number)
        # 2/11 and 3/12 of the mean would stay; the first is less than the decay .2, the second is not
        start = next(make_net().generator.parameters()).detach()
        want = 0.2 * (2 / 11 * start + 9 / 11 * 11.0) + 0.8 * 22.0
        (name, *_) = (f"generator.{name}" for name, _ in net.generator.named_parameters())
        torch.testing.assert_close(average.state_dict()[name], want)

    def test_it_is_of_every_weight_and_running_statistic_but_the_critics(self) -> None:
        for config in (TINY, NetConfig(width=0.0625, low=False, encoder_norm="batch_per_domain")):
            net = make_net(config=config)
            names = set(Average(net, 0.9).state_dict())
            everything = net.state_dict()
            assert critics(everything)
            assert names == set(everything) - critics(everything)
            assert any(name.endswith("running_var") for name in names)

    def test_running_statistics_are_followed(self) -> None:
        net = make_net()
        before = tensors(net)
        average = Average(net, 0.5)
        moved(net, 1)
        average.follow(1000)
        statistics = [name for name in before if name.endswith("running_mean")]
        for name in statistics:
            assert not torch.equal(before[name], net.state_dict()[name])
            torch.testing.assert_close(average.state_dict()[name], (before[name] + net.state_dict()[name]) / 2)

    def test_following_leaves_the_network_and_its_gradients_alone(self) -> None:
        net = make_net()
        average = Average(net, 0.9)
        held = tensors(moved(net, 1))
        average.follow(1)
        assert_equal(tensors(net), held)
        assert all(p.requires_grad and p.grad is None for p in net.parameters())
        assert not any(mean.requires_grad for mean in average.state_dict().values())

    def test_a_weight_that_is_no_number_is_not_hidden(self) -> None:
        net = make_net()
        average = Average(net, 0.9)
        next(net.generator.parameters()).data.fill_(torch.nan)
        average.follow(1)
        assert sum(bool(mean.isnan().any()) for mean in average.state_dict().values()) == 1

    @pytest.mark.parametrize("decay", [0.0, 1.0, -0.1])
    def test_a_decay_that_is_no_mean_is_refused(self, decay: float) -> None:
        with pytest.raises(ValueError, match="between 0 and 1"):
            Average(make_net(), decay)


class TestShown:
    @staticmethod
    def followed() -> tuple[Sifa, Average]:
        net = make_net()
        average = Average(net, 0.9)
        moved(net, 1)
        average.follow(100)
        return net, average

    def test_the_network_holds_the_mean_and_its_own_critics_meanwhile_and_its_weights_again_afterwards(self) -> None:
        net, average = self.followed()
        raw = tensors(net)
        with average.shown():
            inside = tensors(net)
        assert_equal(tensors(net), raw)
        mean = average.state_dict()
        assert_equal({k: v for k, v in inside.items() if k in mean}, mean)
        assert_equal({k: inside[k] for k in critics(inside)}, {k: raw[k] for k in critics(raw)})
        assert not torch.equal(inside["generator.body.0.conv.weight"], raw["generator.body.0.conv.weight"])

    def test_all_of_it_happens_in_place(self) -> None:
        net, average = self.followed()
        where = {k: v.data_ptr() for k, v in net.state_dict().items()}
        with average.shown():
            assert {k: v.data_ptr() for k, v in net.state_dict().items()} == where
        assert {k: v.data_ptr() for k, v in net.state_dict().items()} == where

    def test_weights_come_back_after_an_error_which_is_not_hidden(self) -> None:
        net, average = self.followed()
        raw, mean = tensors(net), average.state_dict()
        with pytest.raises(RuntimeError, match="meanwhile"), average.shown():
            raise RuntimeError("meanwhile")
        assert_equal(tensors(net), raw)
        assert_equal(average.state_dict(), mean)

    def test_what_is_done_to_the_network_meanwhile_changes_neither_weights_nor_mean(self) -> None:
        net, average = self.followed()
        raw, mean = tensors(net), average.state_dict()
        with average.shown():
            moved(net, 2)
        assert_equal({k: v for k, v in tensors(net).items() if k in mean}, {k: raw[k] for k in mean})
        assert_equal(average.state_dict(), mean)

    def test_a_network_in_channels_last_stays_so(self) -> None:
        net = cast(Sifa, make_net().to(memory_format=torch.channels_last))  # type: ignore[call-overload]
        strides = {k: v.stride() for k, v in net.state_dict().items()}
        average = Average(net, 0.9)
        average.follow(1)
        with average.shown():
            assert {k: v.stride() for k, v in net.state_dict().items()} == strides


class TestContinuation:
    def test_3_steps_and_3_more_are_6_bit_for_bit(self) -> None:
        straight_net = make_net()
        straight = Average(straight_net, 0.999)
        for number in range(1, 4):
            moved(straight_net, number)
            straight.follow(number)
        saved, weights = straight.state_dict(), tensors(straight_net)
        kept = copy.deepcopy(saved)
        resumed_net = make_net(seed=5)
        resumed = Average(resumed_net, 0.999)
        resumed_net.load_state_dict(weights)
        resumed.load_state_dict(saved)
        for number in range(4, 7):
            for net, average in ((straight_net, straight), (resumed_net, resumed)):
                moved(net, number)
                average.follow(number)
        assert_equal(resumed.state_dict(), straight.state_dict())
        assert_equal(saved, kept)  # a state does not follow the run

    def test_loading_is_in_place(self) -> None:
        net = make_net()
        average = Average(net, 0.9)
        where = [mean.data_ptr() for mean in average._means]
        average.load_state_dict(Average(make_net(seed=1), 0.9).state_dict())
        assert [mean.data_ptr() for mean in average._means] == where

    def test_a_state_that_lacks_a_tensor_is_refused(self) -> None:
        average = Average(make_net(), 0.9)
        state = average.state_dict()
        del state["segmenter.classify.weight"]
        with pytest.raises(KeyError, match="segmenter"):
            average.load_state_dict(state)
