"""A store's objects in an S3 bucket, of AWS or of anything that speaks its protocol.

Knows requests, leases and what their errors mean; knows nothing of what the bytes mean. Credentials, region and
endpoint come from the usual AWS_* variables of the environment.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cached_property
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore import exceptions as errors
from obstore.store import S3Store

from slicestore.errors import InputError, StorageError
from slicestore.place import Place, busy

LEASE_S = 120.0
"""A lock that was not renewed for this long is a dead writer's, and is taken over."""
PART = 1 << 26
"""Bytes that go in one request; more go in several, each of which may be repeated and has a time limit of its own."""
BEAT_S = 20.0
"""Time between two renewals."""


class Bucket(Place):
    """Objects whose keys begin with a prefix."""

    block = 1 << 24

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket, self._prefix = bucket, prefix
        self.url = f"s3://{bucket}/{prefix}"
        self._lost = threading.Event()
        """Set when another writer has taken over our lock."""

    @classmethod
    def named(cls, url: str) -> Bucket:
        """Take a URL apart.

        Raises:
            InputError: no bucket or no prefix in it.
        """
        match = re.fullmatch(r"s3:/{1,2}([^/]+)/+(.*[^/])/*", url)
        if match is None:
            raise InputError(
                url,
                found="no bucket or no prefix",
                rule="an S3 URL has a bucket and a name in it",
                remedy="give s3://bucket/name",
            )
        return cls(match[1], match[2])

    def __reduce__(self) -> tuple[object, ...]:
        """Make the client anew in another process: its threads do not travel."""
        return Bucket, (self._bucket, self._prefix)

    @cached_property
    def _client(self) -> S3Store:
        names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
        endpoint = next((os.environ[name] for name in names if os.environ.get(name)), "")
        if endpoint.startswith("http:") and not (_is_loopback(endpoint) or os.environ.get("AWS_ALLOW_HTTP")):
            raise InputError(
                endpoint,
                found="an endpoint without encryption",
                rule="patients' images go over https, except within this machine",
                remedy="use its https address, or set AWS_ALLOW_HTTP=true where the network is trusted",
            )
        return S3Store(
            self._bucket,
            client_options={"allow_http": endpoint.startswith("http:"), "connect_timeout": "4s", "timeout": "120s"},
            retry_config={
                "max_retries": 3,
                "retry_timeout": timedelta(seconds=20),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=2),
                    "base": 2,
                },
            },
        )

    def kind(self) -> str:
        """See `Place.kind`."""
        return "a prefix with other objects" if self.sizes() else "nothing there"

    def get(self, name: str) -> memoryview:
        """See `Place.get`."""
        with self._told(name):
            return memoryview(obstore.get(self._client, self._key(name)).bytes())

    def get_range(self, name: str, start: int, length: int) -> memoryview:
        """See `Place.get_range`."""
        with self._told(name):
            return memoryview(obstore.get_range(self._client, self._key(name), start=start, length=length))

    def whole(self, name: str) -> Callable[[int, int], memoryview]:
        """See `Place.whole`."""
        data = self.get(name)
        return lambda start, length: data[start : start + length]

    def put(self, name: str, data: bytes | memoryview, *, private: bool = False) -> None:
        """See `Place.put`; a PUT is whole or nothing. Who may read is the bucket's policy: `private` adds nothing.

        What goes in parts is there once the last one is; parts of one that was broken off are no object, and go when a
        rule of the bucket says so (AbortIncompleteMultipartUpload).
        """
        self._refuse_lost()
        with self._told(name):
            large = len(data) > PART
            obstore.put(self._client, self._key(name), bytes(data), use_multipart=large, chunk_size=PART)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """See `Place.sizes`."""
        below = f"{self._prefix}/{prefix}".rstrip("/")
        with self._told(prefix):
            pages = obstore.list(self._client, prefix=f"{below}/", chunk_size=1000)
            found = {item["path"][len(self._prefix) + 1 :]: item["size"] for page in pages for item in page}
        return dict(sorted(found.items()))

    def delete(self, names: Iterable[str]) -> None:
        """See `Place.delete`."""
        self._refuse_lost()
        keys = [self._key(name) for name in names]
        if keys:
            with self._told(""), suppress(FileNotFoundError):
                obstore.delete(self._client, keys)

    def tidy(self) -> None:
        """See `Place.tidy`: a PUT that was broken off leaves nothing."""

    def _refuse_lost(self) -> None:
        if self._lost.is_set():
            raise busy(self.url, "it took over while this one could not renew its lock", "wait until it has finished")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """See `Place.lock`: an object beside the prefix that only one can create, and that its owner renews.

        A killed owner's lock is taken over once it has not been renewed for `LEASE_S`, by the server's clock alone.
        """
        self._lost.clear()
        lease = _Lease(self, self._acquire())
        try:
            yield
        finally:
            lease.end()

    def _acquire(self) -> str:
        """Create the lock object, or take a dead owner's; the tag of what was written."""
        key, mine = f"{self._prefix}.lock", _claim()
        with self._told(".lock"):
            try:
                return _tag(obstore.put(self._client, key, mine, mode="create", use_multipart=False))
            except errors.AlreadyExistsError:
                pass
            try:
                held = obstore.head(self._client, key)
                age = (self._now() - held["last_modified"]).total_seconds()
                if age > LEASE_S:
                    tag = {"e_tag": _tag(held)}
                    return _tag(obstore.put(self._client, key, mine, mode=tag, use_multipart=False))  # type: ignore[arg-type]
            except (FileNotFoundError, errors.PreconditionError):  # let go, or taken by a third, in this very moment
                age = 0.0
        raise busy(
            self.url,
            f"its lock was renewed {age:.0f} s ago",
            f"wait until it has finished; a killed one's lock is free {LEASE_S:.0f} s after its end",
        )

    def _now(self) -> datetime:
        """Read the server's clock: ours may be wrong by minutes."""
        probe = f"{self._prefix}.lock.{secrets.token_hex(8)}"
        obstore.put(self._client, probe, b"", use_multipart=False)
        try:
            return obstore.head(self._client, probe)["last_modified"]
        finally:
            obstore.delete(self._client, [probe])

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Turn the client's errors into ones that say what to do."""
        try:
            yield
        except (FileNotFoundError, errors.BaseError) as error:
            text = str(error)
            where = f"{self.url}/{name}".rstrip("/")
            if "NoSuchBucket" in text:
                raise InputError(
                    where,
                    found=f"no bucket {self._bucket!r}",
                    rule="stores and copies are made in a bucket that exists",
                    remedy="check its name, AWS_REGION and AWS_ENDPOINT_URL, or create it",
                ) from None
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(where) from None
            raise _refusal(where, text) from error


