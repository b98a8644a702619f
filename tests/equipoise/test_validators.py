"""What target masks are worth without labels, by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from equipoise.validators import Sums, likeness, structures, validators

WORST = {"validator/entropy": -1.0, "validator/information": 0.0, "validator/volume": 0.0}


def row(*structure: float) -> Tensor:
    """Logits of one slice of one row: of two classes, with these probabilities of the structure; 0 and 1 are exact."""
    p = torch.tensor(structure, dtype=torch.float64)
    logits = torch.stack([1 - p, p]).log().clamp(min=-1e4)
    return logits.view(1, 2, 1, -1)


def told(logits: Tensor, area: float | None = 1.0, brain_class: int = 0) -> dict[str, float]:
    return validators(Sums.of(logits, brain_class), area)


def named(**values: float) -> dict[str, float]:
    return {f"validator/{name}": value for name, value in values.items()}


def spot(size: int, *places: tuple[int, int]) -> Tensor:
    """Logits of one slice in which a structure is predicted at some places; how surely, is drawn."""
    logits = torch.rand(1, 2, size, size, generator=torch.Generator().manual_seed(0))
    logits[:, 0] += 1.5
    for y, x in places:
        logits[0, :, y, x] = torch.tensor([0.0, 1.0])
    return logits


class TestScores:
    def test_equal_doubt_everywhere_is_all_entropy_and_no_information(self) -> None:
        # H(1/4, 3/4) = .811278 bits; all rows alike: norm sqrt(4 (1/16 + 9/16)), over sqrt(4 * 2)
        want = named(entropy=-0.811278, information=0.0, nuclear=math.sqrt(0.3125), volume=1.0)
        assert told(row(0.75, 0.75, 0.75, 0.75), area=4) == pytest.approx(want, abs=1e-6)

    def test_certain_and_evenly_shared_out_is_the_best_there_is(self) -> None:
        want = named(entropy=0.0, information=1.0, nuclear=1.0, volume=1.0)
        assert told(row(1, 1, 0, 0), area=2) == pytest.approx(want, abs=1e-7)

    def test_certain_of_one_class_alone_is_no_information(self) -> None:
        want = named(entropy=0.0, information=0.0, nuclear=math.sqrt(0.5), volume=1.0)
        assert told(row(1, 1, 1), area=3) == pytest.approx(want, abs=1e-7)

    def test_a_mixture_by_hand(self) -> None:
        # mean (1/4 + 1, 2 + 3/4) / 4 = (5/16, 11/16): .896038 bits; mean entropy .811278 / 4
        # P^T P = (17/16, 3/16; 3/16, 41/16): (s1 + s2)^2 = trace + 2 sqrt(determinant)
        norm = math.sqrt(58 / 16 + 2 * math.sqrt((17 * 41 - 9) / 256))
        want = named(entropy=-0.202820, information=0.896038 - 0.202820, nuclear=norm / math.sqrt(4 * 2), volume=3 / 4)
        assert told(row(1, 1, 0.75, 0), area=4) == pytest.approx(want, abs=1e-6)

    @pytest.mark.parametrize("classes", [2, 3, 5])
    @pytest.mark.parametrize("sureness", [0.1, 1.0, 30.0])
    def test_they_stay_within_their_ranges_and_the_norm_is_that_of_the_matrix(
        self, classes: int, sureness: float
    ) -> None:
        logits = sureness * torch.randn(2, classes, 8, 8, generator=torch.Generator().manual_seed(classes))
        logits[:, 1, 2::4, 2::4] = 4 * sureness  # nowhere is further than 3 from a structure
        found = told(logits, area=20.0)
        assert -1 <= found["validator/entropy"] <= 0
        assert 0 <= found["validator/information"] <= 1
        assert 1 / classes <= found["validator/nuclear"] <= 1
        assert 0 <= found["validator/volume"] <= 1
        matrix = logits.double().softmax(1).movedim(1, 3).reshape(-1, classes)
        norm = torch.linalg.matrix_norm(matrix, "nuc").item() / math.sqrt(len(matrix) * classes)
        assert found["validator/nuclear"] == pytest.approx(norm)

    @pytest.mark.parametrize(("area", "want"), [(4.0, 1.0), (8.0, 0.5), (2.0, 0.5), (40.0, 0.1)])
    def test_twice_the_volume_is_as_bad_as_half(self, area: float, want: float) -> None:
        assert told(row(1, 1, 1, 1), area)["validator/volume"] == pytest.approx(want)
        assert (likeness(0.0), likeness(1.0)) == (0.0, 1.0)

    @pytest.mark.parametrize("area", [None, 0.0])
    def test_without_a_size_in_the_source_the_volume_is_not_told(self, area: float | None) -> None:
        assert set(told(row(1, 0), area)) == {"validator/entropy", "validator/information", "validator/nuclear"}


class TestBand:
    @pytest.mark.parametrize(
        ("places", "pixels"), [([(10, 10)], 49), ([(0, 0)], 16), ([(10, 10), (10, 11)], 56), ([(0, 0), (19, 19)], 32)]
    )
    def test_it_reaches_3_pixels_from_a_structure(self, places: Sequence[tuple[int, int]], pixels: int) -> None:
        sums = Sums.of(spot(20, *places), 0)
        assert (int(sums.pixels), int(sums.structure), sums.slices) == (pixels, len(places), 1)

    def test_what_lies_beyond_it_does_not_count(self) -> None:
        one, beyond, within = (spot(20, (10, 10)) for _ in range(3))
        beyond[0, 0, 10, 14] += 5
        within[0, 0, 10, 13] += 5
        assert told(beyond) == pytest.approx(told(one))
        assert told(within)["validator/entropy"] > told(one)["validator/entropy"]

    def test_a_brain_class_is_no_structure(self) -> None:
        logits = torch.zeros(1, 3, 4, 4)
        logits[:, 2] = 1
        assert told(logits, brain_class=2) == pytest.approx(WORST | {"validator/nuclear": 1 / 3})
        assert told(logits)["validator/volume"] == pytest.approx(1 / 16)

    def test_without_a_mask_each_is_the_least_that_it_can_be(self) -> None:
        sure = torch.tensor([9.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(2, 3, 8, 8)
        assert told(sure) == pytest.approx(WORST | {"validator/nuclear": 1 / 3})


class TestSums:
    def test_those_of_batches_are_those_of_all_slices(self) -> None:
        logits = torch.randn(7, 3, 12, 12, generator=torch.Generator().manual_seed(1))
        logits[:, 0] += 2
        parts = [Sums.of(part, 0) for part in logits.split(3)]
        assert validators(parts[0] + parts[1] + parts[2], 9.0) == pytest.approx(told(logits, 9.0))

    def test_they_do_not_grow_with_slices(self) -> None:
        sums = Sums.of(torch.randn(7, 3, 12, 12), 0)
        assert sums.gram.shape == (3, 3)
        assert {x.dtype for x in (sums.structure, sums.pixels, sums.entropy, sums.gram)} == {torch.float64}

    @pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("place", [(10, 10), (0, 19)])
    def test_a_logit_that_is_not_finite_makes_all_of_them_no_number_wherever_it_is(
        self, broken: float, place: tuple[int, int]
    ) -> None:
        logits = torch.cat([spot(20, (10, 10)), spot(20)])
        logits[0, 1, *place] = broken
        found = told(logits)
        assert set(found) == set(named(entropy=0, information=0, nuclear=0, volume=0))
        assert all(math.isnan(value) for value in found.values())
        assert int(structures(logits, 0).isnan().sum()) == 1
