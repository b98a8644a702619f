"""A store in a bucket, on a real S3 server: as a store in a folder, and what only a network can do."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import zarr
from obstore.store import S3Store
from zarr.storage import ObjectStore

from slicestore import s3 as s3_module
from slicestore.errors import InputError
from slicestore.ingest import ingest
from slicestore.inputs import Input
from slicestore.place import Place
from slicestore.settings import Preprocessing
from slicestore.spread import processes
from slicestore.store import Store
from slicestore.verify import verify

Cohort = Callable[..., list[Input]]


@pytest.fixture
def url(s3: Callable[[], str]) -> str:
    return s3()


@pytest.fixture
def inputs(tmp_path: Path, make_cohort: Cohort) -> list[Input]:
    return make_cohort(tmp_path / "raw", sources=2, targets=1)


def steps(inputs: list[Input], url: str, config: Preprocessing, key: Path) -> list[str]:
    """Ingest, and say what happened to each volume."""
    said: list[str] = []
    ingest(inputs, url, config, key_file=key, progress=lambda done, total, what: said.append(what))
    return said


@contextmanager
def requests() -> Iterator[list[str]]:
    """Method and path of what the server is asked."""
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("werkzeug"), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def objects(place: Place) -> dict[str, bytes]:
    return {name: bytes(place.get(name)) for name in place.sizes()}


def test_a_store_in_a_bucket_is_the_store_in_a_folder_object_by_object(
    url: str, tmp_path: Path, inputs: list[Input], small: Preprocessing
) -> None:
    local = ingest(inputs, tmp_path / "local.zarr", small)
    remote = ingest(inputs, url, small, key_file=tmp_path / "key.json")
    assert remote.path == url
    assert remote.fingerprint == local.fingerprint
    assert remote.entries == local.entries
    assert objects(remote.place) == objects(local.place)
    for entry in remote.entries:
        assert np.array_equal(remote.read(entry, "image"), local.read(entry, "image"))
        assert remote.record(entry) == local.record(entry)
    out = np.empty((2, 16, 16), dtype=np.float16)
    remote.reader(remote.entries[0], "image").slices([3, 1], out)
    assert np.array_equal(out, local.read(local.entries[0], "image")[[3, 1]])
    report = verify(url)
    assert report.intact
    assert (report.where, report.finished, report.volumes) == (url, True, 3)


def test_the_key_to_the_subjects_stays_on_this_machine(
    url: str, tmp_path: Path, inputs: list[Input], small: Preprocessing, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    store = ingest(inputs, url, small)
    key = tmp_path / "work" / f"{url.removeprefix('s3://').replace('/', '--')}.key.json"
    assert json.loads(key.read_text())["s001"]["subject"] == "patient-source-1"
    assert key.stat().st_mode & 0o777 == 0o600
    for name, data in objects(store.place).items():
        assert b"patient-" not in data
        assert "patient-" not in name


def test_plain_zarr_reads_it(url: str, tmp_path: Path, inputs: list[Input], small: Preprocessing) -> None:
    store = ingest(inputs, url, small, key_file=tmp_path / "key.json")
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = S3Store(bucket, prefix=prefix, client_options={"allow_http": True})
    root = zarr.open_group(ObjectStore(client, read_only=True), mode="r")
    assert root.attrs["slicestore"] == 2
    for entry in store.entries:
        array = root[f"{entry.group}/image"]
        assert np.array_equal(np.asarray(array), store.read(entry, "image"))  # type: ignore[arg-type]


def test_opening_takes_two_requests_however_many_volumes(
    url: str, tmp_path: Path, inputs: list[Input], small: Preprocessing
) -> None:
    ingest(inputs, url, small, key_file=tmp_path / "key.json")
    with requests() as said:
        store = Store.open(url)
    assert len(said) == 2, said
    with requests() as said:
        store.read(store.entries[0], "image")
        store.record(store.entries[0])
    assert len(said) == 1, said


def test_ingesting_again_does_nothing_and_damage_is_mended(
    url: str, tmp_path: Path, inputs: list[Input], small: Preprocessing
) -> None:
    key = tmp_path / "key.json"
    assert steps(inputs, url, small, key) == ["s000 made", "s001 made", "t000 made"]
    whole, place = objects(Place.at(url)), Place.at(url)
    with requests() as said:
        assert steps(inputs, url, small, key) == ["s000 kept", "s001 kept", "t000 kept"]
    put = [line for line in said if "PUT /" in line]
    assert put
    assert all(".lock" in line for line in put)
    entry = Store.open(url).entries[1]
    name = f"{entry.group}/image/c/0/0/0"
    damaged = bytearray(whole[name])
    damaged[40] ^= 1
    place.put(name, bytes(damaged))
    with pytest.raises(InputError, match=r"image of source subject s001: found damaged data \(slice \d \(position"):
        Store.open(url).read(entry, "image")
    assert not verify(url).intact
    assert verify(url, deep=False).intact
    assert steps(inputs, url, small, key) == ["s000 kept", "t000 kept", "s001 made"]
    place.delete([name])
    with pytest.raises(InputError, match=r"image/c/0/0/0 of subject s001 missing"):
        Store.open(url)
    assert steps(inputs, url, small, key) == ["s000 kept", "t000 kept", "s001 made"]
    assert objects(place) == whole


def test_an_ingest_that_broke_off_is_resumed(
    url: str, tmp_path: Path, inputs: list[Input], small: Preprocessing
) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, what: str) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        ingest(inputs, url, small, key_file=tmp_path / "key.json", progress=stop)
    with pytest.raises(InputError, match=r"no manifest\.json.*interrupted"):
        Store.open(url)
    report = verify(url)
    assert (report.intact, report.finished, report.volumes) == (True, False, 2)
    assert steps(inputs, url, small, tmp_path / "key.json") == ["s000 kept", "s001 kept", "t000 made"]
    local = ingest(inputs, tmp_path / "local.zarr", small)
    assert objects(Place.at(url)) == objects(local.place)


def test_what_changed_replaces_what_was(url: str, tmp_path: Path, inputs: list[Input], small: Preprocessing) -> None:
    ingest(inputs, url, small, key_file=tmp_path / "key.json")
    other = Preprocessing(size=24, spacing_mm=0.8)
    updated = ingest(inputs, url, other, key_file=tmp_path / "key.json")
    fresh = ingest(inputs, tmp_path / "fresh.zarr", other)
    assert objects(updated.place) == objects(fresh.place)


def test_a_large_object_goes_in_parts_and_is_there_whole(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "PART", 6 << 20)  # the least that S3 takes is 5 MB
    place, data = Place.at(url), np.random.default_rng(0).bytes(20 << 20)
    with requests() as said:
        place.put("large", data)
        place.put("small", data[: 6 << 20])
    assert len([line for line in said if "PUT /" in line and "/large" in line]) == 4
    assert len([line for line in said if "/small" in line]) == 1
    assert bytes(place.get("large")) == data


def test_processes_write_to_it_too(url: str, tmp_path: Path, inputs: list[Input], small: Preprocessing) -> None:
    store = ingest(inputs, url, small, key_file=tmp_path / "key.json", spread=processes(2))
    assert objects(store.place) == objects(ingest(inputs, tmp_path / "local.zarr", small).place)


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_two_ingests_do_not_write_one_store(
    url: str, tmp_path: Path, inputs: list[Input], small: Preprocessing
) -> None:
    with Place.at(url).lock():
        with pytest.raises(InputError, match=r"another ingest at work .*renewed \d+ s ago.*free 120 s after its end"):
            ingest(inputs, url, small, key_file=tmp_path / "key.json")
        assert Place.at(url).kind() == "nothing there"
    assert ingest(inputs, url, small, key_file=tmp_path / "key.json").entries


def test_the_lock_tells_nothing_of_its_owner(url: str) -> None:
    place = Place.at(url)
    parent = Place.at(url.rpartition("/")[0])
    with place.lock():
        claim = json.loads(bytes(parent.get("cohort.zarr.lock")))
        assert set(claim) == {"owner", "time"}
        assert len(claim["owner"]) == 16
    assert parent.sizes() == {}


def test_a_dead_owner_s_lock_is_taken_over_and_a_living_one_keeps_its_own(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "LEASE_S", 1.5)
    monkeypatch.setattr(s3_module, "BEAT_S", 0.3)
    parent = Place.at(url.rpartition("/")[0])
    parent.put("cohort.zarr.lock", b"left by a process that was killed")
    with pytest.raises(InputError, match="another ingest at work"), Place.at(url).lock():
        pass
    time.sleep(2.7)  # the server's clock has whole seconds
    with Place.at(url).lock():
        time.sleep(2.7)
        with pytest.raises(InputError, match="another ingest at work"), Place.at(url).lock():
            pass
    with Place.at(url).lock():
        pass


def test_one_who_lost_its_lock_writes_no_more(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "BEAT_S", 0.1)
    place, parent = Place.at(url), Place.at(url.rpartition("/")[0])
    with place.lock():
        place.put("x", b"mine")
        parent.put("cohort.zarr.lock", b"another took over while this one slept")
        time.sleep(1)
        with pytest.raises(InputError, match="it took over while this one could not renew its lock"):
            place.put("x", b"late")
    assert bytes(place.get("x")) == b"mine"
    assert "cohort.zarr.lock" in parent.sizes()  # it is the other's


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_endpoint_that_does_not_answer_is_told_within_seconds(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    started = time.monotonic()
    for act in (Store.open, verify):
        with pytest.raises(InputError, match=rf"{url}/.*: found no answer; .* Remedy: check AWS_ENDPOINT_URL"):
            act(url)
    assert time.monotonic() - started < 60


def test_a_missing_bucket_is_named(url: str, inputs: list[Input], small: Preprocessing, tmp_path: Path) -> None:
    for act in (Store.open, verify, lambda u: ingest(inputs, u, small, key_file=tmp_path / "key.json")):
        with pytest.raises(InputError, match=r"found no bucket 'nowhere'; .* create it"):
            act("s3://nowhere/cohort.zarr")


def test_an_empty_prefix_is_no_store(url: str) -> None:
    for act in (Store.open, verify):
        with pytest.raises(InputError, match=r"cohort\.zarr: found nothing there"):
            act(url)
    Place.at(url).put("something", b"else")
    with pytest.raises(InputError, match="found a prefix with other objects that is no store"):
        Store.open(url)


class Refusing(BaseHTTPRequestHandler):
    """Answers every request as S3 does where one has no rights."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.end_headers()
        self.wfile.write(b"<Error><Code>AccessDenied</Code></Error>")

    do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_refused_access_names_the_credentials(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(InputError, match=r"found access denied; .*AWS_ACCESS_KEY_ID"):
            Store.open(url)
        with pytest.raises(InputError, match="found access denied"), Place.at(url).lock():
            pass
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_answer_that_took_403_milliseconds_is_not_refused_access() -> None:
    text = (
        "Error performing PUT http://127.0.0.1:9/b/x in 403.32ms, after 3 retries - HTTP error: error sending request"
    )
    assert s3_module._refusal("s3://b/x", text).found == "no answer"


def test_missing_credentials_are_told_as_such(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")  # where a machine of AWS would find some
    with pytest.raises(InputError, match=r"found no credentials in the environment; .*AWS_SKIP_SIGNATURE"):
        Store.open(url)


def test_images_do_not_go_over_a_network_unencrypted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://storage.example:9000")
    with pytest.raises(
        InputError, match=r"storage\.example:9000: found an endpoint without encryption.*AWS_ALLOW_HTTP"
    ):
        Store.open(url)
