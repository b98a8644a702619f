"""What the storage tests share: small synthetic cohorts, and the real crops where they are."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from slicestore.geometry import Geometry
from slicestore.inputs import Input
from slicestore.settings import Preprocessing
from slicestore.volume import Volume, write

MakeCohort = Callable[..., list[Input]]


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real crops (`EQUIPOISE_REAL_DATA`)."""
    folder = os.environ.get("EQUIPOISE_REAL_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("EQUIPOISE_REAL_DATA names no folder of real volumes")
    return Path(folder)


@pytest.fixture(scope="session")
def small() -> Preprocessing:
    """Slices of 16 x 16 pixels of 1 mm."""
    return Preprocessing(size=16, spacing_mm=1.0)


@pytest.fixture(scope="session")
def make_cohort() -> MakeCohort:
    """Write tiny labelled sources and targets, 5 slices of 24 x 20 voxels of half a millimetre; return the inputs."""
    return _make_cohort


def _make_cohort(folder: Path, *, sources: int = 2, targets: int = 2, target_labels: bool = False) -> list[Input]:
    inputs = []
    for domain, count in (("source", sources), ("target", targets)):
        for number in range(count):
            rng = np.random.default_rng([number, len(domain), ord(domain[0])])
            geometry = Geometry((20, 24, 5), (0.5, 0.5, 2.0), (1.0, 2.0, 3.0 + number))
            label = np.zeros((5, 24, 20), dtype=np.uint8)
            label[1:4, 6:14, 4 + number : 12 + number] = 1
            image = np.round(rng.normal(100, 10, label.shape) + 200 * label).astype(np.int16)
            name = f"patient-{domain}-{number}"
            write(Volume(image, geometry), folder / f"{name}.nii.gz")
            labelled = domain == "source" or target_labels
            if labelled:
                write(Volume(label, geometry), folder / f"{name}_label.nii.gz")
            inputs.append(
                Input(
                    domain,
                    name,
                    folder / f"{name}.nii.gz",  # type: ignore[arg-type]
                    folder / f"{name}_label.nii.gz" if labelled else None,
                )
            )
    return inputs


# --- places -----------------------------------------------------------------------------------------------------------

BUCKET = "angiography"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A real S3 server on loopback, with one bucket; its URL."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
    )
    client.create_bucket(Bucket=BUCKET)
    client.close()
    yield url
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Give URLs of prefixes in an empty part of a bucket; the environment leads there."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in (
        ("AWS_ENDPOINT_URL", s3_server),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
    ):
        monkeypatch.setenv(name, value)
    return lambda: f"s3://{BUCKET}/{next(_NUMBERS)}/cohort.zarr"


_NUMBERS = itertools.count()


@pytest.fixture
def as_nobody() -> Iterator[Callable[[], AbstractContextManager[Path]]]:
    """Be a user without rights, even where the tests run as root; gives a folder that this user can reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)

    @contextmanager
    def nobody() -> Iterator[Path]:
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)

    yield nobody
    shutil.rmtree(folder)
