"""The benchmarks of a step: counts against hand-worked ones, and the table on a machine that has next to nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from equipoise.config import PUBLISHED
from equipoise.speed import bfloat16

SCRIPT = Path(__file__).parent / "benchmarks" / "step_table.py"
CPU = torch.device("cpu")


class Cost(NamedTuple):
    """Operations of one forward pass for one image, and the first convolution's share of them."""

    all: int
    first: int


def conv(inputs: int, outputs: int, kernel: int, side: int) -> int:
    """Two operations for each product of a convolution whose output has this side."""
    return 2 * inputs * outputs * kernel**2 * side**2


def residuals(channels: list[int], side: int) -> Iterator[int]:
    """3 x 3 residual units, from each channel count to the next."""
    for inputs, outputs in pairwise(channels):
        yield from (conv(inputs, outputs, 3, side), conv(outputs, outputs, 3, side))


def costs(size: int, width: float = 1.0, *, last: int = 7) -> dict[str, Cost]:
    """All networks, layer by layer as the paper has them.

    `last` is the kernel with which each output pixel of the last convolution of G and U is computed: 7 as published,
    10 in blocks of 4 x 4 pixels (`layers.ToMap`).
    """
    c = {n: max(2, round(n * width)) for n in (16, 32, 64, 128, 256, 512)}
    h, q, e = size // 2, size // 4, size // 8
    up = [conv(c[128], c[64], 3, q), conv(c[64], c[32], 3, h)]  # transposed: a product for each input pixel
    generator = [conv(1, c[32], 7, size), conv(c[32], c[64], 3, h), conv(c[64], c[128], 3, q)]
    generator += [*residuals([c[128]] * 10, q), *up, conv(c[32], 1, last, size)]
    encoder = [conv(1, c[16], 7, size), *residuals([c[16]] * 2, size), *residuals([c[16], c[32]], h)]
    encoder += [*residuals([c[32], c[64], c[64]], q)]
    encoder += [*residuals([c[64], c[128], c[128], *[c[256]] * 4, *[c[512]] * 4], e), *[conv(c[512], c[512], 3, e)] * 2]
    decoder = [conv(c[512], c[128], 3, e), *residuals([c[128]] * 5, e), conv(c[128], c[64], 3, e)]
    decoder += [conv(c[64], c[64], 3, q), conv(c[64], c[32], 3, h), conv(c[32], 1, last, size)]
    segmenter = [conv(c[512], 2, 1, e)]

    def critic(inputs: int, outputs: int) -> list[int]:
        sides = [h + 1, (h + 1) // 2 + 1, ((h + 1) // 2 + 1) // 2 + 1]
        sides += [sides[2] + 1, sides[2] + 2]
        channels = [inputs, c[64], c[128], c[256], c[512], outputs]
        return [conv(channels[k], channels[k + 1], 4, sides[k]) for k in range(5)]

    layers = {"G": generator, "E": encoder, "U": decoder, "C": segmenter}
    layers |= {"D_t": critic(1, 1), "D_s": critic(1, 2), "D_p": critic(2, 1)}
    return {name: Cost(sum(own), own[0]) for name, own in layers.items()}


ByHand = Callable[[dict[str, Cost]], int]


def fused_step(of: dict[str, Cost]) -> int:
    """A pair of slices. A backward pass costs a forward one for the weights, and one for what they were shown."""
    g, e, u, c, d_t, d_s, d_p = (of[name] for name in ("G", "E", "U", "C", "D_t", "D_s", "D_p"))
    forward = 2 * (g.all + e.all + u.all + 2 * c.all) + d_t.all + d_s.all + 2 * d_p.all
    images = 2 * g.all + (2 * g.all - g.first) + 4 * u.all + e.all + d_t.all + d_s.all
    meaning = 2 * (2 * e.all - e.first) + 8 * c.all + u.all + d_s.all + 2 * d_p.all
    critics = sum(seen * (3 * d.all - d.first) for seen, d in ((2, d_t), (3, d_s), (4, d_p)))
    return forward + images + meaning + critics


def sequential_step(of: dict[str, Cost]) -> int:
    """The same for the seven updates in their order, each with the forward passes that it needs."""
    g, e, u, c, d_t, d_s, d_p = (of[name] for name in ("G", "E", "U", "C", "D_t", "D_s", "D_p"))
    both_p = 2 * (g.all + 2 * e.all + 2 * c.all + 2 * (3 * d_p.all - d_p.first))
    return sum(
        (
            2 * (g.all + e.all + u.all) + d_t.all + 2 * (2 * g.all - g.first) + e.all + u.all + d_t.all,
            2 * (3 * d_t.all - d_t.first),
            *(2 * (g.all + e.all + u.all + 2 * c.all), d_s.all + 2 * d_p.all),
            *(2 * (2 * e.all - e.first) + g.all + 2 * u.all + 8 * c.all, d_s.all + 2 * d_p.all),
            2 * (g.all + e.all + u.all) + d_s.all + 2 * (2 * u.all - u.first) + g.all + d_s.all,
            g.all + e.all + u.all + 3 * (3 * d_s.all - d_s.first),
            both_p,
        )
    )


@pytest.fixture(scope="module")
def table() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("step_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["step_table"] = module = importlib.util.module_from_spec(spec)  # where dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_the_hand_worked_costs_are_the_published_ones() -> None:
    found = {name: cost.all / 1e9 for name, cost in costs(256).items()}
    published = {"G": 24.6, "E": 58.2, "U": 4.9, "D_t": 7.15}
    assert {name: found[name] for name in published} == pytest.approx(published, rel=0.003)


@pytest.mark.parametrize(("updates", "by_hand"), [("fused", fused_step), ("sequential", sequential_step)])
def test_a_step_needs_the_operations_that_its_schedule_says(table: ModuleType, updates: str, by_hand: ByHand) -> None:
    config = PUBLISHED.at("updates", updates).at("net.width", 0.125).at("batch", 2)
    assert table.flops(config, 32, CPU) == 2 * by_hand(costs(32, 0.125, last=10))


def test_the_fused_schedule_needs_little_more_than_half_of_the_published_one_s_operations() -> None:
    of = costs(256)
    assert fused_step(of) / sequential_step(of) == pytest.approx(0.52, abs=0.005)


def test_the_table_needs_torch_numpy_and_zarr_alone_and_says_why_a_row_cannot_run(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    words = ["--device", "cpu", "--size", "32", "--width", "0.0625", "--batch", "2", "--steps", "1", "--profile"]
    alone = {"PATH": str(tmp_path), "OMP_NUM_THREADS": "1"}  # and no compiler
    line = [sys.executable, "-c", LENT, str(SCRIPT), *words, "--out", str(out)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    reasons = {row["setting"].strip(): row["reason"] for row in rows if row["schedule"] == "fused"}
    assert [row["schedule"] for row in rows] == ["fused"] * len(reasons) + ["sequential"] * len(reasons)
    runs = {"float32, eager"} | ({"bf16", "bf16, channels-last", "+ fused Adam"} if bfloat16(CPU) else set())
    assert {setting for setting, reason in reasons.items() if not reason} == runs
    assert "Ampere" in reasons["tf32"]
    assert "compiler" in reasons["+ compile"]
    assert "CUDA" in reasons["+ graphs"]
    for row in rows:
        assert any(row["setting"] in line and row["schedule"] in line for line in done.stdout.splitlines())
        assert row["reason"] or row["minutes_40k"] == pytest.approx(row["ms"] * 40_000 / 60_000)
        assert row["reason"] or row["images_per_second"] == pytest.approx(4000 / row["ms"])
    assert "aten::convolution_backward" in done.stdout


def absent() -> list[str]:
    """Top-level modules of all installed packages but torch, numpy, zarr and what these three require."""
    wanted, seen = ["torch", "numpy", "zarr"], set[str]()
    while wanted:
        name = wanted.pop()
        if name not in seen:
            seen.add(name)
            with suppress(importlib.metadata.PackageNotFoundError):  # of another platform
                wanted += [plain(need) for need in importlib.metadata.requires(name) or [] if "extra ==" not in need]
    modules = importlib.metadata.packages_distributions()
    return sorted(module for module, packages in modules.items() if not seen & {plain(p) for p in packages})


def plain(requirement: str) -> str:
    """The package's name, as it is compared."""
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found.group()).lower()


LENT = f"""
import importlib.machinery, runpy, sys
class Lent(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {absent()!r} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Lent
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A machine to which only those were brought: all else is not found."""
