"""The store against other ways to keep the same slices: loading a cohort, and drawing random batches from it."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import lmdb
import numpy as np
import zarr
from measure import REPEATS, Result, paired, seconds

from slicestore.geometry import Geometry
from slicestore.ingest import ingest
from slicestore.inputs import Input
from slicestore.selection import Name
from slicestore.settings import Preprocessing
from slicestore.staging import TYPES, Staged, stage
from slicestore.store import DOMAINS, Store
from slicestore.volume import Volume, write

VOLUMES, SLICES, SIZE = 6, 120, 256
FIELD = 250, 188
"""Rows and columns that are no frame: the field of view of the study's TOF at the training spacing."""
BATCH = 8
MANY, FEW, FEWEST = 200, 20, 4
"""Batches in a measurement: of readers that take microseconds a slice, a tenth of a millisecond, and milliseconds."""
TIME = "times the time"

Draw = Callable[[np.ndarray], object]


def storage(scratch: Path) -> Iterator[Result]:
    """Load and draw from a cohort of six and six heads; everything warm, in the page cache."""
    store = cohort(scratch)
    with ExitStack() as stack:
        peers = Peers.write(scratch, store, stack)
        yield from _loads(store, peers, scratch)
        yield from _batches(store, peers)


def cohort(scratch: Path) -> Store:
    """Heads of noise, skull and vessels, ingested the ordinary way; every subject trains."""
    inputs = []
    for domain in DOMAINS:
        for number in range(VOLUMES):
            image, label = _head(np.random.default_rng([number, len(domain), ord(domain[0])]))
            paths = [scratch / f"{domain}-{number}{kind}.nii" for kind in ("", "_label")]
            write(image, paths[0])
            write(label, paths[1])
            inputs.append(Input(domain, f"{domain}-{number}", paths[0], paths[1]))
    store = ingest(inputs, scratch / "cohort.zarr", Preprocessing(size=SIZE))
    return replace(store, entries=tuple(replace(entry, split="train") for entry in store.entries))


def _head(rng: np.random.Generator) -> tuple[Volume, Volume]:
    """An ellipsoid of tissue with a bright rim and 12 vessels, Rician noise; int16."""
    height, width = FIELD
    z, y, x = np.ogrid[-1 : 1 : SLICES * 1j, -1 : 1 : height * 1j, -1 : 1 : width * 1j]
    radius = (z / 1.3) ** 2 + (y / 0.85) ** 2 + (x / 0.9) ** 2
    label = np.zeros(radius.shape, dtype=np.uint8)
    for _ in range(12):
        (cy, cx), (dy, dx) = rng.uniform(-0.5, 0.5, 2), rng.uniform(-0.3, 0.3, 2)
        label |= (y - cy - dy * z) ** 2 + (x - cx - dx * z) ** 2 < rng.uniform(0.008, 0.03) ** 2
    signal = 120 * (radius < 1) + 80 * ((radius > 0.9) & (radius < 1)) + 200 * label
    noise = 8 * rng.standard_normal((2, *radius.shape), dtype=np.float32)
    geometry = Geometry((width, height, SLICES), (0.89, 0.89, 1.0), (0.0, 0.0, 0.0))
    return Volume(np.round(np.hypot(signal + noise[0], noise[1])).astype(np.int16), geometry), Volume(label, geometry)


@dataclass(frozen=True)
class Peers:
    """The same arrays kept otherwise: images and labels of the source domain, images of the target domain."""

    arrays: dict[str, np.ndarray]
    npy: dict[str, Path]
    lmdb: Any
    hdf5: Any
    zarr: dict[str, list[Any]]
    """One array a volume, as the store lays them out."""

    @classmethod
    def write(cls, scratch: Path, store: Store, stack: ExitStack) -> Peers:
        """Write them, each with its library's ordinary settings: a slice is a value, a chunk."""
        staged = {domain: stage(store, domain, "train", share=False) for domain in DOMAINS}
        arrays = {f"{domain}-image": s.image for domain, s in staged.items()}
        arrays |= {f"{domain}-label": s.label for domain, s in staged.items() if s.label is not None}
        npy = {name: scratch / f"{name}.npy" for name in arrays}
        database = stack.enter_context(lmdb.open(str(scratch / "slices.lmdb"), map_size=1 << 31, subdir=False))
        hdf5 = stack.enter_context(h5py.File(scratch / "slices.h5", "w"))
        for name, array in arrays.items():
            np.save(npy[name], array)
            hdf5.create_dataset(name, data=array, chunks=(1, SIZE, SIZE), compression="lzf", shuffle=True)
            with database.begin(write=True) as transaction:
                for index, one in enumerate(array):
                    transaction.put(f"{name}-{index:06d}".encode(), one.tobytes())
        hdf5.flush()
        plain = {
            f"{domain}-{kind}": [
                zarr.open_array(Path(store.path) / entry.group / kind, mode="r") for entry in store.select(domain)
            ]
            for domain in DOMAINS
            for kind in ("image", "label")
            if f"{domain}-{kind}" in arrays
        }
        return cls(arrays, npy, database, hdf5, plain)


