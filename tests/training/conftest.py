"""Chips that the tests of this room share."""

import pytest
from accelerate.state import AcceleratorState

from tests.fake_data import manifest_folder


@pytest.fixture(scope="session")
def chips_folder(tmp_path_factory):
    """A manifest of 32 training chips in two classes; do not change it."""
    folder = tmp_path_factory.mktemp("data")
    return manifest_folder(folder, counts={"train": 16, "valid": 8, "test": 8})


@pytest.fixture(autouse=True)
def no_precision_of_another_test():
    """Accelerate keeps the first precision of a process, which on some CPUs is bf16."""
    AcceleratorState._reset_state()
