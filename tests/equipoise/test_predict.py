"""A predicted mask lies where in the patient the structure is, whatever the grid of the scan."""

from __future__ import annotations

import locale
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from applied import CENTRE_MM, RADIUS_MM, Bright, around, bright, distances_mm, sphere, volume_ml
from torch import Tensor, nn

from equipoise import weights
from equipoise.baselines import supervised
from equipoise.batches import Cohort
from equipoise.config import RunConfig
from equipoise.metrics import dice
from equipoise.model import Model
from equipoise.nets import Inference
from equipoise.predict import Manner, back, predict, probabilities
from slicestore.errors import InputError
from slicestore.geometry import AXIAL
from slicestore.preprocess import prepare
from slicestore.settings import Prepared
from slicestore.store import Store
from slicestore.volume import Volume, read, write

CPU = torch.device("cpu")
PLAIN = np.reshape(AXIAL, (3, 3))
TURNED = np.reshape(sitk.Euler3DTransform((0, 0, 0), 0.25, -0.3, 0.4).GetMatrix(), (3, 3))
SAGITTAL = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
GRIDS = {
    "axial": around((1.0, 1.0, 2.0), PLAIN),
    "flipped": around((1.0, 1.0, 2.0), PLAIN * [-1.0, 1.0, -1.0]),
    "left-handed": around((1.0, 1.0, 2.0), PLAIN * [1.0, -1.0, 1.0]),
    "sagittal": around((1.0, 1.0, 2.0), SAGITTAL),
    "oblique": around((1.0, 1.0, 2.0), TURNED),
    "oblique and flipped": around((0.9, 0.7, 2.5), TURNED * [-1.0, 1.0, 1.0]),
    "anisotropic": around((0.4, 0.8, 4.0), PLAIN),
    "coarser than the network's pixels": around((1.6, 2.0, 2.0), TURNED),
}
BALL_ML = 4 / 3 * np.pi * RADIUS_MM**3 / 1000


@pytest.fixture
def own_locale() -> Iterator[None]:
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)  # ITK's DICOM writer leaves "C" behind, and other tests read UTF-8


def put_dicom(folder: Path, volume: Volume) -> Path:
    """Write a volume as a series, a file a slice."""
    folder.mkdir()
    image = volume.to_image()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    rows = np.reshape(volume.geometry.direction, (3, 3))
    for z in range(volume.geometry.size[2]):
        one = image[:, :, z]
        place = "\\".join(f"{value:.10g}" for value in volume.geometry.point_mm((0, 0, z)))
        turn = "\\".join(f"{value:.12g}" for value in rows[:, :2].T.ravel())
        for tag, value in (
            ("0008|0060", "MR"),
            ("0008|0016", "1.2.840.10008.5.1.4.1.1.4"),
            ("0008|0018", f"1.2.826.0.1.3680043.2.1125.1.{z + 1}"),
            ("0020|000e", "1.2.826.0.1.3680043.2.1125.1"),
            ("0020|0032", place),
            ("0020|0037", turn),
            ("0020|0013", str(z)),
        ):
            one.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{z:03d}.dcm"))
        writer.Execute(one)
    return folder


def overlays(path: Path, slack_mm: float) -> None:
    """Hold a mask's file to the sphere: no voxel outside of it, and as much volume as it has."""
    far = distances_mm(path)
    assert far.max() < RADIUS_MM + slack_mm
    assert volume_ml(path) == pytest.approx(BALL_ML, rel=0.06)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".nrrd"])
@pytest.mark.parametrize("name", GRIDS)
def test_a_mask_overlays_its_volume_in_physical_space_and_keeps_the_bits_of_its_grid(
    name: str, suffix: str, tmp_path: Path
) -> None:
    raw, out = tmp_path / f"scan{suffix}", tmp_path / f"mask{suffix}"
    write(sphere(GRIDS[name]), raw)
    volume = read(raw)
    found, _ = predict(bright(), volume)
    write(found.label, out, like=raw)
    ours, theirs = sitk.ReadImage(str(out)), sitk.ReadImage(str(raw))
    for part in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        if suffix == ".nrrd":  # it holds spacing times direction, whose last bit is the reader's to round
            assert getattr(ours, part)() == pytest.approx(getattr(theirs, part)(), rel=1e-14, abs=1e-15)
        else:
            assert getattr(ours, part)() == getattr(theirs, part)()
    assert suffix == ".nrrd" or read(out).geometry == volume.geometry
    overlays(out, slack_mm=max(*volume.geometry.spacing_mm, 1.0))