# --- loading ----------------------------------------------------------------------------------------------------------


def _loads(store: Store, peers: Peers, scratch: Path) -> Iterator[Result]:
    def ours(threads: int | None = None) -> list[Staged]:
        return [stage(store, domain, "train", share=False, threads=threads) for domain in DOMAINS]

    size = sum(array.nbytes for array in peers.arrays.values()) / 1e6
    rest = sum(Path(store.path, name).stat().st_size for entry in store.entries for name in entry.objects) / 1e6
    detail = f"{size:.0f} MB ({rest:.0f} MB at rest, labels of both domains), warm, checksums verified"
    theirs: dict[str, tuple[str, Callable[[], object]]] = {
        "npy": ("numpy.load", lambda: [np.load(path) for path in peers.npy.values()]),
        "lmdb": ("LMDB, one value a slice", lambda: [_from_lmdb(peers, name) for name in peers.arrays]),
        "hdf5": ("HDF5, lzf, chunk = slice", lambda: [peers.hdf5[name][:] for name in peers.arrays]),
        "zarr": ("zarr-python, the same store", lambda: [a[:] for some in peers.zarr.values() for a in some]),
    }
    for name, (against, work) in theirs.items():
        yield _ratio(f"storage.load_vs_{name}", ours, work, TIME, against, f"{detail}; a thread a core against one")
    yield _ratio(
        "storage.load_vs_npy.one_thread",
        lambda: ours(1),
        theirs["npy"][1],
        TIME,
        "numpy.load",
        f"{detail}; one thread each",
    )
    yield _cold(store, peers, ours, theirs["npy"][1])
    yield from _attach(store, theirs["npy"][1], size)


def _cold(store: Store, peers: Peers, ours: Callable[[], object], theirs: Callable[[], object]) -> Result:
    """As after a restart: the files are dropped from the page cache before every load."""
    files = [Path(store.path, name) for entry in store.entries for name in entry.objects]
    times = []
    for _ in range(REPEATS):
        _drop(files)
        mine = seconds(ours)
        _drop(peers.npy.values())
        times.append((mine, seconds(theirs)))
    mine, other = (statistics.median(column) for column in zip(*times, strict=True))
    detail = f"cold: {mine:.2f} s against {other:.2f} s on this disk"
    return Result("storage.load_vs_npy.cold", mine / other, TIME, "numpy.load", detail)


