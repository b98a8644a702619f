"""Shares of terms and multipliers of weights, by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from equipoise.balance import Balance, ratios, shares, weights
from equipoise.config import RunConfig

CPU = torch.device("cpu")
RUN = RunConfig().having(
    {
        "loss.cycle": 7.0, "loss.adv_image": 1.3, "loss.identity": 2.0, "loss.segmentation": 0.5, "loss.seg_low": 0.3,
        "loss.adv_p": 0.4, "loss.adv_p_low_ratio": 0.6, "loss.aux": 0.7, "loss.image_in_encoder": 0.2,
    }
)  # fmt: skip
NORMS = {
    "generator": {"cycle_s": 1.0, "cycle_t": 2.5, "adv_t": 0.6, "identity": 9.0, "cycles": 3.0},
    "decoder": {"cycle_s": 2.0, "cycle_t": 3.5, "adv_s": 0.8, "cycles": 4.0},
    "encoder": {
        "cycle_s": 1.5, "cycle_t": 0.5, "adv_s": 0.25, "cycles": 1.8, "segmentation": 6.0, "seg_low": 2.0, "adv_p": 1.5,
        "adv_p_low": 1.0, "adv_aux": 3.0,
    },
}  # fmt: skip


def balanced(mode: str, *, every: int = 250, calibration_steps: int = 500, run: RunConfig = RUN) -> Balance:
    changes: dict[str, Any] = {"balance.mode": mode, "balance.every": every}
    if mode == "calibrated":
        changes["balance.calibration_steps"] = calibration_steps
    return Balance(run.having(changes), CPU)


def norms(**ratio: float) -> dict[str, dict[str, float]]:
    """Norms whose ratios, with a cycle weight of 7, are these."""
    return {
        "generator": {"cycles": 3.0, "adv_t": 7 * 3 / ratio.get("adv_image", 1)},
        "decoder": {"cycles": 4.0, "adv_s": 7 * 4 / ratio.get("adv_image", 1)},
        "encoder": {"segmentation": 6.0, "adv_p": 6 / ratio.get("adv_p", 1), "adv_aux": 6 / ratio.get("aux", 1)},
    }


def values(balance: Balance) -> list[float]:
    return [float(x) for x in (balance.adv_image, balance.adv_p, balance.aux)]


class TestWeights:
    def test_each_network_has_the_terms_that_move_it_with_their_weights(self) -> None:
        table = weights(RUN)
        assert table["generator"] == {"cycle_s": 7, "cycle_t": 7, "adv_t": 1.3, "identity": 2}
        assert table["decoder"] == {"cycle_s": 7, "cycle_t": 7, "adv_s": 1.3}
        assert table["encoder"] == pytest.approx(
            {
                "cycle_s": 1.4, "cycle_t": 1.4, "adv_s": 0.26, "segmentation": 0.5, "seg_low": 0.15, "adv_p": 0.2,
                "adv_p_low": 0.12, "adv_aux": 0.35,
            }
        )  # fmt: skip

    def test_of_the_published_run_g_has_no_identity(self) -> None:
        assert weights(RunConfig())["generator"] == {"cycle_s": 10, "cycle_t": 10, "adv_t": 1}

    @pytest.mark.parametrize(
        ("setting", "gone"),
        [
            ("loss.segmentation", {"segmentation", "seg_low", "adv_p", "adv_p_low", "adv_aux"}),
            ("loss.image_in_encoder", {"cycle_s", "cycle_t", "adv_s"}),
            ("loss.adv_p", {"adv_p", "adv_p_low"}),
            ("loss.aux", {"adv_aux"}),
            ("loss.adv_image", {"adv_s"}),
        ],
    )
    def test_what_has_weight_0_is_no_term(self, setting: str, gone: set[str]) -> None:
        assert weights(RUN)["encoder"].keys() - weights(RUN.at(setting, 0.0))["encoder"].keys() == gone

    def test_without_c2_its_terms_are_missing(self) -> None:
        assert weights(RUN)["encoder"].keys() - weights(RunConfig().at("net.low", False))["encoder"].keys() == {
            "seg_low",
            "adv_p_low",
        }


class TestShares:
    def test_they_are_parts_of_the_sum_and_their_entropy_is_a_share_of_the_greatest(self) -> None:
        got = shares({"generator": {"a": 3.0, "b": 1.0}, "encoder": {"a": 2.0, "b": 2.0, "c": 2.0}})
        third = 1 / 3
        assert got == pytest.approx(
            {
                "balance/generator_a": 0.75, "balance/generator_b": 0.25, "balance/generator": 0.8112781,
                "balance/encoder_a": third, "balance/encoder_b": third, "balance/encoder_c": third,
                "balance/encoder": 1.0,
            }
        )  # fmt: skip

    def test_a_term_that_does_nothing_counts_among_the_terms(self) -> None:
        got = shares({"encoder": {"a": 2.0, "b": 2.0, "c": 0.0}})
        assert got["balance/encoder_c"] == 0
        assert got["balance/encoder"] == pytest.approx(math.log(2) / math.log(3))

    def test_one_term_alone_has_all_of_it_and_no_entropy(self) -> None:
        assert shares({"encoder": {"a": 3.0}}) == {"balance/encoder_a": 1.0}

    def test_one_of_two_that_has_all_of_it_has_entropy_0(self) -> None:
        assert shares({"encoder": {"a": 3.0, "b": 0.0}})["balance/encoder"] == 0

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_norm_that_is_no_number_leaves_no_share_of_that_network_and_others_alone(self, value: float) -> None:
        got = shares({"generator": {"a": 3.0, "b": value}, "decoder": {"a": 1.0, "b": 1.0}})
        assert all(math.isnan(got[f"balance/{name}"]) for name in ("generator_a", "generator_b", "generator"))
        assert got["balance/decoder"] == 1

    def test_what_nothing_moves_has_no_shares(self) -> None:
        assert shares({"generator": {"a": 0.0, "b": 0.0}, "decoder": {}}) == {}


class TestRatios:
    def test_by_hand(self) -> None:
        # 7 |(3, 4)| over |(.6, .8)|; 6 over 1.5; 6 over 3
        assert ratios(NORMS, 7.0) == pytest.approx({"adv_image": 35.0, "adv_p": 4.0, "aux": 2.0})

    def test_where_there_is_no_anchor_there_is_none(self) -> None:
        bare = {network: {n: v for n, v in terms.items() if n != "cycles"} for network, terms in NORMS.items()}
        del bare["encoder"]["segmentation"]
        assert ratios(bare, 7.0) == {}

    def test_a_term_that_does_not_pull_has_an_infinite_one_and_without_a_pulling_anchor_none(self) -> None:
        found = copy.deepcopy(NORMS)
        found["encoder"]["adv_p"] = 0.0
        assert ratios(found, 7.0)["adv_p"] == math.inf
        found["encoder"]["segmentation"] = 0.0
        assert math.isnan(ratios(found, 7.0)["adv_p"])
        assert ratios(found, 7.0)["aux"] == 0

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize(("network", "term"), [("decoder", "adv_s"), ("generator", "cycles")])
    def test_a_norm_that_is_no_number_gives_none(self, network: str, term: str, value: float) -> None:
        found = copy.deepcopy(NORMS)
        found[network][term] = value
        got = ratios(found, 7.0)
        assert math.isnan(got.pop("adv_image"))
        assert got == {"adv_p": 4.0, "aux": 2.0}


class TestWhen:
    def test_it_is_due_every_so_many_steps(self) -> None:
        balance = balanced("static", every=3)
        assert [n for n in range(1, 10) if balance.due(n)] == [3, 6, 9]

    def test_with_0_it_never_is(self) -> None:
        assert not any(balanced("static", every=0).due(n) for n in range(1, 10))


class TestStatic:
    def test_it_multiplies_by_1_whatever_is_measured_and_says_nothing_of_it(self) -> None:
        balance = balanced("static")
        balance.take(norms(adv_image=5.0), 250)
        assert values(balance) == [1, 1, 1]
        assert not any(name.startswith("balance/weight") for name in balance.signals(NORMS))


class TestGradRatio:
    def test_it_starts_at_1_and_goes_towards_the_ratio_by_99_hundredths_to_the_power_of_the_steps_between(self) -> None:
        balance = balanced("grad_ratio", every=100)
        assert values(balance) == [1, 1, 1]
        balance.take(norms(adv_image=5.0, adv_p=0.5), 100)
        stays = 0.36603234  # .99 ** 100
        assert values(balance) == pytest.approx([stays + (1 - stays) * 5, stays + (1 - stays) * 0.5, 1], rel=1e-6)
        balance.take(norms(adv_image=2.0, adv_p=0.5), 200)
        want = stays * (stays + (1 - stays) * 5) + (1 - stays) * 2
        assert values(balance)[0] == pytest.approx(want, rel=1e-6)

    def test_ratios_are_held_between_a_tenth_and_ten(self) -> None:
        balance = balanced("grad_ratio")
        found = norms(adv_image=1e6, adv_p=1e-6)
        found["encoder"]["adv_aux"] = 0.0
        for number in range(250, 25_000, 250):
            balance.take(found, number)
        assert values(balance) == pytest.approx([10, 0.1, 10])

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_measurement_that_is_no_number_is_told_and_not_followed(self, value: float) -> None:
        balance = balanced("grad_ratio")
        balance.take(norms(adv_image=2.0, adv_p=2.0, aux=2.0), 250)
        before = values(balance)
        broken = copy.deepcopy(NORMS)
        broken["generator"]["adv_t"] = value
        balance.take(broken, 500)
        assert values(balance)[0] == before[0]
        assert values(balance)[1:] == pytest.approx([4.0, 2.0], rel=0.1), "the others go on"
        signals = balance.signals(broken)
        assert math.isnan(signals["balance/generator_adv_t"])
        assert signals["balance/weight_adv_image"] == pytest.approx(before[0])
        balance.take(norms(adv_image=8.0), 750)
        assert values(balance)[0] > 7


class TestCalibrated:
    def test_it_multiplies_by_1_until_its_last_measurement_and_then_for_ever_by_the_geometric_mean(self) -> None:
        balance = balanced("calibrated", every=100, calibration_steps=200)
        balance.take(norms(adv_image=2.0, adv_p=100.0, aux=0.25), 100)
        assert values(balance) == [1, 1, 1]
        balance.take(norms(adv_image=8.0, adv_p=1.0, aux=0.25), 200)
        assert values(balance) == pytest.approx([4, 10, 0.25])
        balance.take(norms(adv_image=1.0, adv_p=1.0, aux=1.0), 300)
        balance.take(norms(adv_image=1.0, adv_p=1.0, aux=1.0), 400)
        assert values(balance) == pytest.approx([4, 10, 0.25])

    def test_it_is_not_held_to_any_limits(self) -> None:
        balance = balanced("calibrated")
        for number in (250, 500):
            balance.take(norms(adv_image=1e4, adv_p=1e-4), number)
        assert values(balance) == pytest.approx([1e4, 1e-4, 1])

    def test_steps_beyond_the_last_whole_interval_are_not_waited_for(self) -> None:
        balance = balanced("calibrated", every=100, calibration_steps=250)
        balance.take(norms(adv_image=2.0), 100)
        assert values(balance)[0] == 1
        balance.take(norms(adv_image=2.0), 200)
        assert values(balance)[0] == pytest.approx(2)

    def test_ratios_without_a_logarithm_do_not_count(self) -> None:
        balance = balanced("calibrated")
        odd = norms(adv_image=3.0)
        odd["encoder"] = {"segmentation": 6.0, "adv_p": 0.0, "adv_aux": math.nan}
        balance.take(odd, 250)
        balance.take(norms(adv_image=3.0, adv_p=5.0, aux=7.0), 500)
        assert values(balance) == pytest.approx([3, 5, 7])

    def test_without_any_that_counts_it_stays_1(self) -> None:
        balance = balanced("calibrated")
        odd = norms(adv_image=3.0)
        odd["encoder"] = {"segmentation": math.nan, "adv_p": 1.0, "adv_aux": 1.0}
        for number in (250, 500):
            balance.take(odd, number)
        assert values(balance) == pytest.approx([3, 1, 1])


class TestSignals:
    def test_shares_are_of_weighted_norms_by_hand(self) -> None:
        got = balanced("static").signals(NORMS, ramp=0.5)
        generator = [7 * 1.0, 7 * 2.5, 1.3 * 0.6, 2 * 9.0]
        encoder = [1.4 * 1.5, 1.4 * 0.5, 0.26 * 0.25, 0.5 * 6, 0.15 * 2, 0.5 * 0.2 * 1.5, 0.5 * 0.12 * 1, 0.35 * 3]
        assert got["balance/generator_adv_t"] == pytest.approx(generator[2] / sum(generator))
        for name, norm in zip(
            ("cycle_s", "cycle_t", "adv_s", "segmentation", "seg_low", "adv_p", "adv_p_low", "adv_aux"),
            encoder,
            strict=True,
        ):
            assert got[f"balance/encoder_{name}"] == pytest.approx(norm / sum(encoder)), name
        assert "balance/encoder_cycles" not in got

    def test_those_of_a_network_add_up_to_1(self) -> None:
        got = balanced("static").signals(NORMS)
        for network in ("generator", "decoder", "encoder"):
            own = [value for name, value in got.items() if name.startswith(f"balance/{network}_")]
            assert len(own) > 2
            assert sum(own) == pytest.approx(1)
            assert 0 < got[f"balance/{network}"] < 1

    def test_multipliers_count_in_them_and_are_told(self) -> None:
        balance = balanced("calibrated", every=1, calibration_steps=1)
        plain = balance.signals(NORMS)
        balance.take(NORMS, 1)  # 35, 4 and 2: see above
        got = balance.signals(NORMS)
        for network, one, other, factor in (
            ("generator", "adv_t", "cycle_s", 35),
            ("decoder", "adv_s", "cycle_s", 35),
            ("encoder", "adv_s", "cycle_s", 35),
            ("encoder", "adv_p", "segmentation", 4),
            ("encoder", "adv_p_low", "seg_low", 4),
            ("encoder", "adv_aux", "segmentation", 2),
        ):
            before, after = (s[f"balance/{network}_{one}"] / s[f"balance/{network}_{other}"] for s in (plain, got))
            assert after / before == pytest.approx(factor), one
        told = {name: value for name, value in got.items() if name.startswith("balance/weight")}
        assert told == pytest.approx(
            {"balance/weight_adv_image": 35, "balance/weight_adv_p": 4, "balance/weight_aux": 2}
        )

    def test_a_multiplier_of_what_is_switched_off_is_not_told(self) -> None:
        balance = balanced("grad_ratio", run=RUN.at("loss.segmentation", 0.0))
        told = {name for name in balance.signals(NORMS) if name.startswith("balance/weight")}
        assert told == {"balance/weight_adv_image"}


class TestContinuation:
    @pytest.mark.parametrize("mode", ["static", "grad_ratio", "calibrated"])
    def test_measurements_before_and_after_a_stop_are_those_of_a_run_without_one(self, mode: str) -> None:
        found = [norms(adv_image=1.7 * n, adv_p=0.3 * n, aux=1 / n) for n in range(1, 5)]
        straight = balanced(mode, every=100, calibration_steps=300)
        for n, measured in enumerate(found, start=1):
            straight.take(measured, 100 * n)
        for cut in range(4):
            first, second = (balanced(mode, every=100, calibration_steps=300) for _ in range(2))
            for n, measured in enumerate(found[:cut], start=1):
                first.take(measured, 100 * n)
            saved = first.state_dict()
            kept = copy.deepcopy(saved)
            first.take(found[0], 100)
            second.load_state_dict(saved)
            for n, measured in enumerate(found[cut:], start=cut + 1):
                second.take(measured, 100 * n)
            assert values(second) == values(straight)
            assert second.state_dict() == straight.state_dict()
            assert saved == kept, "a state does not follow the run"

    def test_multipliers_stay_where_a_recorded_step_reads_them(self) -> None:
        balance = balanced("calibrated", every=1, calibration_steps=1)
        held = (balance.adv_image, balance.adv_p, balance.aux)
        where = [x.data_ptr() for x in held]
        balance.take(NORMS, 1)
        assert [float(x) for x in held] == pytest.approx([35, 4, 2])
        balance.load_state_dict(balanced("static").state_dict())
        assert [float(x) for x in held] == [1, 1, 1]
        assert [x.data_ptr() for x in (balance.adv_image, balance.adv_p, balance.aux)] == where
