"""Chips that the tests of this room share."""

import pytest

from tests.fake_data import manifest_folder


@pytest.fixture(scope="session")
def chips_folder(tmp_path_factory):
    """A manifest of 32 training chips in two classes; do not change it."""
    folder = tmp_path_factory.mktemp("data")
    return manifest_folder(folder, counts={"train": 16, "valid": 8, "test": 8})
