"""The pictures by which a person judges a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equipoise.batches import Cohort
from equipoise.config import NetConfig
from equipoise.nets import Sifa
from equipoise.panels import COLOURS, ROWS, Panels, draw, tiles
from equipoise.shelf import Slices

LABEL = 64  # width of the column with the rows' names


def panels(count: int = 2, size: int = 32, *, labelled: bool = True) -> Panels:
    images = {
        n: np.full((count, size, size), 0.0, np.float32) for n in ("x_s", "x_st", "x_sts", "x_t", "x_ts", "x_tst")
    }
    masks = {n: np.zeros((count, size, size), np.uint8) for n in ("y_s", "mask_st", "mask_t")[not labelled :]}
    return Panels(images, masks)


def pixel(
    picture: Image.Image, row: int, column: int, y: int, x: int, *, size: int = 32, scale: int = 4
) -> tuple[int, ...]:
    """The colour of a slice's pixel `(y, x)` in a row and column of the picture, at its centre."""
    at = (LABEL + (column * size + x) * scale + scale // 2, (row * size + y) * scale + scale // 2)
    colour = picture.getpixel(at)
    assert isinstance(colour, tuple)
    return colour


def test_it_has_nine_rows_and_a_column_a_slice_each_128_pixels_wide_or_more() -> None:
    assert panels(3, 32).picture().size == (LABEL + 3 * 32 * 4, 9 * 32 * 4)
    assert panels(2, 64).picture().size == (LABEL + 2 * 64 * 2, 9 * 64 * 2)
    assert panels(1, 256).picture().size == (LABEL + 256, 9 * 256)


def test_without_source_labels_the_row_of_y_s_is_left_out() -> None:
    assert panels(1, 32, labelled=False).picture().height == 8 * 32 * 4


def test_rows_are_source_label_translation_prediction_and_round_trip_then_the_targets() -> None:
    assert ROWS == ("x_s", "y_s", "x_st", "mask_st", "x_sts", "x_t", "mask_t", "x_ts", "x_tst")
    p = panels()
    grey = {}
    for number, name in enumerate(p.images):
        p.images[name][1, 5, 9] = number / 10
        grey[name] = round((number / 10 + 1) * 127.5)
    picture = p.picture()
    under = {"y_s": "x_s", "mask_st": "x_st", "mask_t": "x_t"}
    for row, name in enumerate(ROWS):
        value = grey[under.get(name, name)]
        assert pixel(picture, row, 1, 5, 9) == (value, value, value), name
        assert pixel(picture, row, 0, 5, 9) == (128, 128, 128), name


def test_minus_1_is_black_1_is_white_and_what_lies_beyond_is_clipped() -> None:
    p = panels()
    p.images["x_s"][0, 0, :4] = [-1, 1, -3, 3]
    picture = p.picture()
    assert [pixel(picture, 0, 0, 0, x)[0] for x in range(4)] == [0, 255, 0, 255]


def test_a_mask_is_half_its_colour_and_half_the_image_below() -> None:
    p = panels()
    p.images["x_t"][0, 3, 4] = -1
    p.masks["mask_t"][0, 3, 4:6] = 1, 2
    picture = p.picture()
    row = ROWS.index("mask_t")
    assert pixel(picture, row, 0, 3, 4) == tuple(c // 2 for c in COLOURS[0])  # over black
    assert pixel(picture, row, 0, 3, 5) == tuple(round(0.5 * 128 + 0.5 * c) for c in COLOURS[1])  # over grey
    assert pixel(picture, row, 0, 3, 6) == (128, 128, 128)
    assert pixel(picture, ROWS.index("x_t"), 0, 3, 4) == (0, 0, 0), "the image itself is shown bare"


def test_the_fifth_structure_has_the_first_ones_colour() -> None:
    p = panels()
    p.masks["y_s"][0, 0, :2] = 1, 5
    picture = p.picture()
    assert pixel(picture, 1, 0, 0, 0) == pixel(picture, 1, 0, 0, 1) != (128, 128, 128)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_pixel_that_is_no_number_is_magenta(value: float) -> None:
    p = panels()
    p.images["x_st"][0, 1, 2] = value
    picture = p.picture()
    assert pixel(picture, ROWS.index("x_st"), 0, 1, 2) == (255, 0, 255)
    assert pixel(picture, ROWS.index("mask_st"), 0, 1, 2) == (255, 0, 255)
    assert pixel(picture, ROWS.index("x_st"), 0, 1, 3) == (128, 128, 128)


def test_it_is_saved_as_png_without_leaving_a_partial_file(tmp_path: Path) -> None:
    panels().save(tmp_path / "panels" / "a.png")
    assert [p.name for p in (tmp_path / "panels").iterdir()] == ["a.png"]
    with Image.open(tmp_path / "panels" / "a.png") as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), np.asarray(panels().picture()))


