"""How a step is computed changes its numbers by rounding only, and what a machine lacks is refused by name."""

from __future__ import annotations

import pytest
import torch

from equipoise import speed
from equipoise.checkpoint import State
from equipoise.config import NetConfig, OptimConfig, RunConfig
from equipoise.config_base import Leaf
from equipoise.ranks import Ranks
from equipoise.step import Batch, Signals
from equipoise.train import Run
from slicestore.errors import InputError

CPU = torch.device("cpu")
CONFIG = RunConfig(batch=6, net=NetConfig(width=0.125, decoder_dropout=0.0), optim=OptimConfig(lr=1e-12))
"""Nobody moves: Adam's first step has the size of the rate, whichever way rounding turns a gradient of nothing."""


def make_batch(seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    source, target = (torch.rand(6, 1, 64, 64, generator=g) * 2 - 1 for _ in range(2))
    return Batch(source, torch.randint(0, 2, (6, 64, 64), generator=g), target)


@pytest.fixture(scope="module")
def trained() -> State:
    """A run after thirty steps: at the very start the encoder's features are all but rounding."""
    torch.set_num_threads(1)
    run = Run.start(CONFIG.at("optim.lr", 2e-4), CPU, Ranks())
    for number in range(1, 31):
        run.advance(make_batch(number % 5), number)
    return run.state()


def one_step(state: State, updates: str, settings: dict[str, Leaf], device: torch.device = CPU) -> tuple[Signals, Run]:
    config = CONFIG.at("updates", updates)
    for name, value in settings.items():
        config = config.at(f"speed.{name}", value)
    run = Run.start(config, device, Ranks())
    run.load(state)
    return run.advance(Batch(*(x.to(device) for x in make_batch(9))), 31), run


@pytest.mark.parametrize("updates", ["fused", "sequential"])
@pytest.mark.parametrize(
    ("settings", "tolerance", "turn"),
    [
        ({"channels_last": True}, 1e-4, 1e-4),
        ({"fused_adam": True}, 1e-5, 1e-4),
        ({"precision": "bfloat16"}, 0.02, 0.2),
        ({"precision": "bfloat16", "channels_last": True, "fused_adam": True}, 0.02, 0.2),
    ],
    ids=["channels last", "fused Adam", "bfloat16", "all"],
)
def test_losses_and_gradients_stay_within_the_stated_tolerance_of_float32_eager(
    trained: State, updates: str, settings: dict[str, Leaf], tolerance: float, turn: float
) -> None:
    """Losses to `tolerance`, relative; gradients by one minus the cosine of their angle, `turn`.

    In bfloat16 the cycles' gradients are those of an absolute value, whose signs flip where an image is close to its
    round trip: the fewer images a batch has, the farther they turn.
    """
    if settings.get("precision") == "bfloat16" and not speed.bfloat16(CPU):
        pytest.skip("this processor has no bfloat16")
    (plain, reference), (fast, run) = one_step(trained, updates, {}), one_step(trained, updates, settings)
    names = [name for name in plain if name.startswith(("loss/", "critic/"))]
    assert len(names) > 20
    for name in names:
        torch.testing.assert_close(fast[name], plain[name], rtol=tolerance, atol=tolerance, msg=name)
    for part, network in reference.net.named_children():
        a, b = (torch.cat([p.grad.double().flatten() for p in n.parameters() if p.grad is not None])
                for n in (network, getattr(run.net, part)))  # fmt: skip
        assert 1 - torch.nn.functional.cosine_similarity(a, b, dim=0) < turn, part
    for name in fast:
        assert fast[name].isfinite(), name


def test_the_fused_adam_moves_weights_as_the_other_does() -> None:
    config = CONFIG.at("optim.lr", 1e-2).at("net.width", 0.0625)
    runs = [Run.start(config.at("speed.fused_adam", fused), CPU, Ranks()) for fused in (False, True)]
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        names = ("generator", "segmenter", "critic_p")
        gradients = {n: [torch.randn(p.shape, generator=g) for p in runs[0].players[n]] for n in names}
        for run in runs:
            run.players.move({n: [x.clone() for x in own] for n, own in gradients.items()}, Ranks())
    for a, b in zip(runs[0].net.parameters(), runs[1].net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("updates", ["fused", "sequential"])
def test_gradients_lie_in_memory_as_their_weights_do(trained: State, updates: str) -> None:
    _, run = one_step(trained, updates, {"channels_last": True, "fused_adam": True})
    for name, weight in run.net.named_parameters():
        assert weight.grad is not None
        assert weight.grad.stride() == weight.stride(), name


def test_a_resumed_run_keeps_the_optimiser_that_its_settings_ask_for(trained: State) -> None:
    _, run = one_step(trained, "fused", {"fused_adam": True})
    plain = Run.start(CONFIG, CPU, Ranks())
    plain.load(trained)
    assert run.players.optimiser("generator").param_groups[0]["fused"]
    assert not plain.players.optimiser("generator").param_groups[0]["fused"]
    moments = plain.players.optimiser("generator").state[plain.players["generator"][0]]
    assert float(moments["step"]) == 30


def test_a_state_is_loaded_in_place_where_a_recorded_step_reads_it(trained: State) -> None:
    run = Run.start(CONFIG, CPU, Ranks())
    run.advance(make_batch(1), 1)
    held = [*run.net.parameters(), *run.net.buffers(), *run.players.moments(), *run.pools.slots()]
    places = [x.data_ptr() for x in held]
    run.load(trained)
    now = [*run.net.parameters(), *run.net.buffers(), *run.players.moments(), *run.pools.slots()]
    assert [x.data_ptr() for x in now] == places


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("updates", ["fused", "sequential"])
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"precision": "tf32"}, 0.01),
        ({"precision": "bfloat16", "channels_last": True, "fused_adam": True}, 0.03),
        ({"channels_last": True, "fused_adam": True, "compile": True}, 0.001),
    ],
    ids=["tf32", "bfloat16", "compile"],
)
def test_on_a_card_losses_stay_within_the_stated_tolerance(
    trained: State, updates: str, settings: dict[str, Leaf], tolerance: float
) -> None:
    cuda = torch.device("cuda")
    (plain, _), (fast, _) = one_step(trained, updates, {}, cuda), one_step(trained, updates, settings, cuda)
    for name in (name for name in plain if name.startswith(("loss/", "critic/"))):
        torch.testing.assert_close(fast[name], plain[name], rtol=tolerance, atol=tolerance, msg=name)


