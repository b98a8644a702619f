"""A view at W&B: as our runs need it, found again, saved, and what W&B says against that.

Knows W&B's package that writes views, with the private parts of it that this takes, and W&B's errors; knows nothing of
what a view shows.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from equipoise.uploading import REACH_S
from slicestore.errors import InputError

if TYPE_CHECKING:
    import wandb
    import wandb_workspaces.workspaces as ws

_HURRY = {
    "x_graphql_retry_max": 1,
    "x_graphql_retry_wait_min_seconds": 0.5,
    "x_graphql_timeout_seconds": REACH_S,
}
"""W&B's client would try for longer than it waits for itself, and could not say then what was wrong."""


def load() -> None:
    """Import the package; that it is written in an old way of what it depends on is none of our user's concern."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Pydantic V1 style", DeprecationWarning)
        import wandb_workspaces.workspaces  # noqa: F401


def exact(group: str) -> type[ws.Workspace]:
    """The package's class for a group's runs, put right where they are not what it takes for granted.

    - The package writes a filter as a sentence and reads it again, and fails over a name with a quote or = in it.
    - Panels are called by chance, so that no two views are the same.
    """
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.expr import filters_tree_to_v2

    of_the_group = filters_tree_to_v2((ws.Metric("Group") == group).to_model())

    class Exact(ws.Workspace):
        def _to_model(self) -> Any:
            view: Any = super()._to_model()
            shown = view.spec.section
            shown.run_sets[0].filters = of_the_group
            for section in shown.panel_bank_config.sections:
                for number, panel in enumerate(section.panels):
                    panel.id = _id(group, section.name, str(number))
            return view

    return Exact


def name(made: ws.Workspace, group: str) -> None:
    """Call a view so that it is found again: by its group, in its project."""
    made._internal_name = f"nw-{_id(made.entity, made.project, group)}-v"


def plain(made: ws.Workspace) -> dict[str, Any]:
    """What W&B would be given of a view, as plain data."""
    data: dict[str, Any] = json.loads(made._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    return data


def saved(made: ws.Workspace, api: wandb.Api) -> str:
    """Save a view, over the one of its name if there is one, and return its address.

    Raises:
        InputError: there is no such project.
    """
    from wandb_workspaces.workspaces import internal

    made._internal_id = _known(made, api)
    internal.upsert_view2(made._to_model())
    return str(made.url)


def _known(made: ws.Workspace, api: wandb.Api) -> str:
    """W&B's id of the view, where it was saved before; else nothing."""
    from wandb_workspaces._graphql import execute_graphql

    asked = (
        "query View($entity: String, $project: String, $view: String) { project(name: $project, entityName: $entity) "
        '{ allViews(viewType: "project-view", viewName: $view) { edges { node { id } } } } }'
    )
    given = {"entity": made.entity, "project": made.project, "view": made._internal_name}
    project = execute_graphql(api, asked, given).get("project")
    if project is None:
        raise InputError(
            f"{made.entity}/{made.project}",
            found="no such project at W&B",
            rule="a view shows the runs of a project",
            remedy="run `equipoise sync`, which makes it, or set WANDB_ENTITY to the user or team that has the runs",
        )
    return next((str(edge["node"]["id"]) for edge in project["allViews"]["edges"]), "")


def _id(*of: str) -> str:
    """Eleven characters, as W&B's own, by which something is found again."""
    return hashlib.sha256("\0".join(of).encode()).hexdigest()[:11]


@contextmanager
def asking() -> Iterator[None]:
    """Ask W&B something while a person waits.

    Raises:
        InputError: it refuses or fails.
    """
    import wandb
    from wandb.errors import Error
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    settings = wandb.setup().settings
    before = {name: getattr(settings, name) for name in _HURRY}
    try:
        for name, value in _HURRY.items():
            setattr(settings, name, value)
        yield
    except (Error, WandbApiFailedError) as error:
        raise _told(error, str(settings.base_url)) from error
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def _told(error: Exception, address: str) -> InputError:
    """What W&B's client says, as an error of ours."""
    from wandb.errors import AuthenticationError

    cause = error.__cause__ if isinstance(error, AuthenticationError) else error  # None: the key has no key's form
    status = getattr(getattr(cause, "response", None), "http_status", 0)
    said = " ".join(str(error if cause is None else cause).split())
    found = f"HTTP {status}" if status and "<no message>" in said else said
    if cause is None or status in (401, 403) or "invalid credentials" in said:
        return InputError(
            address,
            found=f"a refused key ({found})",
            rule="a view is saved by an account that W&B knows and that may write to the project",
            remedy="run `wandb login --relogin`, or set another WANDB_API_KEY",
        )
    return InputError(
        address,
        found=f"a failure of W&B's ({found})",
        rule="a view is saved when W&B takes it",
        remedy="try again later; the study and its runs lack nothing meanwhile",
    )
