"""The images by which a person judges a run: the original study's panels.

Knows which images are shown and how masks are drawn over them; knows nothing of training or of where pictures go.
"""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from equipoise.batches import Cohort
from equipoise.nets import Sifa
from equipoise.step import forward
from slicestore.store import DOMAINS

if TYPE_CHECKING:
    from PIL import Image

ROWS = ("x_s", "y_s", "x_st", "mask_st", "x_sts", "x_t", "mask_t", "x_ts", "x_tst")
"""From top to bottom: source, its mask, its translation, the mask predicted on that, round trip; then the target's."""
COLOURS = ((230, 60, 60), (60, 180, 75), (70, 110, 240), (240, 190, 40))
"""One a structure; structures beyond the fourth start again."""
_UNDER = {"y_s": "x_s", "mask_st": "x_st", "mask_t": "x_t"}
"""Over which image a mask is drawn."""
_LABEL = 64
"""Pixels of the column with the rows' names."""


@dataclass(frozen=True, slots=True, eq=False)
class Panels:
    """Probe slices and what a run makes of them."""

    images: dict[str, np.ndarray]
    """`x_*`: `(K, H, W)` float32 in [-1, 1]; of a stack of neighbours the middle slice."""
    masks: dict[str, np.ndarray]
    """`y_s`, `mask_st`, `mask_t`: `(K, H, W)` uint8 class indices."""

    def picture(self) -> Image.Image:
        """One picture: a row a kind, a column a slice, masks drawn over the image they belong to."""
        from PIL import Image, ImageDraw  # where it is needed: training does without

        rows = [r for r in ROWS if r in self.images or r in self.masks]
        count, height, width = self.images["x_s"].shape
        scale = max(1, round(128 / height))
        sheet = Image.new("RGB", (_LABEL + count * width * scale, len(rows) * height * scale), "black")
        pen = ImageDraw.Draw(sheet)
        for r, name in enumerate(rows):
            pen.text((4, (r + 0.5) * height * scale - 5), name, fill="white")
            for k in range(count):
                tile = _grey(self.images[_UNDER.get(name, name)][k])
                if name in self.masks:
                    tile = _overlay(tile, self.masks[name][k])
                size = (width * scale, height * scale)
                sheet.paste(
                    Image.fromarray(tile).resize(size, Image.Resampling.NEAREST), (_LABEL + k * size[0], r * size[1])
                )
        return sheet

    def save(self, path: Path) -> None:
        """Write the picture as PNG, whole or not at all; its text chunk `panels` holds rows and masks for `tiles`."""
        from PIL.PngImagePlugin import PngInfo

        packed = {k: base64.b64encode(zlib.compress(m.tobytes())).decode() for k, m in self.masks.items()}
        rows = [r for r in ROWS if r in self.images or r in self.masks]
        about = PngInfo()
        about.add_text("panels", json.dumps({"rows": rows, "shape": self.images["x_s"].shape, "masks": packed}))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        self.picture().save(partial, format="PNG", pnginfo=about)
        partial.replace(path)


class Tiles(NamedTuple):
    """What a picture of panels shows, taken apart again."""

    images: dict[str, np.ndarray]
    """`x_*`: `(K, H, W, 3)` uint8, without masks."""
    masks: dict[str, np.ndarray]
    """`y_s`, `mask_st`, `mask_t`: `(K, H, W)` uint8 class indices."""


def tiles(path: Path) -> Tiles | None:
    """The slices in a picture that `Panels.save` wrote; None of one that says nothing of its rows."""
    from PIL import Image

    with Image.open(path) as picture:
        about = getattr(picture, "text", {}).get("panels")
        if about is None:
            return None
        sheet = np.asarray(picture.convert("RGB"))[:, _LABEL:]
    told = json.loads(about)
    count, height, width = told["shape"]
    scale = sheet.shape[1] // (count * width)
    grid = sheet[::scale, ::scale].reshape(len(told["rows"]), height, count, width, 3).swapaxes(1, 2)
    packed = {name: zlib.decompress(base64.b64decode(mask)) for name, mask in told["masks"].items()}
    masks = {name: np.frombuffer(mask, np.uint8).reshape(count, height, width) for name, mask in packed.items()}
    return Tiles({name: grid[r] for r, name in enumerate(told["rows"]) if name not in masks}, masks)


@torch.no_grad()
def draw(net: Sifa, cohort: Cohort, count: int = 4) -> Panels:
    """Run the probe slices through every path, in evaluation mode."""
    source, target = (cohort.probe(domain, count) for domain in DOMAINS)
    k = min(len(source), len(target))
    x_s, x_t = source.image[:k], target.image[:k]
    net.eval()
    out = forward(net, x_s, x_t)
    net.train()
    images = {"x_s": x_s, "x_st": out.st, "x_sts": out.sts, "x_t": x_t, "x_ts": out.ts, "x_tst": out.tst}
    masks = {"mask_st": out.logits_st.argmax(1), "mask_t": out.logits_t.argmax(1)}
    if source.label is not None:
        masks["y_s"] = source.label[:k]
    return Panels(
        {n: x[:, x.shape[1] // 2].float().cpu().numpy() for n, x in images.items()},
        {n: m.to(torch.uint8).cpu().numpy() for n, m in masks.items()},
    )


def _grey(image: np.ndarray) -> np.ndarray:
    """[-1, 1] to 8-bit RGB. Non-finite pixels, which have no grey, are shown in magenta."""
    finite = np.isfinite(image)
    grey = ((np.where(finite, image, 0).clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    rgb = np.repeat(grey[..., None], 3, axis=-1)
    rgb[~finite] = (255, 0, 255)
    return rgb


def _overlay(rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Half-transparent colour where the mask is set, so that the anatomy below stays visible."""
    out = rgb.copy()
    for k in np.unique(mask[mask > 0]):
        colour = np.asarray(COLOURS[(int(k) - 1) % len(COLOURS)])
        out[mask == k] = (0.5 * rgb[mask == k] + 0.5 * colour).round().astype(np.uint8)
    return out
