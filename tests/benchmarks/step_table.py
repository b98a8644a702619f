"""What a training step costs in every setting: one command for a machine with a GPU.

    python tests/benchmarks/step_table.py                                       # an NVIDIA card, under six minutes
    python tests/benchmarks/step_table.py --profile                             # and what is left, operator by operator
    python tests/benchmarks/step_table.py --device cpu --size 64 --width 0.125  # a look at it without one

Prints a table and writes build/step_table.json. Knows synthetic tensors alone: no store, no Ray; torch, numpy and what
zarr brings are enough, and nothing needs to be installed. A row that cannot run says why, and the table goes on.

A step is one optimisation of all networks on `--batch` slices of each domain. Columns: images are slices of both
domains; memory is the most that tensors took at once; the share is that of the rate at which a large matrix product
runs here at the same precision (MFU), by the operations that the row's own schedule needs, see `flops`.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("platform", "storage")]  # on a lent machine nothing is installed

from equipoise.config import PUBLISHED, RunConfig, SpeedConfig  # noqa: E402
from equipoise.config_base import Leaf  # noqa: E402
from equipoise.ranks import Ranks  # noqa: E402
from equipoise.speed import arrange  # noqa: E402
from equipoise.step import Batch  # noqa: E402
from equipoise.train import Run  # noqa: E402
from slicestore.errors import InputError  # noqa: E402

Changes = Mapping[str, Leaf]
BF16: Changes = {"speed.precision": "bfloat16"}
LAST: Changes = {**BF16, "speed.channels_last": True}
ADAM: Changes = {**LAST, "speed.fused_adam": True}
SETTINGS: Mapping[str, Changes] = {
    "float32, eager": {},
    "tf32": {"speed.precision": "tf32"},
    "bf16": BF16,
    "bf16, channels-last": LAST,
    "  + fused Adam": ADAM,
    "  + graphs": {**ADAM, "speed.graphs": True},
    "  + compile": {**ADAM, "speed.compile": True},
    "  + compile, graphs": {**ADAM, "speed.compile": True, "speed.graphs": True},
}
"""From bf16 on each adds to the one above, but that graphs and compilation come alone before they come together. What
must be compiled is last, since it takes long."""
SCHEDULES = ("fused", "sequential")
WARM_UP = 4
BLOCKS = 5
LONG_RUN = 40_000
ROW_SECONDS = 100.0
"""What a row may take, its compilation included."""
TOP = 25
WAITS = {"cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"}
"""Calls in which the host waits for the device; in a step there should be none."""
LONGEST = 120


@dataclass(frozen=True)
class Row:
    """One line of the table; a reason stands for numbers that could not be had."""

    schedule: str
    setting: str
    reason: str = ""
    ms: float | None = None
    images_per_second: float | None = None
    memory_gib: float | None = None
    matmul_share: float | None = None
    minutes_40k: float | None = None

    def line(self) -> str:
        """The row as text."""
        numbers = (self.ms, self.images_per_second, self.memory_gib, self.matmul_share, self.minutes_40k)
        cells = ("-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in numbers)
        return f"{self.schedule:11}{self.setting:22}" + (self.reason or "".join(f"{cell:>11}" for cell in cells))


HEADER = f"{'schedule':11}{'setting':22}" + "".join(
    f"{name:>11}" for name in ("ms/step", "images/s", "GiB", "of matmul", "min/40k")
)


class Stepper:
    """A fresh run on one synthetic batch, a step per call."""

    def __init__(self, config: RunConfig, size: int, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)
        images = torch.rand((2, config.batch, config.net.channels, size, size), generator=draw) * 2 - 1
        label = torch.randint(config.net.classes, (config.batch, size, size), generator=draw)
        self.batch = Batch(images[0].to(device), label.to(device), images[1].to(device))
        self.run = Run.start(config, device, Ranks())
        self.number = 0

    def __call__(self) -> dict[str, torch.Tensor]:
        """Train one step; its signals, on the device."""
        self.number += 1
        return self.run.advance(self.batch, self.number)

    def check(self) -> None:
        """Train one step more and raise where it gives no numbers: its time would be that of something else."""
        bad = [name for name, value in self().items() if not bool(torch.isfinite(value))]
        if bad:
            raise ArithmeticError(f"not finite after {self.number} steps: {', '.join(bad)}")


class FlopCounter(TorchDispatchMode):
    """Adds up what torch's own formulae say of each operator: convolutions and matrix products, forward and backward.

    `FlopCounterMode` has the same formulae and follows modules too, by hooks that refuse partial gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call an operator and count it."""
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def flops(config: RunConfig, size: int, device: torch.device) -> float:
    """Operations of one step, 2 for a multiplication and its addition.

    Counted on the plain float32 step of the same schedule, with two slices, in which it needs the least memory:
    precision and memory format change none, and what runs compiled or recorded would go uncounted.
    """
    plain = {f"speed.{name}": leaf for name, leaf in SpeedConfig().flat().items()}
    few = min(config.batch, 2)
    stepper = Stepper(config.having({**plain, "batch": few}), size, device)
    with FlopCounter() as counter:
        stepper()
    return float(counter.total / few * config.batch)


def block_seconds(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds of one call, the mean of `times` in a row; a GPU's by its own clock."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - began) / times
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / times


def matmul_rate(speed: SpeedConfig, device: torch.device) -> float:
    """FLOP/s of a large square product of random matrices at this precision, the median of several."""
    side, times = (8192, 10) if device.type == "cuda" else (2048, 2)
    a, b = torch.randn(2, side, side, device=device).to(
        getattr(torch, speed.precision, torch.float32)
    )  # tf32 is no type
    arrange(speed)
    a @ b
    taken = statistics.median(block_seconds(lambda: a @ b, times, device) for _ in range(BLOCKS))
    return 2 * side**3 / taken


def measure(config: RunConfig, size: int, device: torch.device, steps: int) -> tuple[float, float | None]:
    """Seconds a step and GiB at most; what the first steps prepare counts as memory and not as time."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    stepper = Stepper(config, size, device)
    for _ in range(min(WARM_UP, steps)):
        stepper()
    each = max(1, steps // BLOCKS)
    seconds = statistics.median(block_seconds(stepper, each, device) for _ in range(min(BLOCKS, steps)))
    stepper.check()
    return seconds, torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer, a compilation above all.

    Raises:
        TimeoutError: it did, whatever a library made of the interruption.
    """
    if seconds <= 0:
        raise TimeoutError("no time was left, see --limit")
    late = TimeoutError(f"longer than {seconds:.0f} s")
    ends = time.monotonic() + seconds

    def stop(*_: object) -> None:
        raise late

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Exception as error:
        if time.monotonic() < ends:
            raise
        raise late from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def rows(base: RunConfig, size: int, device: torch.device, steps: int, limit: float) -> Iterator[Row]:
    """Every setting under every schedule, each on a fresh run."""
    deadline, rates = time.monotonic() + limit, dict[str, float]()
    for schedule in SCHEDULES:
        config = base.at("updates", schedule)
        work = flops(config, size, device)
        for setting, changes in SETTINGS.items():
            mine = config.having(changes)
            precision = mine.speed.precision
            try:
                with at_most(min(ROW_SECONDS, deadline - time.monotonic())):
                    seconds, memory = measure(mine, size, device, steps)
                    rates[precision] = rates.get(precision) or matmul_rate(mine.speed, device)
            except Exception as error:  # whatever a library raises: the next setting may run
                yield Row(schedule, setting, reason(error))
            else:
                speed, share = 2 * base.batch / seconds, work / seconds / rates[precision]
                yield Row(schedule, setting, "", seconds * 1000, speed, memory, share, seconds * LONG_RUN / 60)
            torch.compiler.reset()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """One line for a row."""
    first = next(iter(str(error).strip().splitlines()), "")
    told = first if isinstance(error, InputError) else f"{type(error).__name__}: {first}"
    return told if len(told) <= LONGEST else f"{told[:LONGEST]}..."


def profile(config: RunConfig, size: int, device: torch.device) -> str:
    """What a step's time goes to: operators by their own time, then with the shapes they met; kernels, if recorded."""
    cuda = device.type == "cuda"
    stepper = Stepper(config, size, device)
    for _ in range(WARM_UP):
        stepper()
    by_clock = block_seconds(stepper, WARM_UP, device) * 1000
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities, record_shapes=True) as seen:
        stepper()
        if cuda:
            torch.cuda.synchronize(device)
    events = seen.key_averages(group_by_input_shape=True)
    waits = sum(event.count for event in events if event.key in WAITS)
    if cuda:
        spent = [(event, event.self_device_time_total / 1000) for event in events]
        operators = [(event, ms) for event, ms in spent if event.device_type == DeviceType.CPU]
        kernels = [(event, ms) for event, ms in spent if event.device_type != DeviceType.CPU]
        launched = sum(ms for _, ms in operators) > 0.9 * sum(ms for _, ms in kernels)  # not so in a recorded step
        spent = operators if launched else kernels
    else:
        spent = [(event, event.self_cpu_time_total / 1000) for event in events]
    names = tally((event.key, event.count, ms) for event, ms in spent)
    shaped = tally((f"{event.key} {shapes(event.input_shapes)}", event.count, ms) for event, ms in spent)
    total = sum(ms for _, ms in spent)
    head = f"{total:.1f} ms of {device.type} time in a step, {by_clock:.1f} by the clock; the host waits {waits} times"
    return f"{head}\n{names}\n\n{shaped}"


