"""How much memory a process may still take.

Knows Linux' accounts of the machine and of a container; must not know what the memory is for.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")


def available() -> int:
    """Bytes of memory that this process may still take: what the machine has, within what its container may use."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):  # not Linux
        free = _table(Path("/proc/meminfo"))["MemAvailable"] * 1024
    for limit, used, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        with suppress(OSError, ValueError):  # no such version of control groups, or "max"
            most, taken = (int((GROUP / name).read_text()) for name in (limit, used))
            free = min(
                free, most - taken + _table(GROUP / stat).get("inactive_file", 0)
            )  # files read, let go of at need
    return max(0, free)


def _table(path: Path) -> dict[str, int]:
    """A name and a number a line."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) for row in rows}
