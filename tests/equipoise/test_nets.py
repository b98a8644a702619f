"""The networks of SIFA: sizes, shapes, initial values, and the details in which TensorFlow and PyTorch differ."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equipoise.nets import Critic, Decoder, Encoder, Generator, Segmenter, Sifa
from equipoise.nets.layers import (
    AlwaysDropout,
    BatchNorm,
    Conv,
    InstanceNorm,
    Residual,
    Upsample,
    same_padding,
    scaled,
)

SIZES = {  # trainable parameters of the published v2 networks, two classes, one channel
    "generator": 2_849_537,
    "encoder": 27_517_424,
    "decoder": 1_902_848,
    "segmenter": 1_024,
    "segmenter_low": 1_024,
    "critic_t": 2_763_520,
    "critic_s": 2_771_712,
    "critic_p": 2_764_544,
    "critic_p_low": 2_764_544,
}
CUT = 0.8796  # deviation of a unit normal cut at two sigma: sqrt(1 - 4 phi(2) / (2 Phi(2) - 1))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def narrow() -> Sifa:
    torch.manual_seed(0)
    return Sifa(width=0.125)


def abstract(**settings: int) -> Sifa:
    with torch.device("meta"):
        return Sifa(**settings)  # type: ignore[arg-type]


def sizes(net: nn.Module) -> dict[str, int]:
    return {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}


class TestSizes:
    def test_every_network_has_the_published_number_of_parameters(self) -> None:
        assert sizes(abstract()) == SIZES

    def test_all_networks_together_have_43_34_million_parameters_and_inference_27_5(self) -> None:
        assert sum(SIZES.values()) == 43_336_177
        assert SIZES["encoder"] + SIZES["segmenter"] == 27_518_448

    def test_five_classes_change_only_segmenters_and_their_critics(self) -> None:
        wider = {"segmenter": 2_560, "segmenter_low": 2_560, "critic_p": 2_767_616, "critic_p_low": 2_767_616}
        assert sizes(abstract(classes=5)) == SIZES | wider

    def test_three_channels_change_only_the_first_layers_of_generator_and_encoder(self) -> None:
        assert sizes(abstract(channels=3)) == SIZES | {"generator": 2_852_673, "encoder": 27_518_992}

    def test_every_parameter_is_trainable(self) -> None:
        assert all(p.requires_grad for p in abstract().parameters())

    @pytest.mark.parametrize(
        ("channels", "width", "expected"),
        [(512, 1.0, 512), (512, 0.125, 64), (16, 0.125, 2), (16, 0.01, 2), (64, 2.0, 128)],
    )
    def test_width_scales_hidden_channels_but_never_below_two(self, channels: int, width: float, expected: int) -> None:
        assert scaled(channels, width) == expected

    @pytest.mark.parametrize("width", [0.125, 0.3, 1.5])
    def test_any_width_gives_networks_that_fit_together(self, width: float) -> None:
        with torch.device("meta"):
            net, image = Sifa(width=width), torch.zeros(1, 1, 64, 64)
            assert net.decoder(net.encoder(image).high, image).shape == (1, 1, 64, 64)


class TestShapes:
    @pytest.mark.parametrize(("channels", "classes"), [(1, 2), (3, 5)])
    def test_the_published_networks_at_256_pixels(self, channels: int, classes: int) -> None:
        net = abstract(channels=channels, classes=classes)
        image = torch.zeros(1, channels, 256, 256, device="meta")
        features = net.encoder(image)
        logits = net.segmenter(features.high, (256, 256))
        shapes = [
            features.high,
            features.low,
            net.generator(image),
            net.decoder(features.high, image),
            logits,
            net(image),
        ]
        assert [tuple(x.shape) for x in shapes] == [
            *2 * [(1, 512, 32, 32)],
            *2 * [(1, channels, 256, 256)],
            *2 * [(1, classes, 256, 256)],
        ]
        assert net.critic_t(image).shape == (1, 1, 35, 35)
        assert net.critic_s(image).shape == (1, 2, 35, 35)
        assert net.critic_p(logits).shape == net.critic_p_low(logits).shape == (1, 1, 35, 35)

    def test_a_narrow_net_trains_on_small_oblong_images(self, narrow: Sifa) -> None:
        image = torch.randn(2, 1, 64, 48)
        features = narrow.encoder(image)
        assert features.high.shape == features.low.shape == (2, 64, 8, 6)
        low = features.low.clone()
        logits = narrow.segmenter(features.high, (64, 48)) + narrow.segmenter_low(features.low, (64, 48))
        assert logits.shape == (2, 2, 64, 48)
        translated = narrow.generator(image) + narrow.decoder(features.high, image)
        judged = narrow.critic_t(translated) + narrow.critic_s(translated)[:, 1:]
        (judged.mean() + narrow.critic_p(logits).mean() + narrow.critic_p_low(logits).mean()).backward()
        assert torch.equal(features.low, low), "the head must not write into the tap that C2 reads"
        grads = [p.grad for p in narrow.parameters()]
        assert all(g is not None and g.isfinite().all() for g in grads)

    def test_every_map_of_a_critic_is_large_enough_to_normalise_at_64_pixels(self) -> None:
        sides: list[int] = []
        critic = Critic(1, width=0.03)
        for layer in critic.body:
            layer.register_forward_hook(lambda _m, _i, out: sides.append(out.shape[-1]))
        critic(torch.randn(1, 1, 64, 64))
        assert min(sides) == 9
        assert sides[-1] == 11

    @pytest.mark.parametrize("shape", [(1, 1, 60, 64), (1, 1, 64, 4), (1, 1, 0, 64)])
    @pytest.mark.parametrize("part", ["generator", "encoder"])
    def test_sides_that_eight_does_not_divide_are_refused(
        self, narrow: Sifa, part: str, shape: tuple[int, ...]
    ) -> None:
        bad = next(side for side in shape[2:] if side % 8 or not side)
        with pytest.raises(ValueError, match=rf"{bad} must be divisible by 8"):
            narrow.get_submodule(part)(torch.zeros(shape))

    @pytest.mark.parametrize(
        ("settings", "rule"),
        [
            ({"classes": 1}, "at least 2"),
            ({"channels": 2}, "odd"),
            ({"width": 0.0}, "positive"),
            ({"width": math.nan}, "pos"),
        ],
    )
    def test_settings_that_make_no_network_are_refused(self, settings: dict[str, float], rule: str) -> None:
        with pytest.raises(ValueError, match=rule):
            Sifa(**settings)  # type: ignore[arg-type]


class TestInitialValues:
    @staticmethod
    def check(net: nn.Module, sigma: dict[str, float]) -> None:
        """Each convolution of `net`: the sigma of the longest prefix of its name in the table."""
        convs = [(n, m) for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
        assert convs
        for name, conv in convs:
            want = sigma[max((k for k in sigma if name.startswith(k)), key=len)]
            weight = conv.weight.detach()
            assert weight.abs().max() <= 2 * want * (1 + 1e-6), name
            assert conv.bias is None or not conv.bias.any(), name
            if weight.numel() > 2000:
                assert weight.std().item() == pytest.approx(CUT * want, rel=0.05), name
                assert weight.abs().max() > 1.95 * want, name
                assert abs(weight.mean().item()) < 4 * want / math.sqrt(weight.numel()), name

    def test_weights_are_normals_cut_at_two_sigma_and_biases_are_zero(self) -> None:
        self.check(Generator(width=0.25), {"": 0.02})
        self.check(Encoder(width=0.25), {"": 0.01})
        self.check(Critic(2, width=0.25), {"": 0.02})
        self.check(Segmenter(classes=5), {"": 0.01})

    def test_the_decoders_residual_units_start_at_half_the_sigma_of_its_other_layers(self) -> None:
        self.check(Decoder(width=0.25), {"": 0.02} | {f"body.{i}.": 0.01 for i in range(3, 7)})

    def test_norms_start_at_scale_one_and_shift_zero(self) -> None:
        norms = [m for m in Sifa(width=0.01).modules() if isinstance(m, (InstanceNorm, BatchNorm))]
        assert len(norms) == (5 + 18) + (1 + 24 + 4 + 2) + (4 + 8) + 4 * 3
        for norm in norms:
            assert (norm.weight == 1).all()
            assert (norm.bias == 0).all()

    def test_only_generator_and_the_decoders_upsampling_have_biases(self, narrow: Sifa) -> None:
        biased = {
            name.split(".")[0]
            for name, m in narrow.named_modules()
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) and m.bias is not None
        }
        assert biased == {"generator", "decoder"}
        ups = [m.bias is not None for m in narrow.decoder.modules() if isinstance(m, Upsample)]
        assert ups == [True] * 3
        assert not any(m.bias is not None for m in narrow.decoder.modules() if isinstance(m, Conv))

    def test_the_same_seed_gives_the_same_network(self) -> None:
        nets = []
        for _ in range(2):
            torch.manual_seed(3)
            nets.append(Sifa(width=0.02).state_dict())
        assert all(torch.equal(nets[0][k], nets[1][k]) for k in nets[0])


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

    def test_upsampling_is_the_adjoint_of_the_stride_two_convolution(self) -> None:
        down, up = Conv(3, 2, 3, stride=2, sigma=1.0).double(), Upsample(2, 3, sigma=1.0).double()
        up.weight.data.copy_(down.weight.data)
        x, y = torch.randn(1, 3, 8, 6).double(), torch.randn(1, 2, 4, 3).double()
        assert up(y).shape == x.shape
        assert (down(x) * y).sum().item() == pytest.approx((x * up(y)).sum().item())

    def test_dilation_keeps_the_size(self) -> None:
        assert Conv(1, 2, 3, dilation=2, sigma=0.1)(torch.zeros(1, 1, 5, 6)).shape == (1, 2, 5, 6)

    def test_a_critics_patch_is_70_pixels_wide(self) -> None:
        critic = Critic(1, width=0.05)
        for i in (3, 6, 9):
            assert isinstance(critic.body[i], InstanceNorm)
            critic.body[i] = nn.Identity()  # instance norm sees the whole map
        image = torch.randn(1, 1, 256, 256, requires_grad=True)
        critic(image)[0, 0, 17, 17].backward()
        assert image.grad is not None
        for axis in (2, 3):
            seen = image.grad.abs().sum(5 - axis).flatten().nonzero()
            assert seen.max() - seen.min() + 1 == 70


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
        assert torch.equal(norm.eval()(x), norm.train()(x))

    def test_instance_norm_is_pytorchs_in_value_and_gradient(self) -> None:
        ours, theirs = InstanceNorm(3).double(), nn.InstanceNorm2d(3, eps=1e-6, affine=True).double()
        x = torch.randn(2, 3, 5, 7).double()
        grads = []
        for norm in (ours, theirs):
            leaf = x.clone().requires_grad_()
            out: Tensor = norm(leaf)
            out.pow(3).sum().backward()  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            grads.append((out, leaf.grad, norm.weight.grad, norm.bias.grad))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)

    def test_batch_norm_has_epsilon_1e_3_and_moves_a_tenth_of_the_way_each_step(self) -> None:
        norm = BatchNorm(1)
        x = torch.tensor([0.0, 0.0, 0.2, 0.2]).view(1, 1, 2, 2)  # mean .1, variance .01
        assert norm(x).flatten()[3].item() == pytest.approx(0.1 / math.sqrt(0.01 + 1e-3), rel=1e-5)
        assert norm.running_mean is not None
        assert norm.running_mean.item() == pytest.approx(0.1 * 0.1)

    def test_encoder_uses_batch_norm_and_the_others_instance_norm(self, narrow: Sifa) -> None:
        kinds = {
            name: {type(m) for m in part.modules() if isinstance(m, (InstanceNorm, BatchNorm))}
            for name, part in narrow.named_children()
        }
        assert kinds.pop("encoder") == {BatchNorm}
        assert kinds.pop("segmenter") == kinds.pop("segmenter_low") == set()
        assert all(kind == {InstanceNorm} for kind in kinds.values())


class TestUnits:
    @pytest.mark.parametrize(("inputs", "outputs", "first"), [(2, 4, 1), (2, 5, 1), (3, 3, 0)])
    def test_a_residual_units_shortcut_gets_zero_channels_on_both_sides(
        self, inputs: int, outputs: int, first: int
    ) -> None:
        unit = Residual(inputs, outputs, BatchNorm, sigma=0.01)
        last = unit.body[-1]
        assert isinstance(last, BatchNorm)
        last.weight.data.zero_()  # silences the body: only the shortcut is left
        x = torch.rand(1, inputs, 4, 4)
        want = torch.zeros(1, outputs, 4, 4)
        want[:, first : first + inputs] = x
        assert torch.equal(unit(x), want)

    def test_a_residual_unit_rectifies_after_the_sum(self) -> None:
        unit = Residual(2, 2, InstanceNorm, sigma=0.01)
        x = torch.randn(1, 2, 4, 4)
        assert (unit(x) >= 0).all()
        assert torch.equal(unit(x), F.relu(x + unit.body(x)))

    def test_a_residual_unit_cannot_lose_channels(self) -> None:
        with pytest.raises(ValueError, match="2 output channels"):
            Residual(4, 2, BatchNorm, sigma=0.01)

    def test_the_encoder_has_two_dilated_units_and_they_are_the_last(self, narrow: Sifa) -> None:
        dilation = [u.body[0].dilation[0] for u in narrow.encoder.modules() if isinstance(u, Residual)]  # type: ignore[index]
        assert dilation == 12 * [1] + 2 * [2]

    def test_the_generator_has_nine_residual_units_and_the_decoder_four(self, narrow: Sifa) -> None:
        counts = [sum(isinstance(m, Residual) for m in net.modules()) for net in (narrow.generator, narrow.decoder)]
        assert counts == [9, 4]

    def test_a_critic_normalises_its_three_middle_layers_and_leaks_a_fifth(self, narrow: Sifa) -> None:
        kinds = [type(m).__name__ for m in narrow.critic_s.body]
        middle = ["Conv", "InstanceNorm", "LeakyReLU"]
        assert kinds == ["Conv", "LeakyReLU", *3 * middle, "Conv"]
        assert {m.negative_slope for m in narrow.critic_s.modules() if isinstance(m, nn.LeakyReLU)} == {0.2}
        assert [m.stride[0] for m in narrow.critic_s.modules() if isinstance(m, Conv)] == [2, 2, 2, 1, 1]


class TestDropout:
    def test_the_decoder_stays_noisy_in_evaluation_and_repeats_under_a_seed(self) -> None:
        decoder = Decoder(width=0.125).eval()
        features, image = torch.rand(1, 64, 4, 4), torch.zeros(1, 1, 32, 32)
        torch.manual_seed(1)
        first, second = decoder(features, image), decoder(features, image)
        assert not torch.equal(first, second)
        torch.manual_seed(1)
        assert torch.equal(decoder(features, image), first)

    def test_a_quarter_of_the_values_is_dropped_and_the_rest_scaled(self) -> None:
        drop = AlwaysDropout(0.25).eval()
        out = drop(torch.ones(100_000))
        assert sorted(out.unique().tolist()) == pytest.approx([0, 4 / 3])
        assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)

    def test_it_follows_each_convolution_of_the_decoders_residual_units_and_nothing_else(self, narrow: Sifa) -> None:
        drops = [name for name, m in narrow.named_modules() if isinstance(m, AlwaysDropout)]
        assert drops == [f"decoder.body.{unit}.body.{i}" for unit in range(3, 7) for i in (1, 5)]
        assert not any(isinstance(m, (nn.Dropout, nn.Dropout2d)) for m in narrow.modules())
        assert all(m.probability == 0.25 for m in narrow.modules() if isinstance(m, AlwaysDropout))

    def test_every_other_network_repeats_itself_in_evaluation(self) -> None:
        net = Sifa(width=0.05).eval()
        image = torch.randn(2, 1, 32, 32)
        for part in (net, net.generator, net.critic_t, net.critic_s):
            assert torch.equal(part(image), part(image))


class TestOutputs:
    def test_with_skip_generator_and_decoder_add_to_their_input_before_the_tanh(self, narrow: Sifa) -> None:
        image = torch.randn(1, 1, 32, 32)
        assert torch.equal(narrow.generator(image), torch.tanh(image + narrow.generator.body(image)))
        narrow.generator.body[-1].weight.data.zero_()  # type: ignore[operator]
        assert torch.equal(narrow.generator(image), torch.tanh(image))
        decoder = Decoder(width=0.125)
        decoder.body[-1].weight.data.zero_()  # type: ignore[operator]
        assert torch.equal(decoder(torch.rand(1, 64, 4, 4), image), torch.tanh(image))

    def test_without_skip_they_do_not_see_it(self) -> None:
        net, image = Sifa(width=0.125, skip=False), torch.randn(1, 1, 32, 32)
        assert torch.equal(net.generator(image), torch.tanh(net.generator.body(image)))
        net.decoder.body[-1].weight.data.zero_()  # type: ignore[operator]
        assert not net.decoder(torch.rand(1, 64, 4, 4), image).any()

    def test_one_map_serves_all_slices_of_a_stack_and_critics_of_images_judge_the_middle_one(self) -> None:
        net, stack = Sifa(channels=3, width=0.05), torch.randn(1, 3, 32, 32)
        added = torch.atanh(net.generator(stack).double()) - stack
        torch.testing.assert_close(added[:, 0], added[:, 2], atol=1e-4, rtol=0)
        changed = stack.clone()
        changed[:, [0, 2]] += 1
        assert torch.equal(net.critic_t(changed), net.critic_t(stack))
        changed[:, 1] += torch.randn(32, 32)
        assert not torch.equal(net.critic_s(changed), net.critic_s(stack))

    def test_the_net_itself_is_inference(self, narrow: Sifa) -> None:
        narrow.eval()
        image = torch.randn(1, 1, 32, 32)
        assert torch.equal(narrow(image), narrow.segmenter(narrow.encoder(image).high, (32, 32)))
        narrow.train()

    def test_logits_are_resized_between_cell_centres_and_not_normalised(self) -> None:
        segmenter = Segmenter(classes=2, width=0.01)  # 5 channels
        segmenter.classify.weight.data.zero_()[1, 0] = 1
        features = torch.zeros(1, 5, 1, 2)
        features[0, 0, 0] = torch.tensor([0.0, 8.0])
        logits = segmenter(features, (8, 16))
        assert not logits[:, 0].any()
        # Centres of the two cells lie at 3.5 and 11.5 in pixels: half a pixel in, and flat outside of them.
        assert logits[0, 1, 0].tolist() == pytest.approx([0] * 4 + [0.5 + i for i in range(8)] + [8] * 4)
