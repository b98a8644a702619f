"""Which raw volumes make a cohort: from a table, a folder of images or a BIDS data set.

Knows tables, file names and headers; knows nothing of stores, voxels or what is done to them.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slicestore import bids
from slicestore.dicom import holds_dicom
from slicestore.errors import InputError
from slicestore.geometry import check_grids
from slicestore.layout import DOMAINS, Domain
from slicestore.volume import SUFFIXES, inspect

LABEL_ENDINGS = ("label", "seg", "mask")
"""What a label's file name adds to its image's, after an underscore."""
BRAIN = "brain_mask"
"""What a brain mask's file name adds to its image's, and the usual column of brain masks in a table."""


@dataclass(frozen=True, slots=True)
class Input:
    """One raw volume."""

    domain: Domain
    subject: str
    """The user's own name of the subject; it stays out of the store."""
    image: Path
    """A file, or a folder of DICOM files."""
    label: Path | None = None
    """Class indices on the image's grid."""
    brain: Path | None = None
    """A mask of the brain on the image's grid, for the steps of preprocessing that need one."""
    component: int | None = None
    """Which of several volumes in the image's file or folder, from 0."""


def check(inputs: Sequence[Input]) -> None:
    """Find what is wrong with a cohort without reading a voxel.

    Raises:
        InputError: an unknown domain, a subject twice, a domain without volumes, a source volume without a label, a
            file that is missing or of no single volume, a label or brain mask on another grid than its image.
    """
    seen: dict[tuple[str, str], Input] = {}
    for item in inputs:
        if item.domain not in DOMAINS:
            raise InputError(
                item.image,
                found=f"domain {item.domain!r}",
                rule="a domain is 'source' or 'target'",
                remedy="'source' is the labelled modality, 'target' the one to be segmented",
            )
        if first := seen.get((item.domain, item.subject)):
            raise InputError(
                item.image,
                found=f"a second {item.domain} volume of subject {item.subject!r}; the first is {first.image}",
                rule="a subject has one volume in a domain",
                remedy="keep one of them, or name them apart",
            )
        seen[item.domain, item.subject] = item
    for domain in DOMAINS:
        if not any(item.domain == domain for item in inputs):
            raise InputError(
                "cohort",
                found=f"no {domain} volume among {len(inputs)}",
                rule="a cohort has at least one volume in each domain",
                remedy=f"add {domain} images",
            )
    bare = [item.image for item in inputs if item.domain == "source" and item.label is None]
    if bare:
        sources = sum(item.domain == "source" for item in inputs)
        raise InputError(
            bare[0],
            found=f"no label for {len(bare)} of {sources} source volumes",
            rule="every source volume has a label, because the segmenter learns from nothing else",
            remedy="name its label in the table or by its ending (IMAGE_label.nii.gz), or leave it out",
        )
    for item in inputs:
        grid = inspect(item.image, item.component)
        for kind, file in (("label", item.label), ("brain mask", item.brain)):
            if file is not None:
                check_grids(grid, inspect(file), file, kind=kind)


def inputs_from_table(path: str | Path, mask: str | None = None, brain: str | None = None) -> list[Input]:
    """Read a CSV (comma or semicolon) or TSV with columns subject, domain, image and one of label paths.

    A column `component` may say which of several volumes in an image's file or DICOM folder is meant, from 0.

    Args:
        path: the table; paths in it are relative to its folder.
        mask: the column of the labels, such as "brain" or "vessel"; "label" by default. A cell may be empty.
        brain: the column of the brain masks; by default "brain_mask" where there is one. A cell may be empty.

    Raises:
        InputError: no such file, a missing column, an empty cell, an unknown domain, a subject twice in a domain, a
            component that is no number, no rows.
    """
    path, column = Path(path), mask or "label"
    rows = _rows(path, ("subject", "domain", "image", column, *([brain] if brain else [])))
    inputs: dict[tuple[str, str], Input] = {}
    for line, row in rows:
        where, subject, domain = f"{path}, line {line}", row["subject"], row["domain"].lower()
        empty = [name for name in ("subject", "domain", "image") if not row[name]]
        if empty:
            raise InputError(
                where,
                found=f"an empty {empty[0]}",
                rule="every row names subject, domain and image",
                remedy="fill the cell or delete the row",
            )
        if domain not in DOMAINS:
            raise InputError(
                where,
                found=f"domain {row['domain']!r}",
                rule="a domain is 'source' or 'target'",
                remedy="'source' is the labelled modality, 'target' the one to be segmented",
            )
        if (domain, subject) in inputs:
            raise InputError(
                where,
                found=f"subject {subject!r} a second time in domain {domain}",
                rule="a subject has one volume in a domain",
                remedy="keep one row, or name them apart",
            )
        label, brain_mask = (
            path.parent / cell if cell else None for cell in (row[column], row.get(brain or BRAIN, ""))
        )
        number = _component(where, row.get("component", ""))
        inputs[domain, subject] = Input(domain, subject, path.parent / row["image"], label, brain_mask, number)
    return list(inputs.values())