class TestDraw:
    @staticmethod
    def net() -> Sifa:
        torch.manual_seed(0)
        return Sifa(NetConfig(width=0.0625)).train()

    def test_every_path_is_run_on_the_probe_slices(self, cohort: Cohort) -> None:
        drawn = draw(self.net(), cohort, 3)
        assert set(drawn.images) | set(drawn.masks) == set(ROWS)
        assert {x.shape for x in [*drawn.images.values(), *drawn.masks.values()]} == {(3, 32, 32)}
        source = cohort.probe("source", 3)
        assert source.label is not None
        assert np.array_equal(drawn.images["x_s"], source.image[:, 0].numpy())
        assert np.array_equal(drawn.masks["y_s"], source.label.numpy())
        assert np.array_equal(drawn.images["x_t"], cohort.probe("target", 3).image[:, 0].numpy())

    def test_images_are_what_the_networks_make_in_evaluation_mode(self, cohort: Cohort) -> None:
        net = self.net()
        drawn = draw(net, cohort, 2)
        with torch.no_grad():
            x_st = net.eval().generator(cohort.probe("source", 2).image)
            mask = net(x_st).argmax(1)
        np.testing.assert_allclose(drawn.images["x_st"], x_st[:, 0].numpy(), atol=1e-6)
        assert np.array_equal(drawn.masks["mask_st"], mask.numpy())

    def test_it_leaves_the_network_as_it_was_and_training(self, cohort: Cohort) -> None:
        net = self.net()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        draw(net, cohort)
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
        assert all(module.training for module in net.modules())

    def test_the_domain_with_fewer_slices_says_how_many_columns_there_are(self, cohort: Cohort) -> None:
        short = object.__new__(Cohort)
        target: Slices = cohort.val["target"].take([0, 1])
        short.val, short.train = {"source": cohort.val["source"], "target": target}, {}
        assert draw(self.net(), short, 4).images["x_s"].shape[0] == 2

    def test_a_broken_network_is_drawn_in_magenta_and_does_not_raise(self, cohort: Cohort) -> None:
        net = self.net()
        next(iter(net.generator.parameters())).data.fill_(torch.nan)
        picture = draw(net, cohort, 1).picture()
        assert pixel(picture, ROWS.index("x_st"), 0, 16, 16) == (255, 0, 255)


@pytest.mark.parametrize(("size", "labelled"), [(32, True), (256, True), (48, False)])
def test_a_picture_comes_apart_again_into_bare_slices_and_their_masks(
    tmp_path: Path, size: int, labelled: bool
) -> None:
    p, rng = panels(3, size, labelled=labelled), np.random.default_rng(0)
    for image in p.images.values():
        image[:] = rng.uniform(-1, 1, image.shape)
    p.images["x_st"][0, 3, 4] = np.nan
    for mask in p.masks.values():
        mask[:] = rng.integers(0, 3, mask.shape)
    p.save(tmp_path / "step-000001.png")
    found = tiles(tmp_path / "step-000001.png")
    assert found is not None
    assert list(found.images) == list(p.images)
    for name, image in p.images.items():
        grey = np.nan_to_num((image + 1) * 127.5).round().astype(np.uint8)
        known = np.isfinite(image)
        assert (found.images[name][known] == grey[known][:, None]).all(), name
    assert tuple(found.images["x_st"][0, 3, 4]) == (255, 0, 255)
    assert list(found.masks) == list(p.masks)
    assert all((found.masks[name] == p.masks[name]).all() for name in p.masks)


def test_a_picture_of_other_making_has_no_tiles(tmp_path: Path) -> None:
    panels().picture().save(tmp_path / "step-000001.png")
    assert tiles(tmp_path / "step-000001.png") is None
