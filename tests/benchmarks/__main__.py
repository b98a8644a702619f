"""Benchmarks as ratios measured side by side in one run: `make bench`, or `make bench ONLY=storage` for one family.

Prints a table and writes build/bench.json. A machine's absolute speed is noise here; only what is measured against the
same machine in the same minute is reported.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from engine_bench import engine
from ingest_bench import ingest_memory
from monitor_bench import monitor
from predict_bench import predict
from preprocess_bench import preprocess
from rich.console import Console
from rich.table import Table
from run_bench import run
from stabilisers_bench import stabilisers
from step_bench import step
from storage_bench import storage
from vessels_bench import vessels

FAMILIES = {
    family.__name__: family
    for family in (storage, preprocess, vessels, ingest_memory, step, stabilisers, monitor, run, predict, engine)
}


def main() -> None:
    """Run the families that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted(FAMILIES))
    only = parser.parse_args().only
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as scratch:
        results = [r for name, family in FAMILIES.items() if only in (None, name) for r in family(Path(scratch))]
    table = Table("name", "ratio", "unit", "against", "detail")
    for result in results:
        table.add_row(result.name, f"{result.ratio:.3g}", result.unit, result.against, result.detail)
    Console(width=120).print(table)
    out = Path("build") / "bench.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps([asdict(r) for r in results], indent=2))


if __name__ == "__main__":
    main()