def inputs_from_folder(
    folder: str | Path,
    domain: Domain,
    *,
    mask: str | None = None,
    brain: str | None = None,
    component: int | None = None,
) -> list[Input]:
    """Take every image in a folder as a subject named like the file, and every subfolder of DICOM files as one.

    A folder that itself holds DICOM files is one subject. A file is the label of the image whose name it continues by
    `_label`, `_seg` or `_mask`; with `mask`, by `_` and `mask` alone, and files that end in the other three are left
    aside. It is the brain mask of the image whose name it continues by `_` and `brain` ("brain_mask" by default).
    `component` holds for all images.

    Raises:
        InputError: no such folder, no images in it, two of one name, a label without an image, or two labels for one.
    """
    folder = Path(folder)
    named = _images(folder)
    kinds = {"brain mask": (brain or BRAIN,), "label": (mask,) if mask else LABEL_ENDINGS}
    if mask and mask == brain:
        kinds.pop("brain mask")
    owners = {kind: _owners(named, endings) for kind, endings in kinds.items()}
    owners["label"] = {stem: of for stem, of in owners["label"].items() if stem not in owners.get("brain mask", {})}
    others = {*_owners(named, LABEL_ENDINGS), *(stem for of in owners.values() for stem in of)}
    images = {stem: file for stem, file in named.items() if stem not in others}
    for stem, of in ((stem, of) for owned in owners.values() for stem, of in owned.items()):
        if of not in images:
            raise InputError(
                named[stem],
                found=f"no image {of!r} beside it",
                rule="a label is named like its image, with an ending",
                remedy="rename it, or use a table",
            )
    inputs = []
    for stem, image in images.items():
        own = {kind: [named[mine] for mine, of in owned.items() if of == stem] for kind, owned in owners.items()}
        if len(own["label"]) > 1:
            raise InputError(
                image,
                found=f"the labels {', '.join(file.name for file in own['label'])}",
                rule="an image has one label",
                remedy="name the ending to use (`mask`), or use a table",
            )
        label, brain_mask = (next(iter(own.get(kind, [])), None) for kind in ("label", "brain mask"))
        inputs.append(Input(domain, stem, image, label, label if mask and mask == brain else brain_mask, component))
    return inputs


def inputs_from_bids(
    root: str | Path,
    *,
    source: bids.Pattern = bids.TOF,
    target: bids.Pattern = bids.SWI,
    mask: str | None = None,
    brain: str | None = None,
    filters: Mapping[str, str] | None = None,
    component: int | None = None,
) -> list[Input]:
    """Find the two domains' images in a BIDS data set, `sub-*/[ses-*/](anat|swi|angio)/`, and labels in `derivatives`.

    A subject is `sub-...`, whatever the session, so that no patient is both trained on and tested on. Phase images are
    left aside unless `part` is filtered for. An image's label is the `_mask` or `_dseg` under `derivatives` whose name
    does not contradict it (`bids.belongs`); one that fits images of both domains is the source's.

    Args:
        root: folder of the data set.
        source: which images are sources; TOF angiography by default.
        target: which images are targets; SWI by default. What fits both is a target where its suffix says so.
        mask: which label, where there are several: its `desc`, `label`, suffix, or folder in `derivatives`.
        brain: the same of the brain mask, "brain" by default; it is no label unless `mask` says the same.
        filters: values of entities that images must have, such as {"ses": "01"}; "source.acq" means sources alone.
        component: which volume of every image that holds several, from 0.

    Raises:
        InputError: no data set, no image in it, several images or labels where one is needed.
    """
    root, filters, brain = Path(root), dict(filters or {}), brain or "brain"
    labels, found = bids.segmentations(root, SUFFIXES), bids.images(root, SUFFIXES)
    images = _per_subject(root, found, {"source": source, "target": target}, filters)
    inputs, taken = [], set()
    for (domain, subject), image in images.items():
        own = [label for label in labels if bids.belongs(label, image)]
        brains = [label for label in own if bids.kind_is(label, brain, root)]
        wanted = [
            label
            for label in own
            if label.path not in taken and (bids.kind_is(label, mask, root) if mask else label not in brains)
        ]
        label = _only(image.path, wanted, "label", "mask")
        taken |= {label} if domain == "source" else set()
        brain_mask = _only(image.path, brains, "brain mask", "brain")
        inputs.append(Input(domain, subject, image.path, label, brain_mask, component))
    return inputs


