"""Eight training slices of a store: with plain zarr, and with slicestore.

    python examples/read_batch.py cohort.zarr

The first way needs nothing but zarr-python and reads the slices one by one. The second loads a whole split into memory
that all processes of the machine share, every checksum verified, and draws from there: the way to train.
"""

import json
import sys
from pathlib import Path

import numpy as np
import zarr

from slicestore.staging import stage
from slicestore.store import Store, normalise

path = sys.argv[1]
rng = np.random.default_rng(0)

# With zarr: the manifest names the volumes, a volume is an array (slice, y, x), a slice is a chunk.
volumes = json.loads(Path(path, "manifest.json").read_text())["volumes"]
groups = [volume["group"] for volume in volumes if (volume["domain"], volume["split"]) == ("source", "train")]
arrays = [zarr.open_group(f"{path}/{groups[i]}", mode="r") for i in rng.integers(len(groups), size=8)]
slices = [(volume, rng.integers(volume["image"].shape[0])) for volume in arrays]
images = np.stack([volume["image"][z] for volume, z in slices])  # float16, standardised per volume
labels = np.stack([volume["label"][z] for volume, z in slices])  # uint8 class indices
print("zarr:", images.shape, images.dtype, labels.shape, labels.dtype)

# With slicestore: load once, draw for ever; `normalise` maps the training subjects' range to [-1, 1].
cohort = stage(Store.open(path), "source", "train")
index = rng.integers(len(cohort), size=8)
images, labels = normalise(cohort.take("image", index), cohort.limits), cohort.take("label", index)
print("slicestore:", images.shape, images.dtype, labels.shape, labels.dtype)
