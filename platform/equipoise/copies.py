"""A copy of a run's folder elsewhere, from which the run goes on where its own folder is lost.

Knows what of a record is copied, in which order, and when a copy counts; must not know how a run trains.

    <place>/<run>/copied.json    written last: up to where the copy goes, and the checkpoints it holds
    <place>/<run>/...            the rest lies as in the run's folder

A checkpoint among the copies counts once `copied.json` names it: a copy is many objects, and only the replacing of one
is all or nothing. Everything else is safe to be ahead of it. Rows are only ever added, and those after the checkpoint
are dropped when a run goes on from there; what a run that went back from a divergence says anew is not, so such a run
first withdraws `copied.json`. The same checkpoints are kept there as here, so a copy is as bounded as the folder.

Copies are made in a thread, one at a time: training does not wait for them. A place that cannot be reached is tried
again at the next checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from equipoise import checkpoint
from equipoise.config import RunConfig
from equipoise.writing import told, write, write_bytes
from slicestore.errors import InputError
from slicestore.place import Place

PATIENCE_S = 300.0
"""So long the end of a run waits for its copy: a network file system may hang for ever."""
_EXTENT = "copied.json"
_STATE = "copies.json"
_TEXT = re.compile(  # copied at every turn
    r"(config|intake|environment|returns)\.json|changes\.diff|(signals|attempts|return-\d+)\.jsonl"
)
_PANEL = re.compile(r"panels/step-(\d+)\.png")
_WEIGHTS = re.compile(r"weights/step-\d+\.safetensors")
_CHECKPOINT = re.compile(r"step-\d+")
_PART = re.compile(r"shared\.pt|rank-\d+\.pt")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Extent:
    """How far a run's folder, or a copy of it, goes."""

    step: int
    """Of the newest checkpoint; 0 is none."""
    returns: int
    """Divergences that the run went back from."""
    ended: bool
    """Whether the verdict is there."""
    checkpoints: Mapping[str, Mapping[str, int]]
    """A checkpoint's name -> its files' names -> their bytes."""

    @property
    def order(self) -> tuple[bool, int, int]:
        """What is further has the larger one."""
        return self.ended, self.returns, self.step

    @classmethod
    def of(cls, folder: Path) -> Extent:
        """That of a run's folder.

        Raises:
            InputError: the disk refuses to tell.
        """
        with told(folder):
            found = checkpoint.complete(folder / "checkpoints")
            ended = (folder / "verdict.json").is_file()
            sizes = {c.name: {file.name: file.stat().st_size for file in sorted(c.iterdir())} for c in found}
        step = checkpoint.step_of(found[-1]) if found else 0
        return cls(step, len(_returned_to(folder)), ended, sizes)

    @classmethod
    def parsed(cls, data: Mapping[str, Any]) -> Extent:
        """The inverse of `asdict`.

        Raises:
            ValueError, KeyError: it is none; what it names could then lie anywhere.
        """
        found = cls(**data)
        for name, parts in found.checkpoints.items():
            if not (_CHECKPOINT.fullmatch(name) and all(_PART.fullmatch(part) for part in parts)):
                raise ValueError(f"{name}: {sorted(parts)} is no checkpoint")
        return found


@dataclass(frozen=True, slots=True)
class _Load:
    """What one copy carries, taken while the run stands still; open files stay readable when they are removed."""

    extent: Extent
    back: Sequence[int]
    """Steps that the run went back to."""
    texts: Mapping[str, bytes]
    files: Mapping[str, BinaryIO]
    weights: frozenset[str]
    """Names of all weights that the run keeps."""


class NoCopies:
    """What a run does that nobody asked to be copied."""

    def begin(self, config: RunConfig) -> None:
        """See `Copies`, as all the others."""

    def update(self) -> None:  # noqa: D102
        pass

    def end(self) -> None:  # noqa: D102
        pass

    def wait(self) -> None:  # noqa: D102
        pass


