"""The networks of SIFA: sizes, shapes, initial values, every switch, and what precision and memory format change."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from equipoise.config import CriticLayers, HeadStride, NetConfig
from equipoise.config_base import Leaf
from equipoise.nets import Critic, Decoder, Encoder, Features, Generator, Segmenter, Sifa
from equipoise.nets.layers import (
    AlwaysDropout,
    Conv,
    Dropout,
    Residual,
    Tail,
    Upsample,
    scaled,
)
from equipoise.nets.norms import BatchNorm, GroupNorm, InstanceNorm, is_channels_last

LAST = torch.channels_last
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
    return built(width=0.125)


def built(**settings: Leaf) -> Sifa:
    return Sifa(NetConfig(**settings))  # type: ignore[arg-type]


def abstract(**settings: Leaf) -> Sifa:
    with torch.device("meta"):
        return built(**settings)


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

    def test_v1_lacks_the_auxiliary_segmenter_and_its_critic_only_and_has_40_58_million(self) -> None:
        v1 = abstract(low=False)
        assert v1.segmenter_low is None
        assert v1.critic_p_low is None
        assert sizes(v1) == {k: v for k, v in SIZES.items() if k not in ("segmenter_low", "critic_p_low")}
        assert sum(sizes(v1).values()) == 40_570_609
        assert sum(sizes(abstract(low=False, channels=3)).values()) == 40_575_313  # the published 40.58 M

    def test_biased_critics_have_one_more_parameter_a_map(self) -> None:
        more = {f"critic_{name}": SIZES[f"critic_{name}"] + 64 + 128 + 256 + 512 + 1 for name in ("t", "p", "p_low")}
        more["critic_s"] = SIZES["critic_s"] + 64 + 128 + 256 + 512 + 2
        assert sizes(abstract(critic_bias=True)) == SIZES | more

    @pytest.mark.parametrize(
        ("stride", "segmenter"),
        [
            # 1x1 512 -> 64, 3x3 128 -> 64, scale and shift of 64; then the same from 64 to 32; then 1x1 to 2 classes
            (4, 512 * 64 + 9 * 128 * 64 + 128 + 64 * 2),
            (2, 512 * 64 + 9 * 128 * 64 + 128 + 64 * 32 + 9 * 64 * 32 + 64 + 32 * 2),
        ],
    )
    def test_a_finer_head_changes_the_first_segmenter_only(self, stride: int, segmenter: int) -> None:
        assert sizes(abstract(head_stride=stride)) == SIZES | {"segmenter": segmenter}

    @pytest.mark.parametrize("norm", ["batch_per_domain", "instance", "group"])
    def test_the_encoders_norm_changes_no_count(self, norm: str) -> None:
        assert sizes(abstract(encoder_norm=norm)) == SIZES

    def test_without_a_norm_generator_and_decoder_lack_its_scales_and_shifts_and_nobody_else(self) -> None:
        lost = {"generator": 2 * (2 * 32 + 2 * 64 + 19 * 128), "decoder": 2 * (9 * 128 + 2 * 64 + 32)}
        assert sizes(abstract(image_norm="none")) == SIZES | {k: SIZES[k] - v for k, v in lost.items()}

    @pytest.mark.parametrize(("norm", "lost"), [("both", 0), ("spectral", 1), ("none", 1)])
    def test_of_the_critics_norms_instance_norm_alone_has_parameters(self, norm: str, lost: int) -> None:
        critics = {name: SIZES[name] - lost * 2 * (128 + 256 + 512) for name in SIZES if name.startswith("critic")}
        assert sizes(abstract(critic_norm=norm)) == SIZES | critics

    @pytest.mark.parametrize(
        ("settings", "size", "first", "last"),
        [
            # 4x4 kernels, and scales and shifts of all units but the first
            ({"critic_layers": 2}, 16 * (64 + 64 * 128 + 128 * 256 + 256) + 2 * (128 + 256), 16 * 64, 16 * 256),
            (
                {"critic_channels": 32},
                16 * (32 + 32 * 64 + 64 * 128 + 128 * 256 + 256) + 2 * (64 + 128 + 256),
                16 * 32,
                16 * 256,
            ),
            (
                {"critic_layers": 2, "critic_channels": 12},
                16 * (12 + 12 * 24 + 24 * 48 + 48) + 2 * (24 + 48),
                16 * 12,
                16 * 48,
            ),
        ],
    )
    def test_shallower_and_narrower_critics_have_the_parameters_of_their_layers(
        self, settings: dict[str, Leaf], size: int, first: int, last: int
    ) -> None:
        critics = {"critic_t": size, "critic_s": size + last, "critic_p": size + first, "critic_p_low": size + first}
        assert sizes(abstract(**settings)) == SIZES | critics

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
            net, image = built(width=width, head_stride=2), torch.zeros(1, 1, 64, 64)
            assert net(image).shape == (1, 2, 64, 64)
            assert net.decoder(net.encoder(image).high, image).shape == (1, 1, 64, 64)


class TestShapes:
    @pytest.mark.parametrize(("channels", "classes"), [(1, 2), (3, 5)])
    def test_the_published_networks_at_256_pixels(self, channels: int, classes: int) -> None:
        net = abstract(channels=channels, classes=classes)
        assert net.segmenter_low is not None
        assert net.critic_p_low is not None
        image = torch.zeros(1, channels, 256, 256, device="meta")
        features = net.encoder(image)
        logits = net.segmenter(features, (256, 256))
        shapes = [
            features.high,
            features.low,
            net.generator(image),
            net.decoder(features.high, image),
            logits,
            net(image),
            net.segmenter_low(features, (256, 256)),
        ]
        assert [tuple(x.shape) for x in shapes] == [
            *2 * [(1, 512, 32, 32)],
            *2 * [(1, channels, 256, 256)],
            *3 * [(1, classes, 256, 256)],
        ]
        assert net.critic_t(image).shape == (1, 1, 35, 35)
        assert net.critic_s(image).shape == (1, 2, 35, 35)
        assert net.critic_p(logits).shape == net.critic_p_low(logits).shape == (1, 1, 35, 35)

    def test_a_narrow_net_trains_on_small_oblong_images(self, narrow: Sifa) -> None:
        image = torch.randn(2, 1, 64, 48)
        features = narrow.encoder(image)
        assert features.high.shape == features.low.shape == (2, 64, 8, 6)
        low = features.low.clone()
        assert narrow.segmenter_low is not None
        assert narrow.critic_p_low is not None
        logits = narrow.segmenter(features, (64, 48)) + narrow.segmenter_low(features, (64, 48))
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

    @pytest.mark.parametrize("stride", [8, 4, 2])
    def test_a_head_decides_at_its_stride_and_reads_the_encoders_maps_there(self, stride: HeadStride) -> None:
        net = built(width=0.125, head_stride=stride, classes=3)
        decided: list[Tensor] = []
        net.segmenter.classify.register_forward_hook(lambda _m, _i, out: decided.append(out))
        image = torch.randn(2, 1, 32, 48)
        features = net.encoder(image)
        assert [tuple(x.shape) for x in features.fine] == [(2, 8, 8, 12), (2, 4, 16, 24)][: {8: 0, 4: 1, 2: 2}[stride]]
        assert net.segmenter(features, (32, 48)).shape == (2, 3, 32, 48)
        assert decided[0].shape == (2, 3, 32 // stride, 48 // stride)

    def test_a_head_finer_than_the_encoders_maps_is_refused(self) -> None:
        features = Encoder(width=0.125, head_stride=4)(torch.zeros(1, 1, 32, 32))
        with pytest.raises(ValueError, match="shorter"):
            Segmenter(width=0.125, head_stride=2)(features, (32, 32))

    def test_a_domain_that_is_none_is_refused(self, narrow: Sifa) -> None:
        with pytest.raises(ValueError, match="'source' must be one of 'translated', 'target'"):
            narrow.encoder(torch.zeros(2, 1, 32, 32), "source")

    @pytest.mark.parametrize(("layers", "side", "patch"), [(3, 35, 70), (2, 67, 34)])
    def test_a_critics_patch_is_70_pixels_wide_and_34_with_two_halvings(
        self, layers: CriticLayers, side: int, patch: int
    ) -> None:
        critic = Critic(1, width=0.05, norm="none", layers=layers)  # instance norm sees the whole map
        image = torch.randn(1, 1, 256, 256, requires_grad=True)
        logits = critic(image)
        assert logits.shape == (1, 1, side, side)
        logits[0, 0, side // 2, side // 2].backward()
        assert image.grad is not None
        for axis in (2, 3):
            seen = image.grad.abs().sum(5 - axis).flatten().nonzero()
            assert seen.max() - seen.min() + 1 == patch


class TestInitialValues:
    @staticmethod
    def check(net: nn.Module, sigma: dict[str, float]) -> None:
        """Each convolution of `net`: the sigma of the longest prefix of its name in the table."""
        convs = [(n, m) for n, m in net.named_modules() if isinstance(m, (Conv, Upsample))]
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
        self.check(Decoder(width=0.25), {"": 0.02} | {f"body.{i}.": 0.01 for i in range(1, 5)})

    def test_norms_start_at_scale_one_and_shift_zero(self) -> None:
        norms = [m for m in built(width=0.01).modules() if isinstance(m, (InstanceNorm, BatchNorm))]
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
            nets.append(built(width=0.02).state_dict())
        assert all(torch.equal(nets[0][k], nets[1][k]) for k in nets[0])

    def test_glorot_draws_all_convolutions_within_the_bound_of_their_fans(self) -> None:
        convs = [m for m in built(width=0.25, initial="glorot").modules() if isinstance(m, (Conv, Upsample))]
        assert len(convs) == (5 + 18 + 1) + (1 + 24 + 4 + 2) + (4 + 8 + 1) + 2 + 4 * 5
        for conv in convs:
            fans = (conv.in_channels + conv.out_channels) * conv.kernel_size[0] ** 2
            bound, weight = math.sqrt(6 / fans), conv.weight.detach()
            assert weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=2 / math.sqrt(weight.numel()))
            assert conv.bias is None or not conv.bias.any()


class TestArchitecture:
    def test_encoder_uses_batch_norm_and_the_others_instance_norm(self, narrow: Sifa) -> None:
        kinds = {
            name: {type(m) for m in part.modules() if isinstance(m, (GroupNorm, BatchNorm))}
            for name, part in narrow.named_children()
        }
        assert kinds.pop("encoder") == {BatchNorm}
        assert kinds.pop("segmenter") == kinds.pop("segmenter_low") == set()
        assert all(kind == {InstanceNorm} for kind in kinds.values())

    def test_the_encoder_has_two_dilated_units_and_they_are_the_last(self, narrow: Sifa) -> None:
        dilation = [u.second.conv.dilation[0] for u in narrow.encoder.modules() if isinstance(u, Residual)]
        assert dilation == 12 * [1] + 2 * [2]

    def test_the_generator_has_nine_residual_units_and_the_decoder_four(self, narrow: Sifa) -> None:
        counts = [sum(isinstance(m, Residual) for m in net.modules()) for net in (narrow.generator, narrow.decoder)]
        assert counts == [9, 4]

    def test_a_critic_normalises_its_three_middle_layers_and_leaks_a_fifth(self, narrow: Sifa) -> None:
        tails = [m for m in narrow.critic_s.modules() if isinstance(m, Tail)]
        assert [type(t.norm) for t in tails] == [type(None), *3 * [InstanceNorm]]
        assert [t.slope for t in tails] == 4 * [0.2]
        assert [m.stride[0] for m in narrow.critic_s.modules() if isinstance(m, Conv)] == [2, 2, 2, 1, 1]
        assert type(narrow.critic_s.body[-1]) is Conv

    def test_generator_encoder_and_decoder_rectify_fully(self, narrow: Sifa) -> None:
        for part in (narrow.generator, narrow.encoder, narrow.decoder):
            assert {m.slope for m in part.modules() if isinstance(m, Tail)} == {0}


class TestDropout:
    @staticmethod
    def drops(net: nn.Module) -> list[str]:
        return [name for name, m in net.named_modules(remove_duplicate=False) if isinstance(m, Dropout)]

    def test_the_decoder_stays_noisy_in_evaluation_and_repeats_under_a_seed(self) -> None:
        decoder = Decoder(width=0.125).eval()
        features, image = torch.rand(1, 64, 4, 4), torch.zeros(1, 1, 32, 32)
        torch.manual_seed(1)
        first, second = decoder(features, image), decoder(features, image)
        assert not torch.equal(first, second)
        torch.manual_seed(1)
        assert torch.equal(decoder(features, image), first)

    def test_the_decoder_falls_silent_in_evaluation_where_told(self) -> None:
        decoder = built(width=0.125, decoder_dropout_always=False).decoder
        features, image = torch.rand(1, 64, 4, 4), torch.zeros(1, 1, 32, 32)
        assert not torch.equal(decoder(features, image), decoder(features, image))
        decoder.eval()
        assert torch.equal(decoder(features, image), decoder(features, image))

    def test_it_follows_each_convolution_of_the_decoders_residual_units_and_nothing_else(self, narrow: Sifa) -> None:
        want = [f"decoder.body.{unit}.{place}.dropout" for unit in range(1, 5) for place in ("first", "second")]
        assert self.drops(narrow) == want
        assert {m.probability for m in narrow.modules() if isinstance(m, AlwaysDropout)} == {0.25}
        assert not self.drops(built(width=0.05, decoder_dropout=0.0))

    def test_v1s_encoder_drops_after_every_convolution_in_training_only(self) -> None:
        encoder = built(width=0.05, encoder_dropout=0.25).encoder
        convs = [name for name, m in encoder.named_modules() if isinstance(m, Conv)]
        assert self.drops(encoder) == [name.replace("conv", "dropout") for name in convs]
        assert len(convs) == 31
        image = torch.randn(2, 1, 32, 32)
        assert not torch.equal(encoder(image).high, encoder(image).high)
        encoder.eval()
        assert torch.equal(encoder(image).high, encoder(image).high)

    def test_every_other_network_repeats_itself_in_evaluation(self) -> None:
        net = built(width=0.05).eval()
        image = torch.randn(2, 1, 32, 32)
        for part in (net, net.generator, net.critic_t, net.critic_s):
            assert torch.equal(part(image), part(image))


class TestNormSwitches:
    def test_without_a_norm_there_are_convolutions_and_activations_only(self) -> None:
        net = built(width=0.05, image_norm="none", critic_norm="none")
        for name, part in net.named_children():
            assert name == "encoder" or not any(isinstance(m, GroupNorm) for m in part.modules())
        x = torch.randn(1, 1, 32, 32)
        *weights, last = (m.weight for m in net.critic_t.modules() if isinstance(m, Conv))
        want = x
        for weight, stride in zip(weights, (2, 2, 2, 1), strict=True):
            want = F.leaky_relu(F.conv2d(want, weight, stride=stride, padding=2), 0.2)
        torch.testing.assert_close(net.critic_t(x), F.conv2d(want, last, padding=2))

    @pytest.mark.parametrize("lost", ["image_norm", "critic_norm"])
    def test_critics_and_the_others_lose_their_norm_apart(self, lost: str) -> None:
        net = built(width=0.05, **{lost: "none"})
        without = {
            name for name, part in net.named_children() if not any(isinstance(m, GroupNorm) for m in part.modules())
        }
        critics = {name for name, _ in net.named_children() if name.startswith("critic")}
        others = {"encoder", "segmenter", "segmenter_low"}
        assert without - others == (critics if lost == "critic_norm" else {"generator", "decoder"})

    @pytest.mark.parametrize(("name", "kind"), [("instance", InstanceNorm), ("group", GroupNorm)])
    def test_an_encoder_of_instance_or_group_norm_is_the_same_in_training_and_evaluation(
        self, name: str, kind: type[GroupNorm]
    ) -> None:
        encoder, image = built(width=0.125, encoder_norm=name).encoder, torch.randn(1, 1, 32, 32)
        assert {type(m) for m in encoder.modules() if isinstance(m, (GroupNorm, BatchNorm))} == {kind}
        assert torch.equal(encoder(image).high, encoder.eval()(image).high)
        assert not list(encoder.buffers())

    def test_statistics_per_domain_follow_their_own_images_in_every_layer(self) -> None:
        net = built(width=0.125, encoder_norm="batch_per_domain")
        norms = [m for m in net.encoder.modules() if isinstance(m, BatchNorm)]
        assert len(norms) == 31
        net.encoder(torch.randn(2, 1, 32, 32), "translated")
        assert all(norm.translated_mean.any() and not norm.running_mean.any() for norm in norms)
        kept = [norm.translated_mean.clone() for norm in norms]
        net.encoder(torch.randn(2, 1, 32, 32), "target")
        assert all(norm.running_mean.any() for norm in norms)
        assert all(torch.equal(norm.translated_mean, mean) for norm, mean in zip(norms, kept, strict=True))
        net.eval()
        image = torch.randn(1, 1, 32, 32)
        want = net.segmenter(net.encoder(image, "target"), (32, 32))
        assert torch.equal(net(image), want), "inference is on targets"
        assert not torch.equal(want, net.segmenter(net.encoder(image, "translated"), (32, 32)))

    @pytest.mark.parametrize("statistics", ["stale", "fixed"])
    def test_defects_of_batch_norm_reach_every_layer_of_the_encoder(self, statistics: str) -> None:
        net = built(width=0.125, batch_statistics=statistics)
        image = torch.randn(2, 1, 32, 32)
        trained = net.encoder(image).high
        assert all((buffer == (0 if "mean" in name else 1)).all() for name, buffer in net.named_buffers())
        assert torch.equal(net.eval().encoder(image).high, trained) == (statistics == "fixed")

    def test_joined_statistics_reach_every_batch_norm_unless_each_worker_keeps_its_own(self) -> None:
        called = list[int]()

        def total(x: Tensor) -> Tensor:
            called.append(1)
            return x

        for over, hooked in (("batch", True), ("worker", False)):
            net = built(width=0.05, batch_norm_over=over)
            net.join_statistics(total)
            called.clear()
            net.encoder(torch.randn(2, 1, 32, 32))
            norms = sum(isinstance(m, BatchNorm) for m in net.modules())
            assert len(called) == (norms if hooked else 0)
            assert norms > 20


class TestSpectralCritics:
    @staticmethod
    def kernels(net: nn.Module) -> list[Tensor]:
        """Those that the critics' convolutions use now, as matrices of one row an output."""
        return [m.weight.detach().flatten(1) for m in net.modules() if isinstance(m, Conv) and is_parametrized(m)]

    @pytest.mark.parametrize(("norm", "instance"), [("spectral", 0), ("both", 3)])
    def test_every_convolution_of_every_critic_is_held_and_no_other(self, norm: str, instance: int) -> None:
        net = built(width=0.05, critic_norm=norm)
        for name, part in net.named_children():
            critic = name.startswith("critic")
            convs = [m for m in part.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
            assert [is_parametrized(m) for m in convs] == len(convs) * [critic], name
            assert not critic or sum(isinstance(m, InstanceNorm) for m in part.modules()) == instance

    def test_no_layers_largest_singular_value_strays_from_1_while_weights_move(self) -> None:
        net, image = built(width=0.25, critic_norm="spectral"), torch.rand(2, 1, 32, 32) * 2 - 1
        begun = [p.detach().clone() for p in net.critic_t.parameters()]
        adam = torch.optim.Adam(net.critic_t.parameters(), lr=1e-3)
        for _ in range(60):
            adam.zero_grad()
            (net.critic_t(image) - 1).square().mean().backward()
            adam.step()
        assert all((p - was).norm() > 0.2 * was.norm() for p, was in zip(net.critic_t.parameters(), begun, strict=True))
        values = [torch.linalg.matrix_norm(kernel, 2).item() for kernel in self.kernels(net.critic_t.eval())]
        assert values == pytest.approx(5 * [1.0], abs=0.03)

    def test_the_critics_parameters_are_those_of_a_net_without_it_and_start_the_same(self) -> None:
        nets = {}
        for norm in ("none", "spectral"):
            for initial in ("truncated_normal", "glorot"):
                torch.manual_seed(7)
                nets[norm, initial] = list(built(width=0.05, critic_norm=norm, initial=initial).critic_s.parameters())
        for initial in ("truncated_normal", "glorot"):
            for plain, held in zip(nets["none", initial], nets["spectral", initial], strict=True):
                assert torch.equal(plain, held)
        assert not torch.equal(nets["spectral", "glorot"][0], nets["spectral", "truncated_normal"][0])

    def test_every_parameter_of_a_critic_moves_with_its_logits(self) -> None:
        critic = built(width=0.05, critic_norm="both").critic_t
        critic(torch.randn(2, 1, 32, 32)).square().mean().backward()
        for name, parameter in critic.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name

    def test_a_copy_and_a_saved_state_say_the_same_and_go_their_own_ways(self) -> None:
        net, image = built(width=0.05, critic_norm="spectral"), torch.randn(2, 1, 32, 32)
        net.critic_t(image)
        copied, loaded = copy.deepcopy(net), built(width=0.05, critic_norm="spectral")
        loaded.load_state_dict(net.state_dict())
        want = [net.critic_t(image) for _ in range(2)]
        for other in (copied, loaded):
            assert torch.equal(other.critic_t(image), want[0])
            assert torch.equal(other.critic_t(image), want[1]), "and turn alike"
        with torch.no_grad():
            for parameter in copied.critic_t.parameters():
                parameter.add_(torch.randn_like(parameter))
        assert torch.equal(net.critic_t.eval()(image), loaded.critic_t.eval()(image))
        assert not torch.equal(copied.critic_t.eval()(image), net.critic_t(image))

    def test_it_works_in_channels_last(self) -> None:
        net, image = built(width=0.05, critic_norm="both").double(), torch.randn(2, 1, 32, 32).double()
        want = net.eval().critic_t(image)
        got = net.to(memory_format=LAST).critic_t(image.to(memory_format=LAST))  # type: ignore[call-overload]
        torch.testing.assert_close(got, want)


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
        net, image = built(width=0.125, skip=False), torch.randn(1, 1, 32, 32)
        assert torch.equal(net.generator(image), torch.tanh(net.generator.body(image)))
        net.decoder.body[-1].weight.data.zero_()  # type: ignore[operator]
        assert not net.decoder(torch.rand(1, 64, 4, 4), image).any()

    def test_one_map_serves_all_slices_of_a_stack_and_critics_of_images_judge_the_middle_one(self) -> None:
        net, stack = built(channels=3, width=0.05), torch.randn(1, 3, 32, 32)
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
        assert torch.equal(narrow(image), narrow.segmenter(narrow.encoder(image), (32, 32)))
        narrow.train()

    def test_logits_are_resized_between_cell_centres_and_not_normalised(self) -> None:
        segmenter = Segmenter(classes=2, width=0.01)  # 5 channels
        segmenter.classify.weight.data.zero_()[1, 0] = 1
        features = torch.zeros(1, 5, 1, 2)
        features[0, 0, 0] = torch.tensor([0.0, 8.0])
        logits = segmenter(Features(features, features), (8, 16))
        assert not logits[:, 0].any()
        # Centres of the two cells lie at 3.5 and 11.5 in pixels: half a pixel in, and flat outside of them.
        assert logits[0, 1, 0].tolist() == pytest.approx([0] * 4 + [0.5 + i for i in range(8)] + [8] * 4)

    def test_the_second_segmenter_reads_the_low_tap(self, narrow: Sifa) -> None:
        assert narrow.segmenter_low is not None
        features = Features(torch.full((1, 64, 4, 4), math.nan), torch.rand(1, 64, 4, 4))
        assert narrow.segmenter_low(features, (32, 32)).isfinite().all()
        assert narrow.segmenter(features, (32, 32)).isnan().all()


class TestThinLines:
    """`sifa.md` section 5: what a head can draw at best, whatever the features."""

    @staticmethod
    def dice(stride: HeadStride) -> float:
        """Overlap with a 2 pixels wide oblique line, after a head and all that it reads were fitted to it."""
        y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
        line = ((x - 0.6 * y - 9.3).abs() < 1.17).long()[None]  # 2 pixels across: 1.17 = sqrt(1 + .6^2)
        head = Segmenter(width=0.125, head_stride=stride)
        shapes = ((64, 6), (64, 6), (8, 12), (4, 24))[: {8: 2, 4: 3, 2: 4}[stride]]
        maps = [torch.randn(1, c, side, side).requires_grad_() for c, side in shapes]
        adam = torch.optim.Adam([{"params": maps, "lr": 0.1}, {"params": head.parameters(), "lr": 0.01}])
        for _ in range(200):
            logits = head(Features(maps[0], maps[1], tuple(maps[2:])), (48, 48))
            found = logits.softmax(1)[0, 1]
            dice = 2 * (found * line[0]).sum() / (found.sum() + line.sum())
            adam.zero_grad()
            (F.cross_entropy(logits, line) - dice).backward()
            adam.step()
        hard = logits.argmax(1)
        return float(2 * (hard * line).sum() / (hard.sum() + line.sum()))

    def test_a_head_of_stride_eight_cannot_draw_them_and_finer_ones_can(self) -> None:
        assert 0.5 < self.dice(8) < 0.7
        assert 0.8 < self.dice(4) < 0.97
        assert self.dice(2) > 0.98


class TestPrecision:
    """What bfloat16 and the memory format may change: by this much, and never the type of what leaves a network."""

    @staticmethod
    def images(net: Sifa, image: Tensor, features: Features | None = None) -> dict[str, Tensor]:
        """Every network's output, on the encoder's own features unless others are given; random numbers repeat."""
        torch.manual_seed(5)
        assert net.segmenter_low is not None
        assert net.critic_p_low is not None
        own = net.encoder(image)
        features = features or own
        logits = net.segmenter(features, (32, 48))
        return {
            "G": net.generator(image),
            "E": own.high,
            "E low": own.low,
            "U": net.decoder(features.high, image),
            "C1": logits,
            "C2": net.segmenter_low(features, (32, 48)),
            "D_t": net.critic_t(image),
            "D_s": net.critic_s(image),
            "D_p1": net.critic_p(10 * logits),
            "D_p2": net.critic_p_low(10 * logits),
        }

    @staticmethod
    def net() -> Sifa:
        """Weights large enough for every layer to be heard in the output."""
        net = built(width=0.125, head_stride=4, channels=1)
        for module in net.modules():
            if isinstance(module, (Conv, Upsample)):
                module.weight.data *= 4
        return net

    def test_bfloat16_autocast_stays_within_five_per_cent_of_float32_for_every_network(self) -> None:
        net, image = self.net(), torch.rand(2, 1, 32, 48) * 2 - 1
        features = net.encoder(image)
        want = self.images(net, image, features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = self.images(net, image, features)
        for name, value in want.items():
            assert (got[name].float() - value).norm() <= 0.05 * value.norm(), name
            assert not torch.equal(got[name].float(), value), f"{name} was not computed in bfloat16"
        narrow = {name for name, value in got.items() if value.dtype == torch.bfloat16}
        assert narrow == {"E", "E low", "D_t", "D_s", "D_p1", "D_p2"}
        assert {got[name].dtype for name in got.keys() - narrow} == {torch.float32}

    def test_maps_stay_in_bfloat16_between_convolutions(self) -> None:
        net, image = self.net(), torch.rand(2, 1, 32, 48)
        types: dict[str, torch.dtype] = {}
        for name, module in net.named_modules():
            if isinstance(module, Tail):
                module.register_forward_hook(lambda _m, _i, out, name=name: types.update({name: out.dtype}))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            self.images(net, image)
        assert len(types) == sum(isinstance(m, Tail) for m in net.modules())
        assert set(types.values()) == {torch.bfloat16}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_channels_last_is_kept_through_every_layer(self, dtype: torch.dtype) -> None:
        net, image = self.net().to(memory_format=LAST), torch.rand(2, 1, 32, 48)  # type: ignore[call-overload]
        lost: list[str] = []

        def look(name: str, out: Tensor) -> None:
            if out.shape[1] > 1 and not out.is_contiguous(memory_format=LAST):
                lost.append(name)

        for name, module in net.named_modules():
            if isinstance(module, (Conv, Upsample, Tail, Dropout)):
                module.register_forward_hook(lambda _m, _i, out, name=name: look(name, out))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            outputs = self.images(net, image)
        assert lost == []
        assert is_channels_last(outputs["E"])

    def test_channels_last_gives_the_same_values_and_gradients_to_nine_digits_of_float64(self) -> None:
        net, image = self.net().double(), (torch.rand(2, 1, 32, 48) * 2 - 1).double()
        found = []
        for memory in (torch.contiguous_format, LAST):
            net.to(memory_format=memory)  # type: ignore[call-overload]
            outputs = self.images(net, image)
            loss = torch.stack([out.square().mean() for out in outputs.values()]).sum()
            wanted = dict(net.named_parameters())
            found.append(outputs | dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True)))
        for name, value in found[0].items():
            other = found[1][name]
            torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
