"""Which raw volumes a user means: one of several ways to name them.

Knows the options of `equipoise prepare` that name volumes; knows nothing of what is made of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slicestore.dicom import holds_dicom
from slicestore.errors import InputError
from slicestore.inputs import Input, inputs_from_bids, inputs_from_folder, inputs_from_table
from slicestore.layout import Domain


@dataclass(frozen=True, slots=True, kw_only=True)
class RawVolumes:
    """Options that name volumes: a table, a BIDS data set, or a place for each domain."""

    table: Path | None = None
    """CSV or TSV with columns subject, domain (source or target), image and a column of masks; brain_mask and component
    are optional."""
    bids: Path | None = None
    """Instead, a BIDS data set: TOF is source, SWI is target, masks are in derivatives."""
    bids_filter: dict[str, str] | None = None
    """Entities that images of the BIDS data set must have, such as `ses 01` or `source.acq TOF`."""
    source: Path | None = None
    """Instead, a folder of labelled volumes (images, or a folder of DICOM files each), or one volume."""
    target: Path | None = None
    """With --source: the same of the other modality."""
    source_label: Path | None = None
    """The mask of --source, where that is one volume."""
    target_label: Path | None = None
    """A mask of --target for evaluation only, where that is one volume."""
    mask: str | None = None
    """Which mask: the table's column, the ending of a mask's file name, or BIDS' word for it; "label" by default."""
    brain: str | None = None
    """Which brain mask, likewise, for settings that need one; "brain_mask" by default, "brain" in BIDS."""
    component: int | None = None
    """Which volume, from 0, of files and series that hold several."""

    def inputs(self) -> list[Input]:
        """Find the volumes; their paths are absolute, so that a process in another folder finds them too.

        Raises:
            InputError: no way was chosen, or several; an option that has no effect; whatever the way itself refuses.
        """
        self._check()
        if self.table is not None:
            found = inputs_from_table(self.table.absolute(), self.mask, self.brain)
        elif self.bids is not None:
            found = inputs_from_bids(
                self.bids.absolute(),
                mask=self.mask,
                brain=self.brain,
                filters=self.bids_filter,
                component=self.component,
            )
        else:
            found = [
                *self._domain("source", self.source, self.source_label),
                *self._domain("target", self.target, self.target_label),
            ]
        return found

    def _domain(self, domain: Domain, path: Path | None, label: Path | None) -> list[Input]:
        assert path is not None
        if path.is_dir() and label is None:
            return inputs_from_folder(
                path.absolute(), domain, mask=self.mask, brain=self.brain, component=self.component
            )
        return [Input(domain, domain, path.absolute(), label and label.absolute(), component=self.component)]

    def _check(self) -> None:
        places = (self.source, self.target)
        ways = (self.table is not None, self.bids is not None, any(places))
        if sum(ways) != 1 or (any(places) and not all(places)):
            raise InputError(
                "prepare",
                found="no volumes, one domain without the other, or volumes in two ways",
                rule="volumes come from --table, from --bids, or from --source and --target",
                remedy="give one of the three",
            )
        if self.bids_filter and self.bids is None:
            raise _idle("--bids-filter", "it chooses images of --bids", "leave it out")
        if self.component is not None and self.table is not None:
            raise _idle("--component", "a table has a column for it", "add a column `component`")
        for name, path, label in zip(("source", "target"), places, (self.source_label, self.target_label), strict=True):
            if label is not None and (path is None or (path.is_dir() and not holds_dicom(path))):
                raise _idle(f"--{name}-label", f"it is the mask of one volume, --{name}", "use --mask, or a table")


def _idle(option: str, rule: str, remedy: str) -> InputError:
    return InputError("prepare", found=f"{option} where it has no effect", rule=rule, remedy=remedy)