def test_float32_means_float32_though_torch_lets_convolutions_on_cards_use_tf32() -> None:
    speed.arrange(CONFIG.speed.at("precision", "tf32"))
    assert torch.backends.cudnn.allow_tf32
    speed.arrange(CONFIG.speed)
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("speed.graphs", True, "CUDA device"),
        ("speed.precision", "tf32", "NVIDIA"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused_by_setting_rule_and_remedy(setting: str, value: Leaf, rule: str) -> None:
    with pytest.raises(InputError, match=rf"(?s){setting}.*{rule}"):
        Run.start(CONFIG.at(setting, value), CPU, Ranks())


def test_bfloat16_without_units_for_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "bfloat16", lambda device: False)
    with pytest.raises(InputError, match=r"(?s)speed.precision.*bfloat16.*float32"):
        Run.start(CONFIG.at("speed.precision", "bfloat16"), CPU, Ranks())


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "compiler", lambda: None)
    with pytest.raises(InputError, match=r"(?s)speed.compile.*g\+\+"):
        Run.start(CONFIG.at("speed.compile", True), CPU, Ranks())


def test_both_kinds_of_memory_running_out_are_known_and_other_errors_are_not_taken_for_them() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert speed.out_of_memory(caught.value)
    assert speed.out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not speed.out_of_memory(RuntimeError("shape mismatch"))
