"""A stand-in for W&B's server on loopback: it takes runs as W&B's own uploader sends them, or fails in some way.

It answers what wandb 0.31 asks while it uploads a run: who is there, a run's beginning, what it has of a run that goes
on, where files go, and the stream of rows. A row's place in the stream counts, as at W&B: one sent twice is one row.
Artifacts and views have files of their own.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from wandb_artifacts import Artifacts
from wandb_views import Views

Manner = Literal["well", "hangs", "500", "dies", "401", "503"]
"""401 and 503 are what questions are answered with; all else goes well then."""


class WandbServer:
    """What was sent, by the run's id."""

    def __init__(self, manner: Manner = "well", port: int = 0) -> None:
        self.manner = manner
        self.rows: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        self.summaries: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = defaultdict(dict)
        self.ended: list[str] = []
        self.sent: list[bytes] = []
        """Every request's address and body."""
        self.heads: list[str] = []
        """Every request's headers."""
        self.over = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"stands_for": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.artifacts, self.views = Artifacts(self.url), Views()
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.over.set()
        self._http.shutdown()
        self._http.server_close()

    def steps(self, run: str) -> list[int]:
        """The steps of a run's rows, as they lie in its history."""
        return [int(self.rows[run][place]["step"]) for place in sorted(self.rows[run])]

    def take(self, path: str, body: bytes) -> tuple[int, bytes] | None:
        """Answer a request with a status and a body; None after the server's life, of one that was left hanging."""
        self.sent.append(path.encode() + b" " + body)
        if self.manner == "dies" and self.rows and path.endswith("/file_stream"):
            self.manner = "hangs"
        if self.manner == "hangs":
            self.over.wait()
            return None
        if self.manner == "500":
            return 500, b""
        if self.manner in ("401", "503") and path == "/graphql":
            return int(self.manner), b""
        answer: dict[str, Any] = {}
        if path == "/graphql":
            answer = {"data": self.query(json.loads(body))}
        elif path.endswith("/file_stream"):
            self.stream(path.split("/")[-2], json.loads(body))
        return 200, json.dumps(answer).encode()

    def query(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Answer a query by the name of its operation."""
        given, operation = asked.get("variables") or {}, asked.get("operationName") or _operation(asked["query"])
        for part in (self.artifacts, self.views):
            if (answer := part.query(operation, given)) is not None:
                return answer
        match operation:
            case "UpsertBucket":
                run = self.runs[given["name"]]
                run.update({key: value for key, value in given.items() if value is not None})
                return {"upsertBucket": {"bucket": self._bucket(given["name"]), "inserted": True}}
            case "RunResumeStatus":
                known = given["name"] in self.runs
                bucket = self._bucket(given["name"]) if known else None
                return {"model": {"id": "p", "name": "equipoise", "entity": _LAB, "bucket": bucket}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
                return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
            case "Viewer":
                return {
                    "viewer": {"id": "v", "flags": "{}", "entity": "lab", "username": "lab", "teams": {"edges": []}}
                }
        return {}

    def stream(self, run: str, body: dict[str, Any]) -> None:
        """Take a piece of a run's stream."""
        files = body.get("files", {})
        history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for place, line in enumerate(history["content"], history["offset"]):
            self.rows[run][place] = json.loads(line)
        for line in files.get("wandb-summary.json", {}).get("content", []):
            self.summaries[run] = json.loads(line)
        if body.get("complete"):
            self.ended.append(run)

    def _bucket(self, run: str) -> dict[str, Any]:
        last = [json.dumps(self.rows[run][place]) for place in sorted(self.rows[run])[-1:]]
        return {
            "id": run, "name": run, "displayName": run, "description": None, "config": "{}", "sweepName": None,
            "project": {"id": "p", "name": "equipoise", "entity": _LAB}, "tags": [], "notes": None,
            "summaryMetrics": json.dumps(self.summaries.get(run, {})), "logLineCount": 0, "eventsLineCount": 0,
            "historyLineCount": len(self.rows[run]), "historyTail": json.dumps(last), "eventsTail": "[]",
            "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip


_LAB = {"id": "e", "name": "lab"}


def _operation(query: str) -> str:
    """What a query calls itself."""
    found = re.match(r"\s*(?:query|mutation)\s+(\w+)", query)
    return found[1] if found else ""


@contextmanager
def serving(manner: Manner = "well", port: int = 0) -> Iterator[WandbServer]:
    server = WandbServer(manner, port)
    try:
        yield server
    finally:
        server.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stands_for: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.answer(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)

    def do_GET(self) -> None:
        self.answer(b"")

    do_PUT = do_POST

    def answer(self, body: bytes) -> None:
        self.stands_for.heads.append(str(self.headers))
        said = self.stands_for.take(self.path, body)
        if said is None:  # it hangs
            self.close_connection = True
            return
        status, data = said
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass
