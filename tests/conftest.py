"""Which tests may run at the same time: `make test` has one process a core.

Files go to processes whole, so that what a file shares is made once. All that starts Ray goes to one of them, since two
Rays at once are slower than one after the other; but for the hosts of network namespaces, which mostly wait.
"""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Name each test's group."""
    for item in items:
        ray = item.get_closest_marker("ray") and not item.get_closest_marker("cluster")
        group = "ray" if ray else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
