"""A model's card: what whoever gets the model must know of it, on one page.

Knows the facts of a training and what masks of these modalities can mean; must not know files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from equipoise.config import RunConfig
from equipoise.intake import Intake

_MEASURES = {
    "quality/target_dice": "masks on target images against target masks",
    "quality/translated_dice": "masks on translated source images against source masks",
    "quality/composite": "the last and the predicted volume together; needs no target mask",
}
_PROTOCOLS = {
    "last": "the run's last evaluation",
    "source": "the evaluation with the best Dice on translated source slices; no target mask was used",
    "oracle": "the evaluation with the best Dice against target masks: such a choice flatters that Dice",
}
_USE = """## Use

```
equipoise predict THIS_FOLDER scan.nii.gz -o masks/          # from a raw volume to a mask in its own grid
```

Without Equipoise, with torch alone, from slices that are prepared as preprocessing.json says:

```python
import torch
program = torch.export.load("program.pt2").module()
logits = program(images)  # float32 (n, {channels}, {size}, {size}) in [-1, 1] -> (n, {classes}, {size}, {size})
```
"""
_LIMITS = """## Limits

- Masks were taught in the source modality. TOF angiography shows flowing arterial blood, susceptibility-weighted images
  mainly veins and bleeding: of a model taught arteries, a mask on SWI is not a mask of what SWI shows best, and a Dice
  across the two is a Dice between label sets that differ. Look at masks before using them.
- A head of stride {stride} draws structures of a few pixels coarsely; a pixel is {spacing:g} mm.
- Other scanners, field strengths, protocols, ages and pathologies than the training subjects' were not tried. `predict`
  warns with numbers where a volume's intensities or slices are unlike theirs.
- For research. This is no medical device, and no diagnosis may rest on it.
"""


def text(config: RunConfig, intake: Intake, about: Mapping[str, Any], licence: str) -> str:
    """The card in Markdown; names no place, person or machine.

    Args:
        config: of the run that trained the model.
        intake: of its cohort.
        about: see `model.facts`.
        licence: see `package.write`.
    """
    size = intake.preprocessing.size
    parts = (
        "# A segmentation model by Equipoise\n",
        "E and C1 of SIFA (Chen et al., IEEE TMI 2020), trained to segment target images without target masks.\n",
        "\n".join(_training(config, intake, about)),
        "\n".join(_results(about)),
        _USE.format(channels=intake.channels, size=size, classes=intake.classes),
        _LIMITS.format(stride=config.net.head_stride, spacing=intake.preprocessing.spacing_mm),
        "## Licence\n\n"
        + (licence or "Nothing was said when the model was exported: ask whoever gave it to you.")
        + "\nWeights are learned from images: what the terms of the training data ask of works made from them holds "
        "for this model, too. Equipoise itself is under the Apache licence 2.0.\n",
    )
    return "\n".join(parts)


def _training(config: RunConfig, intake: Intake, about: Mapping[str, Any]) -> Iterator[str]:
    yield "## Training\n"
    yield f"- Training data: cohort {intake.cohort}, preprocessing {intake.preprocessing.fingerprint}."
    yield f"- {intake.classes} classes, background included; 1 is the first structure of the masks."
    if about["study"]:
        yield f"- Study {about['study']}, run {about['run']}: {about['question']}"
    yield f"- Settings {config.fingerprint}: {config.loss.adversarial}, learning rate {config.optim.lr:g}, " + (
        f"{config.steps:,} steps of batch {config.batch}, width {config.net.width:g}; all are in config.json."
    )
    chosen = _PROTOCOLS.get(about["protocol"], f"chosen by {about['protocol']}, without a target mask")
    yield f"- Weights after step {about['step']:,}: {chosen}" + ("; their running mean." if about["ema"] else ".")
    yield f"- Verdict: {about['verdict'] or 'none yet'}; {about['sentence']}. S {_number(about['stability'])}."
    found = about["environment"]
    if found:
        packages = ", ".join(f"{name} {version}" for name, version in found.get("packages", {}).items())
        yield f"- Made with {packages}; commit {found.get('commit') or 'unknown'}."


def _results(about: Mapping[str, Any]) -> Iterator[str]:
    yield "\n## Dice\n"
    there = {name: about["quality"][name] for name in _MEASURES if name in about["quality"]}
    if not there:
        yield "None was measured.\n"
        return
    yield "| measure | value | protocol |"
    yield "|---|---|---|"
    for name, value in there.items():
        kind = f"{_MEASURES[name]}; validation subjects, mean over subjects, in the slices' grid"
        yield f"| {name.removeprefix('quality/')} | {_number(value)} | {kind} |"
    yield "\nValidation subjects trained nothing, but chose among runs: only test subjects, which `equipoise "
    yield "evaluate --part test` measures once, are without that advantage.\n"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}" if math.isfinite(value) else str(value)
