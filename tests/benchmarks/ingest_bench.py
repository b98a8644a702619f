"""What an ingest takes: memory that does not grow with the cohort, and time that shrinks with processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from measure import Result

from slicestore.geometry import Geometry
from slicestore.inputs import Input
from slicestore.volume import Volume, write

SHAPE = (120, 512, 512)
REPEATS = 3
SCRIPT = """
import json, sys, time
from pathlib import Path
from slicestore.ingest import ingest
from slicestore.inputs import Input
from slicestore.settings import Preprocessing
from slicestore.spread import here, processes

store, count, rows = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
inputs = [Input(domain, name, Path(image), label and Path(label)) for domain, name, image, label in rows]
began = time.perf_counter()
ingest(inputs, store, Preprocessing(), spread=processes(count) if count else here)
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
print(json.dumps({"seconds": time.perf_counter() - began, "peak_mb": int(peak.split()[1]) / 1024}))
"""
"""VmHWM and not getrusage, whose peak a fresh process inherits from the one that started it."""


def ingest_memory(scratch: Path) -> Iterator[Result]:
    """Peak memory with sixteen subjects against four of the same size; and two processes against one.

    Against two it would be 1.1: the allocator keeps what the first volume of a kind left and the next one fills.
    """
    raw = _cohort(scratch / "raw", 16)
    few, many = (_run(scratch, subjects, 0)["peak_mb"] for subjects in (raw[:4], raw))
    size = f"{' x '.join(map(str, SHAPE))} int16, {np.prod(SHAPE) * 2 / 1e6:.0f} MB each"
    detail = f"{many:.0f} against {few:.0f} MB; {size}"
    yield Result("ingest.peak_memory_16_vs_4_subjects", many / few, "times the memory", "4 subjects", detail)
    pairs = [[_run(scratch, raw[:8], count)["seconds"] for count in (1, 2)] for _ in range(REPEATS)]
    one, two = (median(times) for times in zip(*pairs, strict=True))
    detail = f"{two:.1f} against {one:.1f} s for 8 subjects, their start included"
    yield Result("ingest.speed_2_processes", one / two, "times the speed", "1 process", detail)


def _cohort(folder: Path, subjects: int) -> list[Input]:
    """Noise with a few tubes; every other subject is a target."""
    folder.mkdir()
    inputs = []
    label = np.zeros(SHAPE, np.uint8)
    for row in range(20, SHAPE[1], 24):
        label[:, row : row + 4, row : row + 3] = 1
    for number in range(subjects):
        rng = np.random.default_rng(number)
        image = rng.normal(200, 20, SHAPE).astype(np.float32) + 200 * label
        grid = Geometry(SHAPE[::-1], (0.4, 0.4, 1.0))
        source = number % 2 == 0
        write(Volume(image.astype(np.int16), grid), folder / f"{number}.nii")
        if source:
            write(Volume(label, grid), folder / f"{number}_label.nii")
        mask = folder / f"{number}_label.nii" if source else None
        inputs.append(Input("source" if source else "target", str(number), folder / f"{number}.nii", mask))
    return inputs


def _run(scratch: Path, inputs: list[Input], count: int) -> dict[str, float]:
    """Ingest into a new store in a fresh interpreter, by `count` processes or (0) in that interpreter itself."""
    store = scratch / f"{len(list(scratch.iterdir()))}.zarr"
    rows = [[i.domain, i.subject, str(i.image), str(i.label) if i.label else None] for i in inputs]
    line = [sys.executable, "-c", SCRIPT, str(store), str(count), json.dumps(rows)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    taken: dict[str, float] = json.loads(done.stdout)
    return taken
