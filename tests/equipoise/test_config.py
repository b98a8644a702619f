"""The configuration is frozen, total and nameable."""

import json

import pytest

from equipoise.config import DEFECTS, PRESETS, PUBLISHED, STUDY_2022, V1, RunConfig
from equipoise.config_base import Leaf


def test_changing_a_leaf_gives_a_copy_and_leaves_the_original() -> None:
    changed = PUBLISHED.at("loss.cycle", 5)
    assert changed.loss.cycle == 5.0
    assert PUBLISHED.loss.cycle == 10.0
    assert changed.at("loss.cycle", 10) == PUBLISHED


@pytest.mark.parametrize("path", ["loss.cylce", "los.cycle", "loss", "steps.more", ""])
def test_a_misspelt_path_fails_where_it_is_written(path: str) -> None:
    with pytest.raises(KeyError):
        PUBLISHED.at(path, 1.0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("loss.cycle", -1.0),
        ("loss.cycle", float("nan")),
        ("optim.lr", 0.0),
        ("loss.adversarial", "wasserstein"),
        ("net.classes", 1),
        ("batch", 0),
        ("steps", 2.5),
        ("net.skip", 1),
        ("seed", True),
        ("workers", 3),
        ("net.channels", 2),
        ("data.split", "volume"),
        ("data.percentile", 3.0),
        ("data.foreground", 1.5),
        ("data.source_low", 4.4),
        ("data.augment.flip", 1.5),
        ("data.augment.rotation_degrees", -1.0),
        ("net.head_stride", 16),
        ("net.encoder_dropout", 1.0),
        ("net.encoder_norm", "layer"),
        ("loss.ce_clip", 1.0),
        ("loss.adv_p_from_epoch", 3),
        ("loss.lsgan_real", 0.0),
        ("optim.segmenter_decay", 0.0),
        ("speed.precision", "float16"),
        ("updates", "shuffled"),
        ("pool_by", "pixel"),
    ],
)
def test_a_value_against_the_rule_is_refused_with_value_and_rule(path: str, value: float) -> None:
    with pytest.raises(ValueError, match="must") as caught:
        PUBLISHED.at(path, value)
    assert path.rsplit(".", 1)[-1] in str(caught.value)


def test_a_record_reads_back_as_the_same_run_with_the_same_name() -> None:
    read = RunConfig.from_dict(json.loads(json.dumps(STUDY_2022.to_dict())))
    assert read == STUDY_2022
    assert read.fingerprint == STUDY_2022.fingerprint != PUBLISHED.fingerprint


def test_an_int_and_a_float_of_the_same_value_name_the_same_run() -> None:
    assert PUBLISHED.at("loss.cycle", 3).fingerprint == PUBLISHED.at("loss.cycle", 3.0).fingerprint


def test_a_record_of_another_version_is_refused() -> None:
    with pytest.raises(KeyError, match="stepz"):
        RunConfig.from_dict({"stepz": 3})


def test_the_2022_settings_are_ten_times_the_published_rate_at_batch_four() -> None:
    assert STUDY_2022.optim.lr == 10 * PUBLISHED.optim.lr
    assert (STUDY_2022.batch, STUDY_2022.steps, STUDY_2022.data.limits) == (4, 40_000, "pooled")
    assert STUDY_2022.data.split == "slice"


def test_percentiles_are_measured_and_so_refused_beside_fixed_limits() -> None:
    with pytest.raises(ValueError, match=r"data\.percentile = 1\.0.*fixed"):
        PUBLISHED.at("data.limits", "fixed").at("data.percentile", 1.0)


def test_augmentation_is_off_unless_asked_for() -> None:
    assert not any(PUBLISHED.data.augment.flat().values())


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("loss.lsgan_real", 0.9, "lsgan"),
        ("loss.tversky_missed", 0.8, "Tversky"),
        ("loss.focal_exponent", 0.5, "focal_tversky"),
        ("loss.cldice_iterations", 5, "cldice"),
        ("net.batch_statistics", "stale", "instance"),
    ],
)
def test_a_setting_that_cannot_take_effect_is_refused(path: str, value: float, where: str) -> None:
    other = PUBLISHED.at("loss.adversarial", "hinge").at("net.encoder_norm", "instance")
    with pytest.raises(ValueError, match=where):
        other.at(path, value)