def tally(spent: Iterable[tuple[str, int, float]]) -> str:
    """The names that most milliseconds go to, as text: share, time, calls."""
    times, calls = Counter[str](), Counter[str]()
    for name, count, ms in spent:
        times[name] += ms  # type: ignore[assignment]  # a counter of floats
        calls[name] += count
    total = sum(times.values()) or 1
    return "\n".join(
        f"{ms / total:7.1%} {ms:10.2f} ms {calls[name]:6} x {name[:100]}" for name, ms in times.most_common(TOP)
    )


def shapes(given: list[list[int]]) -> str:
    """Input shapes in short, without those of scalars."""
    return " ".join("x".join(map(str, one)) for one in given if one)


def machine(device: torch.device) -> str:
    """What this ran on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main() -> None:
    """Print the table, then the profile if it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=4, help="slices of each domain in a step")
    parser.add_argument("--size", type=int, default=256, help="pixels along a side")
    parser.add_argument("--width", type=float, default=1.0, help="factor on all channels")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each row")
    parser.add_argument("--limit", type=float, default=330, help="seconds after which no row begins")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "step_table.json", help="the same as JSON")
    parser.add_argument(
        "--profile", action="store_true", help="list operators: fused, the first setting and the quickest"
    )
    told = parser.parse_args()
    device = torch.device(told.device)
    torch.set_flush_denormal(True)
    base = PUBLISHED.having({"batch": told.batch, "net.width": told.width})
    print(f"{machine(device)}; batch {told.batch}, {told.size} x {told.size}, width {told.width:g}")
    print(HEADER, flush=True)
    done = []
    for row in rows(base, told.size, device, told.steps, told.limit):
        print(row.line(), flush=True)
        done.append(row)
    told.out.parent.mkdir(parents=True, exist_ok=True)
    asked = {name: value for name, value in vars(told).items() if name != "out"}
    found = {"machine": machine(device), **asked, "rows": [asdict(row) for row in done]}
    told.out.write_text(json.dumps(found, indent=2))
    if told.profile:
        ran = [row for row in done if row.ms is not None and row.schedule == "fused"]
        for setting in {row.setting: None for row in (*ran[:1], *sorted(ran, key=lambda row: row.ms or 0)[:1])}:
            print(f"\nfused, {setting.strip()}: {profile(base.having(SETTINGS[setting]), told.size, device)}")


if __name__ == "__main__":
    main()