class _Lease:
    """Renews a lock in the background until it ends, and deletes it then."""

    def __init__(self, place: Bucket, tag: str) -> None:
        self._place, self._tag, self._over = place, tag, threading.Event()
        self._key = f"{place._prefix}.lock"
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()
        if not self._place._lost.is_set():
            with suppress(FileNotFoundError, errors.BaseError):  # it then runs out by itself
                obstore.delete(self._place._client, [self._key])

    def _beat(self) -> None:
        renewed = time.monotonic()
        while not self._over.wait(BEAT_S):
            try:
                mode: Any = {"e_tag": self._tag}
                self._tag = _tag(obstore.put(self._place._client, self._key, _claim(), mode=mode, use_multipart=False))
                renewed = time.monotonic()
            except (FileNotFoundError, errors.BaseError) as error:
                taken = isinstance(error, FileNotFoundError | errors.PreconditionError)
                if taken or time.monotonic() - renewed > LEASE_S:  # else a dropped connection: the next may get through
                    self._place._lost.set()
                    return


def _claim() -> bytes:
    """What a lock holds: a token that makes it its owner's, and the time for a curious reader; no host, no user."""
    return json.dumps({"owner": secrets.token_hex(8), "time": datetime.now(UTC).isoformat(timespec="seconds")}).encode()


def _tag(result: Any) -> str:
    tag: str = result["e_tag"]
    return tag


def _is_loopback(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"


def _refusal(where: str, text: str) -> InputError:
    """Sort the client's texts: it has few types of error."""
    missing = "/latest/api/token" in text or "/latest/meta-data" in text  # it asked a machine of AWS for credentials
    # Not by the bare numbers of these answers: the texts tell milliseconds too.
    denied = r"AccessDenied|401 Unauthorized|403 Forbidden|InvalidAccessKeyId|SignatureDoesNotMatch"
    if missing or re.search(denied, text):
        return StorageError(
            where,
            found="no credentials in the environment" if missing else "access denied",
            rule="what lies in a bucket is read and written with the rights of AWS_ACCESS_KEY_ID",
            remedy="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SKIP_SIGNATURE=true for a public bucket), or "
            "have the bucket's owner allow it",
        )
    reason = "no answer" if "error sending request" in text else text.splitlines()[0][:200]
    return StorageError(
        where,
        found=reason,
        rule="the endpoint answers within seconds",
        remedy="check AWS_ENDPOINT_URL, AWS_REGION and the network, then run the same command again: what is "
        "finished is kept",
    )