def _drop(files: Iterable[Path]) -> None:
    """Have the system forget the content of files that are on the disk."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _from_lmdb(peers: Peers, name: str) -> np.ndarray:
    out = np.empty_like(peers.arrays[name])
    with peers.lmdb.begin(buffers=True) as transaction:
        for index, one in enumerate(out):
            one[:] = np.frombuffer(transaction.get(f"{name}-{index:06d}".encode()), out.dtype).reshape(one.shape)
    return out


OTHER = """
import sys, time
from dataclasses import replace
from slicestore.staging import stage
from slicestore.store import DOMAINS, Store
store = Store.open(sys.argv[1])
store = replace(store, entries=tuple(replace(entry, split="train") for entry in store.entries))
began = time.perf_counter()
staged = [stage(store, domain, "train") for domain in DOMAINS]
print(time.perf_counter() - began if all(s.where == "shared" for s in staged) else "nan")
"""


def _attach(store: Store, theirs: Callable[[], object], size: float) -> Iterator[Result]:
    """What the second process on a machine waits; no row where /dev/shm has no room."""
    held = [stage(store, domain, "train") for domain in DOMAINS]
    if any(staged.where != "shared" for staged in held):
        return
    command = [sys.executable, "-c", OTHER, str(store.path)]
    waits = sorted(float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(REPEATS))
    _, load = paired(lambda: None, theirs)
    detail = f"a second process maps the {size:.0f} MB that the first has staged: {waits[REPEATS // 2] * 1e3:.1f} ms"
    yield Result("storage.attach_vs_npy", waits[REPEATS // 2] / load, TIME, "numpy.load", detail)


# --- batches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """Ways to bring some slices of the source domain and their labels into two arrays."""

    peers: Peers
    staged: Staged
    maps: dict[str, np.ndarray]
    out: dict[Name, np.ndarray]

    @classmethod
    def of(cls, peers: Peers, staged: Staged) -> Drawing:
        """Open what has to be open."""
        maps = {name: np.load(path, mmap_mode="r") for name, path in peers.npy.items()}
        out: dict[Name, np.ndarray] = {name: np.empty((BATCH, SIZE, SIZE), kind) for name, kind in TYPES.items()}
        return cls(peers, staged, maps, out)

    def ours(self, index: np.ndarray) -> None:
        """As batches are gathered for training, before they are normalised on the device."""
        for name, out in self.out.items():
            self.staged.take(name, index, out)

    def memcpy(self, index: np.ndarray) -> None:
        """As many bytes, in a row."""
        start = min(int(index[0]), VOLUMES * SLICES - BATCH)
        for name, out in self.out.items():
            np.copyto(out, self.peers.arrays[f"source-{name}"][start : start + BATCH])

    def npy_memmap(self, index: np.ndarray) -> None:
        """Fancy indexing into a mapped file."""
        for name in self.out:
            self.out[name] = self.maps[f"source-{name}"][index]

    def lmdb(self, index: np.ndarray) -> None:
        """Values without a copy, then one."""
        with self.peers.lmdb.begin(buffers=True) as transaction:
            for name, out in self.out.items():
                for one, row in zip(out, index, strict=True):
                    stored = transaction.get(f"source-{name}-{row:06d}".encode())
                    np.copyto(one, np.frombuffer(stored, out.dtype).reshape(one.shape))

    def hdf5(self, index: np.ndarray) -> None:
        """Slice by slice into place."""
        for name, out in self.out.items():
            for place, row in enumerate(index):
                self.peers.hdf5[f"source-{name}"].read_direct(out, np.s_[int(row)], np.s_[place])

    def zarr(self, index: np.ndarray) -> None:
        """Slice by slice."""
        for name, out in self.out.items():
            for one, row in zip(out, index, strict=True):
                np.copyto(one, self.peers.zarr[f"source-{name}"][row // SLICES][int(row % SLICES)])


def _batches(store: Store, peers: Peers) -> Iterator[Result]:
    drawing = Drawing.of(peers, stage(store, "source", "train", share=False))
    stream = Drawing.of(peers, stage(store, "source", "train", share=False, memory=0))
    what = f"{BATCH} slices of {SIZE} x {SIZE} with labels, random, warm, one thread"
    compressed = (
        ("hdf5", "HDF5, lzf, chunk = slice", drawing.hdf5, FEW),
        ("zarr", "zarr-python, the same store", drawing.zarr, FEWEST),
    )
    for name, against, theirs, count in (
        ("memcpy", "a copy of as many bytes in a row", drawing.memcpy, MANY),
        ("npy_memmap", "numpy memmap", drawing.npy_memmap, MANY),
        ("lmdb", "LMDB, one value a slice", drawing.lmdb, MANY),
        *compressed,
    ):
        work = _drawn(drawing.ours, MANY), _drawn(theirs, count)
        yield _ratio(f"storage.batch_vs_{name}", *work, TIME, against, what, MANY / count)
    for name, against, theirs, count in compressed:
        work = _drawn(stream.ours, FEW), _drawn(theirs, count)
        yield _ratio(f"storage.stream_vs_{name}", *work, TIME, against, f"{what}, read from the shards", FEW / count)


def _drawn(draw: Draw, count: int) -> Callable[[], object]:
    """Draw that many batches, the same ones every time."""
    order = [np.random.default_rng(n).permutation(VOLUMES * SLICES)[:BATCH] for n in range(count)]
    return lambda: [draw(index) for index in order]


def _ratio(
    name: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    unit: str,
    against: str,
    detail: str,
    more: float = 1,
) -> Result:
    """`more`: how many times as much work ours did."""
    ours(), theirs()
    mine, other = paired(ours, theirs)
    return Result(name, mine / other / more, unit, against, detail)
