"""Which raw volumes make a cohort: from a table or a folder of files.

Knows tables, file names and headers; knows nothing of stores, voxels or what is done to them.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slicestore.errors import InputError
from slicestore.preprocess import check_grids
from slicestore.store import DOMAINS, Domain
from slicestore.volume import SUFFIXES, inspect

LABEL_ENDINGS = ("label", "seg", "mask")
"""What a label's file name adds to its image's, after an underscore."""


@dataclass(frozen=True, slots=True)
class Input:
    """One raw volume."""

    domain: Domain
    subject: str
    """The user's own name of the subject; it stays out of the store."""
    image: Path
    label: Path | None = None


def check(inputs: Sequence[Input]) -> None:
    """Find what is wrong with a cohort without reading a voxel.

    Raises:
        InputError: an unknown domain, a subject twice, a domain without volumes, a source volume without a label, a
            file that is missing or not 3D, a label on another grid than its image.
    """
    seen: set[tuple[str, str]] = set()
    for item in inputs:
        if item.domain not in DOMAINS:
            raise InputError(
                item.image,
                found=f"domain {item.domain!r}",
                rule="a domain is 'source' or 'target'",
                remedy="'source' is the labelled modality, 'target' the one to be segmented",
            )
        if (item.domain, item.subject) in seen:
            raise InputError(
                item.image,
                found=f"a second {item.domain} volume of subject {item.subject!r}",
                rule="a subject has one volume in a domain",
                remedy="keep one of them, or name them apart",
            )
        seen.add((item.domain, item.subject))
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
        grid = inspect(item.image)
        if item.label is not None:
            check_grids(grid, inspect(item.label), item.label)


def inputs_from_table(path: str | Path, mask: str | None = None) -> list[Input]:
    """Read a CSV (comma or semicolon) or TSV with columns subject, domain, image and one of label paths.

    Args:
        path: the table; paths in it are relative to its folder.
        mask: the column of the labels, such as "brain" or "vessel"; "label" by default. A cell may be empty.

    Raises:
        InputError: no such file, a missing column, an empty cell, an unknown domain, a subject twice in a domain, no
        rows.
    """
    path, column = Path(path), mask or "label"
    rows = _rows(path, ("subject", "domain", "image", column))
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
        label = path.parent / row[column] if row[column] else None
        inputs[domain, subject] = Input(domain, subject, path.parent / row["image"], label)
    return list(inputs.values())


def inputs_from_folder(folder: str | Path, domain: Domain, *, mask: str | None = None) -> list[Input]:
    """Take every image in a folder as a subject named like the file.

    A file is the label of the image whose name it continues by `_label`, `_seg` or `_mask`; with `mask`, by `_` and
    `mask` alone, and files that end in the other three are left aside.

    Raises:
        InputError: no such folder, no images in it, two of one name, a label without an image, or two labels for one.
    """
    folder = Path(folder)
    named = _images(folder)
    endings = (mask,) if mask else LABEL_ENDINGS
    labels = {stem: stem[: -len(end) - 1] for stem in named for end in endings if stem.endswith(f"_{end}")}
    others = {stem for stem in named for end in LABEL_ENDINGS if stem.endswith(f"_{end}")}
    images = {stem: file for stem, file in named.items() if stem not in labels and stem not in others}
    for label, stem in labels.items():
        if stem not in images:
            raise InputError(
                named[label],
                found=f"no image {stem!r} beside it",
                rule="a label is named like its image, with an ending",
                remedy="rename it, or use a table",
            )
    inputs = []
    for stem, image in images.items():
        own = [named[label] for label, of in labels.items() if of == stem]
        if len(own) > 1:
            raise InputError(
                image,
                found=f"the labels {', '.join(file.name for file in own)}",
                rule="an image has one label",
                remedy="name the ending to use (`mask`), or use a table",
            )
        inputs.append(Input(domain, stem, image, own[0] if own else None))
    return inputs


def _images(folder: Path) -> dict[str, Path]:
    """Image files of a folder by name without suffix."""
    if not folder.is_dir():
        raise InputError(folder, found="no such folder", rule="images lie in a folder", remedy="check the path")
    named: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        suffix = next((suffix for suffix in SUFFIXES if file.name.lower().endswith(suffix)), None)
        if suffix is None or file.name.startswith(".") or not file.is_file():
            continue
        stem = file.name[: -len(suffix)]
        if stem in named:
            raise InputError(
                file,
                found=f"also {named[stem].name}",
                rule="a name stands for one image",
                remedy="remove one of the two, or use a table",
            )
        named[stem] = file
    if not named:
        raise InputError(
            folder,
            found="no image",
            rule=f"images end in one of {', '.join(SUFFIXES)}",
            remedy="check the path, or convert the images",
        )
    return named


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
    reader = csv.DictReader(text.splitlines(), delimiter=delimiter, restkey="", restval="")
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
    rows = [(reader.line_num, {name: row[name].strip() for name in columns}) for row in reader]
    if not rows:
        raise InputError(path, found="no row", rule="a table has a row for each volume", remedy="add the volumes")
    return rows
