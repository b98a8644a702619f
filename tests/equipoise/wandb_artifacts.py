"""The part of the stand-in for W&B's server that takes artifacts: begun, their manifest and files named, committed."""

from __future__ import annotations

import json
from typing import Any


class Artifacts:
    """What was begun and what was committed, by the artifact's name."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._begun: dict[str, dict[str, Any]] = {}
        self.whole: dict[str, dict[str, Any]] = {}
        """Committed: type, metadata, aliases."""

    def query(self, operation: str, given: dict[str, Any]) -> dict[str, Any] | None:
        """Answer an operation on artifacts; None of any other."""
        wanted = given.get("input") or given
        match operation:
            case "CreateArtifact":
                name = wanted["artifactCollectionName"]
                told = {"type": wanted["artifactTypeName"], "metadata": json.loads(wanted["metadata"] or "{}")}
                self._begun[name] = told | {"aliases": [alias["alias"] for alias in wanted["aliases"]]}
                sequence = {"latestArtifact": None}
                return {"createArtifact": {"artifact": {"id": name, "state": "PENDING", "artifactSequence": sequence}}}
            case "CreateArtifactManifest":
                file = self._place(wanted["name"], wanted["artifactID"])
                manifest = {"id": wanted["artifactID"], "file": file | {"name": wanted["name"]}}
                return {"createArtifactManifest": {"artifactManifest": manifest}}
            case "CreateArtifactFiles":
                nodes = [self._file(file["name"], file["artifactID"]) for file in wanted["artifactFiles"]]
                return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
            case "CommitArtifact":
                name = wanted["artifactID"]
                self.whole[name] = self._begun[name]
                return {"commitArtifact": {"artifact": {"id": name, "digest": ""}}}
        return None

    def _place(self, name: str, artifact: str) -> dict[str, Any]:
        return {"id": name, "uploadUrl": f"{self._url}/artifact/{artifact}/{name}", "uploadHeaders": []}

    def _file(self, name: str, artifact: str) -> dict[str, Any]:
        more = {"name": name, "displayName": name, "artifact": {"id": artifact}, "storagePath": name}
        return self._place(name, artifact) | more | {"uploadMultipartUrls": None}