class Copies(NoCopies):
    """The copies of one run; for the process that writes its record."""

    @staticmethod
    def of(folder: Path, url: str) -> NoCopies:
        """Those of a run's folder; none where there is no URL. Raises as the constructor."""
        return Copies(folder, url) if url else NoCopies()

    def __init__(self, folder: Path, url: str) -> None:
        """Name the place; nothing is read or written yet.

        Args:
            folder: the run's.
            url: see `Keeping.copies`.

        Raises:
            InputError: the copy would be the run's folder itself.
        """
        self.folder, self.place = folder, Place.at(f"{url.rstrip('/')}/{folder.name}")
        if self.place.url == str(folder.resolve()):
            raise InputError(
                url,
                found="the folder that the run itself lies in",
                rule="copies are for when that is lost",
                remedy="give a folder on another disk, or an S3 URL",
            )
        self._known: Extent | None = None
        """What the place holds, once asked."""
        self._names: dict[str, int] | None = None
        """Objects there and their bytes, once asked."""
        self._sent: dict[str, bytes] = {}
        """Texts as they were put last."""
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._missed = 0
        self._patience = PATIENCE_S

    # --- for the run --------------------------------------------------------------------------------------------------

    def begin(self, config: RunConfig) -> None:
        """Bring the run's folder up to the copy where that goes further; before anything is trained.

        Raises:
            InputError: the place cannot be reached and never was by this run, it does not take what is written, or it
                holds another run's copy. Where it was reached before, that is told and the run goes on.
        """
        try:
            self._survey(config)
            if self._known is None:  # whether the place takes what is written shows now, and not after hours
                self.place.put("config.json", json.dumps(config.to_dict(), indent=2).encode())
        except InputError as error:
            if not self._was_reached():
                raise
            self._miss(error)
            return
        if self._known is not None and self._known.order > Extent.of(self.folder).order:
            self._fetch(self._known)
        self._note()

    def update(self) -> None:
        """Begin to copy what is new. Where a copy is still under way that is left to the next call."""
        self._settle()
        if self._thread is None:
            load = self._load()
            self._thread = threading.Thread(target=self._carry, args=(load,), name="copies", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Wait for a copy that is under way; then copy what is new since, if there is anything."""
        self.wait()
        if self._thread is None and (self._known is None or self._known.order < Extent.of(self.folder).order):
            self.update()
            self.wait()

    def wait(self) -> None:
        """Wait for a copy that is under way."""
        if self._thread is not None:
            self._thread.join(self._patience)
            if self._thread.is_alive():
                self._patience = 0.0
                log.warning("%s: a copy hangs; it is left behind", self.folder.name)
            self._settle()

    def _settle(self) -> None:
        """Note how a copy went that is no longer under way."""
        if self._thread is None or self._thread.is_alive():
            return
        self._thread.join()
        self._thread = None
        if self._error is not None:
            self._miss(self._error)
        else:
            self._note()

    # --- what is told -------------------------------------------------------------------------------------------------

    def _miss(self, error: Exception) -> None:
        """Tell the first of several misses, and note all; neither paths nor addresses are written down."""
        self._missed += 1
        if self._missed == 1:
            log.warning(
                "%s: no copy could be made: %s Training goes on; the next checkpoint tries again",
                self.folder.name,
                error,
            )
        self._write_state()

    def _note(self) -> None:
        if self._missed:
            log.warning("%s: copies are made again", self.folder.name)
        self._missed = 0
        self._write_state()

    def _write_state(self) -> None:
        """Say how far the copies are, as far as is known, and how many were missed since."""
        with told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        before = self._state() if self._was_reached() else {}
        step = self._known.step if self._known else before.get("step", 0)
        state = {"place": self._mark, "step": step, "missed": self._missed}
        write(self.folder / _STATE, json.dumps(state) + "\n")

    def _state(self) -> dict[str, Any]:
        path = self.folder / _STATE
        with told(path):
            found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return found

    def _was_reached(self) -> bool:
        return self._state().get("place") == self._mark

    @property
    def _mark(self) -> str:
        """Tells one place from another, and nothing of where it is."""
        return hashlib.sha256(self.place.url.encode()).hexdigest()[:8]

    # --- there --------------------------------------------------------------------------------------------------------

    def _survey(self, config: RunConfig) -> None:
        """Ask the place what it holds.

        Raises:
            InputError: it cannot be reached, or holds another run's copy.
        """
        try:
            names = self.place.sizes()
        except FileNotFoundError:  # a file where a folder should be: writing will tell
            names = {}
        if _EXTENT in names:
            known = self._read(_EXTENT, lambda data: Extent.parsed(json.loads(data)))
            there = self._read("config.json", lambda data: RunConfig.from_dict(json.loads(data)))
            if there != config:
                raise InputError(
                    self.place,
                    found="the copy of a run with other settings",
                    rule="a run's copies lie under its name, and go with its settings",
                    remedy="give another place for copies, or remove what lies there",
                )
            self._known = known
        self._names = names

    def _read(self, name: str, parse: Any) -> Any:
        try:
            return parse(bytes(self.place.get(name)))
        except InputError:
            raise
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise self._broken(name, error) from error

    def _broken(self, name: str, error: Exception) -> InputError:
        return InputError(
            f"{self.place.url}/{name}",
            found=f"no readable file ({type(error).__name__})",
            rule=f"a copy holds all that its {_EXTENT} names",
            remedy="remove that copy, or go on without copies",
        )

    def _fetch(self, known: Extent) -> None:
        """Bring the folder up to the copy. Killed in between it is still behind, and is brought up the next time.

        What a return took back goes first, rows come before the return they go with, and checkpoints last: whatever the
        folder then goes on from, it has the rows to it.
        """
        assert self._names is not None
        checkpoints = self.folder / "checkpoints"
        with told(self.folder):
            checkpoints.mkdir(parents=True, exist_ok=True)
            for name in ("panels", "weights"):
                (self.folder / name).mkdir(exist_ok=True)
        back = _steps(bytes(self._got("returns.json"))) if known.returns else []
        if late := back[len(_returned_to(self.folder)) :]:
            with told(checkpoints):
                checkpoint.drop_after(checkpoints, min(late))
        for name in sorted(self._names, key=lambda name: name == "returns.json"):
            if (
                _PANEL.fullmatch(name)
                or _WEIGHTS.fullmatch(name)
                or (_TEXT.fullmatch(name) and not self._is_longer(name))
            ):
                write_bytes(self.folder / name, self._got(name, self._names[name]))
        for name, parts in sorted(known.checkpoints.items(), key=lambda item: (len(item[0]), item[0])):
            files = ((part, self._got(f"checkpoints/{name}/{part}", size)) for part, size in parts.items())
            checkpoint.restore(checkpoints, name, files)
        if known.ended:
            write_bytes(self.folder / "verdict.json", self._got("verdict.json"))

    def _is_longer(self, name: str) -> bool:
        """Whether the folder's own attempts go further than the copy's."""
        path = self.folder / name
        return name == "attempts.jsonl" and path.is_file() and path.stat().st_size >= (self._names or {})[name]

    def _got(self, name: str, size: int | None = None) -> memoryview:
        try:
            data = self.place.get(name)
        except FileNotFoundError as error:
            raise self._broken(name, error) from error
        if size not in (None, len(data)):
            raise self._broken(name, ValueError(f"{len(data)} bytes, not {size}"))
        return data

    # --- one copy -----------------------------------------------------------------------------------------------------

    def _load(self) -> _Load:
        """Take up what is to be copied; checkpoints and weights that are there already are not."""
        extent, back = Extent.of(self.folder), _returned_to(self.folder)
        held = _valid(self._known, back)
        with told(self.folder):
            names = [path.name for path in self.folder.iterdir() if _TEXT.fullmatch(path.name)]
            names += ["verdict.json"] if extent.ended else []
            texts = {name: (self.folder / name).read_bytes() for name in names}
            weights = [f"weights/{path.name}" for path in sorted((self.folder / "weights").glob("step-*.safetensors"))]
            sure = self._known.step if self._known and self._known.returns == extent.returns else -1
            wanted = [
                *(name for name in weights if name not in (self._names or {}) or _step_in(name) > sure),
                *(
                    f"checkpoints/{c}/{part}"
                    for c, parts in extent.checkpoints.items()
                    if c not in held
                    for part in parts
                ),
            ]
            files = {name: open(self.folder / name, "rb") for name in wanted}  # noqa: SIM115 - closed once carried
        return _Load(extent, back, texts, files, frozenset(weights))

    def _carry(self, load: _Load) -> None:
        """The thread's work; what fails is told by the one that began it."""
        self._error = RuntimeError("it broke off")
        try:
            self._send(load)
            self._error = None
        except (InputError, OSError) as error:
            self._error = error
        finally:
            for file in load.files.values():
                file.close()

    def _send(self, load: _Load) -> None:
        if self._names is None:  # it could not be reached when the run began
            self._survey(RunConfig.from_dict(json.loads(load.texts["config.json"])))
        if self._known is not None and self._known.order >= load.extent.order:
            return  # a run that is at work again on what the copy holds already
        if self._known is not None and self._known.returns != load.extent.returns:
            self._withdraw(load.back)
        for name, data in load.texts.items():
            if self._sent.get(name) != data:
                self.place.put(name, data)
                self._sent[name] = data
        self._send_panels(load.extent.step)
        for name, file in load.files.items():
            self._put(name, file.read())
        self.place.put(_EXTENT, json.dumps(asdict(load.extent), indent=2).encode())
        self._known = load.extent
        self._let_go(load)

    def _send_panels(self, upto: int) -> None:
        """Send new pictures; after a return, later ones are still those of before it."""
        assert self._names is not None
        for path in sorted((self.folder / "panels").glob("step-*.png")):
            name = f"panels/{path.name}"
            if name not in self._names and int(path.stem.removeprefix("step-")) <= upto:
                self._put(name, path.read_bytes())

    def _put(self, name: str, data: bytes) -> None:
        assert self._names is not None
        self.place.put(name, data)
        self._names[name] = len(data)

    def _withdraw(self, back: Sequence[int]) -> None:
        """Take back what a run that went back from a divergence says anew, `copied.json` first."""
        assert self._names is not None
        assert self._known is not None
        step = min(back[self._known.returns :])
        self.place.delete([_EXTENT])
        late = [name for name in self._names if (found := re.search(r"step-(\d+)", name)) and int(found[1]) > step]
        self.place.delete(late)
        for name in late:
            del self._names[name]
        self._known = None

    def _let_go(self, load: _Load) -> None:
        """Remove checkpoints and weights that the run has let go of, and what killed writers left."""
        assert self._names is not None
        stays = {f"checkpoints/{name}/{part}" for name, parts in load.extent.checkpoints.items() for part in parts}
        stays |= load.weights
        gone = [name for name in self._names if name.startswith(("checkpoints/", "weights/")) and name not in stays]
        self.place.delete(gone)
        for name in gone:
            del self._names[name]
        self.place.tidy()


def _step_in(name: str) -> int:
    """The step that a file of weights is of: after the copy's checkpoint a run may have come to other numbers."""
    return int(Path(name).stem.removeprefix("step-"))


def _returned_to(folder: Path) -> list[int]:
    """The steps that a run went back to, in order."""
    path = folder / "returns.json"
    with told(path):
        return _steps(path.read_bytes()) if path.is_file() else []


def _steps(returns: bytes) -> list[int]:
    return [int(back["step"]) for back in json.loads(returns)]


def _valid(known: Extent | None, back: Sequence[int]) -> set[str]:
    """Checkpoints of a copy that are still the run's, after it went back to the steps `back`."""
    if known is None:
        return set()
    since = back[known.returns :]
    return {name for name in known.checkpoints if int(name.removeprefix("step-")) <= min(since, default=1 << 62)}
