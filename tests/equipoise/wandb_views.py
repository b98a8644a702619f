"""The part of the stand-in for W&B's server that keeps saved views, and says who asks."""

from __future__ import annotations

from typing import Any


class Views:
    """What was saved. One sent without an id is a new one, whatever its name: nobody is spared a second view."""

    def __init__(self) -> None:
        self.entity: str | None = "lab"
        self.projects = ["equipoise"]
        self.saved: dict[str, dict[str, Any]] = {}
        """By id."""

    def query(self, operation: str, given: dict[str, Any]) -> dict[str, Any] | None:
        """Answer an operation on views; None of any other."""
        match operation:
            case "GetDefaultEntity":
                return {"viewer": {"id": "v", "entity": self.entity}}
            case "View":
                if given["project"] not in self.projects or given["entity"] != self.entity:
                    return {"project": None}
                found = [key for key, view in self.saved.items() if view["name"] == given["view"]]
                return {"project": {"allViews": {"edges": [{"node": {"id": key}} for key in found]}}}
            case "UpsertView2":
                key = given.get("id") or f"view-{len(self.saved)}"
                inserted = key not in self.saved
                self.saved[key] = given
                return {"upsertView": {"view": {"id": key, "name": given["name"]}, "inserted": inserted}}
        return None