@pytest.mark.parametrize("name", ["axial", "sagittal", "oblique and flipped"])
def test_a_mask_of_a_dicom_series_overlays_it(name: str, tmp_path: Path, own_locale: None) -> None:
    series = put_dicom(tmp_path / "series", sphere(GRIDS[name]))
    volume = read(series)
    found, _ = predict(bright(), volume)
    assert found.label.geometry == volume.geometry
    for suffix in (".mha", ".nii.gz"):
        out = tmp_path / f"mask{suffix}"
        write(found.label, out, like=series)
        overlays(out, slack_mm=2.5)
        assert not read(out).geometry.differences(volume.geometry, 1e-3)


def test_a_grid_in_a_nifti_header_of_64_bits_keeps_all_of_them(tmp_path: Path) -> None:
    import nibabel

    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = TURNED * [1 / 3, 0.7, 2.1], CENTRE_MM / 3
    voxels = np.random.default_rng(0).normal(0, 1, (60, 50, 8)).astype(np.float32)
    nibabel.save(nibabel.Nifti2Image(voxels, affine), tmp_path / "scan.nii.gz")
    write(Volume(np.ones((8, 50, 60), np.uint8), read(tmp_path / "scan.nii.gz").geometry), tmp_path / "m.nii.gz",
          like=tmp_path / "scan.nii.gz")  # fmt: skip
    assert np.array_equal(nibabel.load(tmp_path / "m.nii.gz").affine, nibabel.load(tmp_path / "scan.nii.gz").affine)


def test_what_a_scanner_noted_in_a_header_is_not_taken_over(tmp_path: Path) -> None:
    import nibabel

    image = nibabel.Nifti1Image(np.random.default_rng(0).normal(0, 1, (60, 50, 8)), np.eye(4))
    image.header["descrip"], image.header["db_name"] = b"Nightingale, F", b"ID-90210"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"born 12 May 1820"))
    nibabel.save(image, tmp_path / "scan.nii")
    volume = Volume(np.ones((8, 50, 60), np.uint8), read(tmp_path / "scan.nii").geometry)
    write(volume, tmp_path / "mask.nii", like=tmp_path / "scan.nii")
    data = (tmp_path / "mask.nii").read_bytes()
    assert not any(word in data for word in (b"Nightingale", b"90210", b"1820"))


def test_slices_and_surroundings_that_are_not_seen_are_background() -> None:
    volume = sphere(GRIDS["axial"])
    found, _ = predict(bright(size=24), volume)  # of 44 pixels
    seen = np.argwhere(found.label.voxels)
    assert np.ptp(seen[:, 1]) <= 24
    assert np.ptp(seen[:, 2]) <= 24
    voxels = volume.voxels.copy()
    voxels[:3] = voxels.min()
    found, _ = predict(bright(slices="tissue"), Volume(voxels, volume.geometry))
    assert not found.label.voxels[:3].any()
    assert found.label.voxels.any()


def test_edges_run_between_pixels_where_voxels_are_finer() -> None:
    fine = around((0.25, 0.25, 2.0), PLAIN)
    found, _ = predict(bright(spacing_mm=2.0), sphere(fine))
    blocks = found.label.voxels.reshape(22, 22, 8, 22, 8)  # a pixel is 8 x 8 voxels
    mixed = (blocks.min(axis=(2, 4)) != blocks.max(axis=(2, 4))).mean()
    assert mixed > 0.02  # where a mask of whole pixels has none
    assert found.label.voxels.sum() * 0.125 / 1000 == pytest.approx(BALL_ML, rel=0.08)


