"""Which of other people's signals are taken for which of ours, and which are left alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from equipoise.curve_files import Curve, Curves
from equipoise.curve_names import added, named, ours
from slicestore.errors import InputError


def curve(*values: float, steps: list[int] | None = None) -> Curve:
    return np.array(steps or range(10, 10 * len(values) + 1, 10)), np.array(values, np.float64)


def run(**signals: Curve) -> Curves:
    return Curves("mine", signals)


ONE = curve(1.0, 2.0)


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        # SIFA and the 2022 study
        ("cycl_a", "loss/cycle_s"),
        ("cycl_b", "loss/cycle_t"),
        ("cyc_loss_a", "loss/cycle_s"),
        ("cycle_consistency_loss_b", "loss/cycle_t"),
        ("g_A", "loss/adv_s"),
        ("g_B", "loss/adv_t"),
        ("lsgan_loss_b", "loss/adv_t"),
        ("g_A_loss", "generator total a"),
        ("g_loss_B", "generator total b"),
        ("tot_gb", "generator total b"),
        ("d_A", "critic/loss_s"),
        ("d_B_loss", "critic/loss_t"),
        ("d_P_loss", "critic/loss_p"),
        ("ce_B", "loss/ce"),
        ("ce_loss_b", "loss/ce"),
        ("dice_B", "loss/overlap"),
        ("dice_B_loss", "loss/overlap"),
        ("dice_loss_b", "loss/overlap"),
        # CycleGAN: G_A and D_A play the game of images of B
        ("cycle_A", "loss/cycle_s"),
        ("cycle_B", "loss/cycle_t"),
        ("G_A", "loss/adv_t"),
        ("G_B", "loss/adv_s"),
        ("D_A", "critic/loss_t"),
        ("D_B", "critic/loss_s"),
        ("idt_A", "loss/identity"),
        ("train/loss_cycle_A_step", "loss/cycle_s"),
        ("loss_G", "loss/generator"),
        # ours, also where it served as the name of a file
        ("loss/cycle_t", "loss/cycle_t"),
        ("loss_cycle_t", "loss/cycle_t"),
        ("auc_p_low", "auc/p_low"),
        ("critic_loss_t", "critic/loss_t"),
        ("saturation/tst", "saturation/tst"),
        # what is not guessed
        ("dice_b", None),  # a score in SIFA
        ("dice_fake_b", None),
        ("s_B_loss", None),  # holds a tenth of the generator's total
        ("l2_B", None),
        ("lr_gan", None),
        ("loss", None),
        ("loss_cycle", None),  # of which domain?
        ("val/cycle_A", None),
        ("Validation_set/loss_G", None),
        ("epoch", None),
    ],
)
def test_names_are_read_as_their_authors_meant_them(tag: str, name: str | None) -> None:
    assert ours(tag) == name


def test_the_segmentation_loss_is_cross_entropy_and_dice_or_the_one_there_is() -> None:
    both = named(run(ce_B=curve(1, 2), dice_B=curve(10, 20)), {})
    assert both.curves["loss/segmentation"][1].tolist() == [11, 22]
    assert both.made_of["loss/segmentation"] == ("ce_B", "dice_B")
    assert named(run(dice_B=ONE), {}).made_of["loss/segmentation"] == ("dice_B",)


def test_a_generator_s_loss_is_both_cycles_and_both_games_and_what_identities_there_are() -> None:
    signals = {"cycle_A": curve(1), "cycle_B": curve(20), "G_A": curve(300), "G_B": curve(4000)}
    four = named(run(**signals), {})
    assert four.curves["loss/generator"][1].tolist() == [4321]
    six = named(run(**signals, idt_A=curve(0.5), idt_B=curve(0.25)), {})
    assert six.curves["loss/generator"][1].tolist() == [4321.75]
    assert six.left == []
    del signals["cycle_A"]
    assert "loss/generator" not in named(run(**signals), {}).curves


def test_a_generator_s_loss_that_was_written_is_not_made_up_again() -> None:
    signals = {"cycle_A": ONE, "cycle_B": ONE, "G_A": ONE, "G_B": ONE, "loss_G": curve(7, 8)}
    assert named(run(**signals), {}).curves["loss/generator"][1].tolist() == [7, 8]


def test_sifa_s_two_totals_are_added_where_there_are_no_parts_and_left_alone_where_there_are() -> None:
    totals = {"g_A_loss": curve(1), "g_B_loss": curve(10)}
    assert named(run(**totals), {}).curves["loss/generator"][1].tolist() == [11]
    parts = {"cycl_a": ONE, "cycl_b": ONE, "g_A": ONE, "g_B": ONE}
    found = named(run(**parts, **totals), {})
    assert found.made_of["loss/generator"] == ("cycl_a", "cycl_b", "g_A", "g_B")
    assert found.left == ["g_A_loss", "g_B_loss"]


def test_what_nothing_was_made_of_is_told_in_its_order() -> None:
    assert named(run(lr=ONE, cycl_b=ONE, l2_B=ONE), {}).left == ["lr", "l2_B"]


def test_what_is_told_goes_before_what_is_guessed_and_into_sums() -> None:
    found = named(run(cycle_B=curve(1), mine=curve(2), ce_B=curve(3), d=curve(4)),
                  {"loss/cycle_t": "mine", "loss/overlap": "d"})  # fmt: skip
    assert found.made_of["loss/cycle_t"] == ("mine",)
    assert found.left == ["cycle_B"]
    assert found.curves["loss/segmentation"][1].tolist() == [7]


def test_a_tag_that_is_told_is_nothing_else_any_more() -> None:
    found = named(run(cycle_A=ONE), {"loss/cycle_t": "cycle_A"})
    assert list(found.curves) == ["loss/cycle_t"]


def test_two_tags_that_look_the_same_are_refused_until_one_is_named() -> None:
    two = run(cycle_A=ONE, cycl_a=ONE)
    with pytest.raises(
        InputError, match=r"cycle_A and cycl_a, which all look like loss/cycle_s.*--term loss/cycle_s=TAG"
    ):
        named(two, {})
    assert named(two, {"loss/cycle_s": "cycl_a"}).left == ["cycle_A"]


def test_a_term_that_is_never_judged_and_a_tag_that_is_not_there_are_refused() -> None:
    with pytest.raises(InputError, match="--term loss/total: found a name that is never judged"):
        named(run(a=ONE), {"loss/total": "a"})
    with pytest.raises(InputError, match="mine: found no signal b; --term gives a name to one of: a"):
        named(run(a=ONE), {"loss/cycle_t": "b"})


def test_curves_of_other_steps_are_added_with_the_value_they_had_last() -> None:
    steps, values = added([curve(1, 2, 3, 4, steps=[10, 20, 30, 40]), curve(100, 200, steps=[15, 30])])
    assert steps.tolist() == [20, 30, 40], "at 10 the second had not begun"
    assert values.tolist() == [102, 203, 204]


def test_parts_that_never_meet_have_no_sum() -> None:
    found = named(run(ce_B=curve(1, steps=[10]), dice_B=curve(1, steps=[20])), {})
    assert list(found.curves) == list(found.made_of) == ["loss/ce", "loss/overlap"]


def test_a_sum_is_not_finite_where_a_part_is_not() -> None:
    _, values = added([curve(1, math.inf, 3, 4), curve(1, -math.inf, math.nan, 4)])
    np.testing.assert_array_equal(values, [2, math.nan, math.nan, 8])