def test_batch_norm_of_a_single_slice_is_refused_and_the_other_norms_take_one() -> None:
    with pytest.raises(ValueError, match="at least 2 slices"):
        PUBLISHED.at("batch", 1)
    with pytest.raises(ValueError, match="at least 2 slices"):
        PUBLISHED.at("net.batch_norm_over", "worker").at("batch", 4).at("workers", 4)
    assert PUBLISHED.at("batch", 4).at("workers", 4).batch == 4
    assert PUBLISHED.at("net.encoder_norm", "instance").at("batch", 1).batch == 1


def test_v1_differs_from_v2_in_its_published_points_and_no_others() -> None:
    ours, theirs = V1.flat(), PUBLISHED.flat()
    assert {path: value for path, value in ours.items() if value != theirs[path]} == {
        "net.low": False,
        "net.encoder_dropout": 0.25,
        "loss.adv_p_from_epoch": 5,
        "loss.adv_p_full_epoch": 7,
        "optim.lr_segmenter_ratio": 5.0,
        "optim.segmenter_decay": 0.9,
    }


@pytest.mark.parametrize("run", [PUBLISHED, STUDY_2022], ids=["published", "2022"])
@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_of_the_2022_port_is_a_switch(run: RunConfig, defect: str) -> None:
    made = run.having(DEFECTS[defect]).flat()
    for path, value in DEFECTS[defect].items():
        assert PUBLISHED.flat()[path] != value
        assert made[path] == value


def test_settings_that_need_each_other_are_made_together() -> None:
    with pytest.raises(ValueError, match=r"critic\.penalty = 'none': must be 'r1r2' where .*'rp'"):
        PUBLISHED.at("loss.adversarial", "rp")
    together = {"loss.adversarial": "rp", "critic.penalty": "r1r2", "optim.beta1": 0.0}
    assert PUBLISHED.having(together).having({}) == PUBLISHED.having(dict(reversed(together.items())))
    with pytest.raises(KeyError, match="no setting 'penaltee'"):
        PUBLISHED.having({**together, "critic.penaltee": "gp"})


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"loss.adversarial": "rp", "critic.penalty": "r1"}, "must be 'r1r2'"),
        ({"loss.adversarial": "wgan_gp"}, "must be 'gp'"),
        ({"loss.adversarial": "hinge", "critic.penalty": "gp"}, "belongs to loss.adversarial 'wgan_gp'"),
        ({"critic.gamma": 2.0}, "no effect without a penalty"),
        ({"critic.penalty_every": 4}, "no effect without a penalty"),
        ({"critic.penalty": "r1", "critic.gamma": 0.0}, "must be positive"),
        ({"critic.penalty": "r1", "critic.gamma": -1.0}, "must not be negative"),
        ({"critic.noise_until": 0.1}, "no effect without critic.noise"),
        ({"critic.smoothing": 0.1}, "no effect without loss.adversarial"),
        ({"critic.lecam": -0.1}, "must not be negative"),
        ({"loss.cycle": -1.0}, "must not be negative"),
        ({"loss.identity": -1.0}, "must not be negative"),
        ({"loss.adv_p_warmup": 0.1, "loss.adv_p_full_epoch": 7}, "must be 0 where loss.adv_p_full_epoch"),
        ({"monitor.horizon_steps": 20_001}, r"must not exceed steps \(20000\)"),
        ({"balance.mode": "calibrated", "balance.every": 0}, "must measure"),
        ({"balance.mode": "calibrated", "balance.calibration_steps": 100}, "nothing to calibrate by"),
        ({"balance.calibration_steps": 400}, "not calibrated"),
        ({"recovery.remedy": "penalty"}, "no effect where recovery.times is 0"),
        ({"recovery.times": 1, "recovery.remedy": "penalty", "critic.penalty": "r1"}, "take halve_rate"),
        ({"data.frame": 6}, "multiple of 4"),
        ({"optim.clip": -1.0}, "must not be negative"),
        ({"optim.ema": 1.0}, r"\[0, 1\)"),
    ],
)
def test_what_cannot_be_or_cannot_act_is_refused_with_its_rule(changes: dict[str, Leaf], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        PUBLISHED.having(changes)


def test_presets_are_named() -> None:
    assert PRESETS["published"] == RunConfig()
    assert {"v1", "study2022"} <= set(PRESETS)