def _per_subject(
    root: Path, found: Sequence[bids.BidsFile], patterns: Mapping[Domain, bids.Pattern], filters: Mapping[str, str]
) -> dict[tuple[Domain, str], bids.BidsFile]:
    """The one image of each domain and subject, sources first."""
    chosen: dict[tuple[Domain, str], list[bids.BidsFile]] = {}
    for domain in DOMAINS:
        own = {k.rpartition(".")[2]: v for k, v in filters.items() if k.rpartition(".")[0] in ("", domain)}
        others = [pattern for other, pattern in patterns.items() if other != domain]
        for file in found:
            by_suffix = file.suffix.lower() in patterns[domain].suffixes
            elsewhere = any(file.suffix.lower() in pattern.suffixes for pattern in others)
            part = "part" in own or file.entities.get("part", "mag") == "mag"
            if patterns[domain].fits(file) and (by_suffix or not elsewhere) and part and file.has(own):
                chosen.setdefault((domain, f"sub-{file.entities['sub']}"), []).append(file)
    if not chosen:
        raise InputError(
            root,
            found=f"no image among {len(found)} that fits {' or '.join(map(str, patterns.values()))} with {filters}",
            rule="a domain's images are known by suffix or acquisition",
            remedy="change the filters or patterns, or use a table",
        )
    for (domain, subject), files in chosen.items():
        if len(files) > 1:
            told = "; ".join(str(file.path.relative_to(root)) for file in files)
            apart = bids.differing(files)
            raise InputError(
                root,
                found=f"{len(files)} {domain} images of {subject} ({told})",
                rule="a subject has one volume in a domain",
                remedy=f"choose by filters such as {apart}, with '{domain}.' before a key for this domain alone"
                if apart
                else "remove one, or use a table",
            )
    return {who: files[0] for who, files in chosen.items()}


def _only(image: Path, labels: Sequence[bids.BidsFile], kind: str, option: str) -> Path | None:
    if len(labels) > 1:
        raise InputError(
            image,
            found=f"{len(labels)} {kind}s for it ({'; '.join(str(label.path) for label in labels)})",
            rule=f"an image has one {kind}",
            remedy=f"say which (`{option}`): its desc, label, suffix or folder in derivatives",
        )
    return labels[0].path if labels else None


def _component(where: object, cell: str) -> int | None:
    if not cell:
        return None
    if not cell.isdecimal():
        raise InputError(
            where,
            found=f"component {cell!r}",
            rule="a component is a number from 0",
            remedy="leave the cell empty to be told what there is to choose from",
        )
    return int(cell)


def _owners(named: Mapping[str, Path], endings: Sequence[str]) -> dict[str, str]:
    """Names that end in one of these after an underscore, and what comes before it."""
    return {stem: stem[: -len(end) - 1] for stem in named for end in endings if stem.endswith(f"_{end}")}


def _images(folder: Path) -> dict[str, Path]:
    """Image files and DICOM folders of a folder by name without suffix."""
    if not folder.is_dir():
        raise InputError(folder, found="no such folder", rule="images lie in a folder", remedy="check the path")
    if holds_dicom(folder):
        return {folder.resolve().name: folder}
    named: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        name = stem(file)
        if name is None:
            continue
        if name in named:
            raise InputError(
                file,
                found=f"also {named[name].name}",
                rule="a name stands for one image",
                remedy="remove one of the two, or use a table",
            )
        named[name] = file
    if not named:
        raise InputError(
            folder,
            found="no image",
            rule=f"images end in one of {', '.join(SUFFIXES)}, or are folders of DICOM files",
            remedy="check the path, or convert the images",
        )
    return named


def stem(file: Path) -> str | None:
    """What an image is called; None for anything else."""
    if file.name.startswith("."):
        return None
    if file.is_dir():
        return file.name if holds_dicom(file) else None
    suffix = next((suffix for suffix in SUFFIXES if file.name.lower().endswith(suffix)), None)
    return file.name[: -len(suffix)] if suffix else None


def _rows(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Rows of a table with their line numbers, cells stripped, once the columns are known to be there."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            path,
            found=f"no readable text ({type(error).__name__})",
            remedy="check it, or save as CSV",
            rule="a table is a CSV or TSV in UTF-8",
        ) from None
    header = text.partition("\n")[0]
    delimiter = max("\t", ",", ";", key=header.count)
    reader = csv.DictReader(text.splitlines(), delimiter=delimiter, restval="")
    found = [name.strip() for name in reader.fieldnames or ()]
    missing = [name for name in columns if name not in found]
    if missing:
        raise InputError(
            path,
            found=f"columns {', '.join(found) or 'none'}",
            rule=f"a table has columns {', '.join(columns)}; {', '.join(missing)} missing",
            remedy="rename a column, or name the column of the labels (`mask`)",
        )
    reader.fieldnames = found
    rows = [(reader.line_num, {name: row[name].strip() for name in found}) for row in reader]
    if not rows:
        raise InputError(path, found="no row", rule="a table has a row for each volume", remedy="add the volumes")
    return rows
