"""The store of the tests that start Ray."""

from pathlib import Path

import pytest

from slicestore.store import Store


@pytest.fixture(scope="session")
def store(store: Store) -> Path:
    """Where the tiny store of the other tests lies: workers open it for themselves."""
    return store.path