class Lopsided(nn.Module):
    """Sees structure at the left and top of every image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        ramp = torch.linspace(4, -4, width) + torch.linspace(2, -2, height)[:, None]
        return torch.stack([-ramp, ramp]).expand(len(image), 2, height, width) * self.weight


@pytest.mark.parametrize("flips", ["none", "x", "xy"])
def test_flips_take_the_mean_of_probabilities_over_mirror_images(flips: str) -> None:
    model = bright(size=32)
    prepared = prepare(sphere(around((2.0, 2.0, 4.0), PLAIN)), None, model.intake.preprocessing)
    found = probabilities(Lopsided(), model.intake, prepared, manner=Manner(flips=flips))[0, 0]  # type: ignore[arg-type]
    own = Lopsided()(torch.zeros(1, 1, 32, 32)).softmax(1)[0, 1].detach().numpy()
    mirrored = {
        "none": [own],
        "x": [own, own[:, ::-1]],
        "xy": [own, own[:, ::-1], own[::-1], own[::-1, ::-1]],
    }[flips]
    np.testing.assert_allclose(found, np.mean(mirrored, axis=0), atol=1e-6)


def test_of_several_structures_the_likeliest_is_taken_and_background_where_none_is_likelier(
    store_of_three: Store, tiny: RunConfig
) -> None:
    config = tiny.at("net.classes", 3)
    cohort = Cohort(store_of_three, config, CPU)
    entry = store_of_three.select("target", "val")[0]
    record = store_of_three.record(entry)
    prepared = Prepared(store_of_three.read(entry, "image"), None, None, record)
    torch.manual_seed(0)
    net = Inference(config.net).eval()
    for parameter in net.segmenter.parameters():
        parameter.data.mul_(1000)  # fresh weights hardly decide
    found = back(probabilities(net, cohort.intake, prepared), prepared)
    logits = net(cohort.val["target"].image)
    assert np.array_equal(found.label.voxels, logits.argmax(1).numpy())
    assert len(np.unique(found.label.voxels)) > 1
    share = torch.stack([torch.from_numpy(one.voxels) for one in found.probabilities])
    torch.testing.assert_close(share, logits.softmax(1)[:, 1:].transpose(0, 1), atol=1e-6, rtol=0)


def test_a_network_that_learned_finds_in_the_raw_volume_what_it_finds_in_validation(
    store: Store, tiny: RunConfig
) -> None:
    config = tiny.having({"steps": 60, "evaluations": 1, "net.head_stride": 2, "optim.lr_segmenter_ratio": 4.0})
    cohort = Cohort(store, config, CPU)
    *_, look = supervised(config, cohort, store)
    applied = Inference(config.net).eval()
    weights.fill(applied, weights.of(look.state(), {}), Path())
    entry = store.select("target", "val")[0]
    raw = next(
        volume
        for path in sorted(Path(store.path).parent.glob("target-[0-9].nii.gz"))
        if prepare(volume := read(path), None, store.preprocessing).record["mean"] == entry.mean
    )
    found, odd = predict(Model(applied, cohort.intake, config, {}), raw)
    label = torch.from_numpy(store.read(entry, "label"))
    assert odd == []
    assert dice(torch.from_numpy(found.label.voxels), label, [1]) == pytest.approx(look.quality["quality/target_dice"])
    assert look.quality["quality/target_dice"] > 0.5


def test_probabilities_that_are_no_numbers_are_refused() -> None:
    model = bright()
    net = Bright()
    net.edge.data.fill_(torch.nan)
    with pytest.raises(InputError, match="probabilities that are not finite"):
        predict(Model(net, model.intake, RunConfig(), {}), sphere(GRIDS["axial"]), where="scan.nii.gz")  # type: ignore[arg-type]


def test_an_image_without_contrast_and_a_missing_brain_mask_are_refused_by_name() -> None:
    volume = sphere(GRIDS["axial"])
    with pytest.raises(InputError, match=r"scan\.nii.*the one value 50 in every voxel"):
        predict(bright(), Volume(np.full_like(volume.voxels, 50), volume.geometry), where="scan.nii")
    with pytest.raises(InputError, match=r"scan\.nii.*no brain mask"):
        predict(bright(strip=True), volume, where="scan.nii")
    brain = Volume(np.ones(volume.voxels.shape, np.uint8), volume.geometry)
    assert predict(bright(strip=True), volume, brain=brain)[0].label.voxels.any()


def test_bfloat16_changes_few_voxels() -> None:
    volume = sphere(GRIDS["oblique"])
    exact, rough = (
        predict(bright(), volume, manner=Manner(precision=p))[0].label.voxels
        for p in ("float32", "bfloat16")  # type: ignore[arg-type]
    )
    assert (exact != rough).mean() < 0.01
