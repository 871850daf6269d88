"""The house: imports run one way, every room says what it is for, and no file grows too long."""

import ast
from pathlib import Path

import pytest

from helpers.records import ROOT

# From the ground up; what stands directly in `helpers/` is ground or a command.
ROOMS = (
    "ground",
    "data",
    "models",
    "training",
    "evaluation",
    "deployment",
    "benchmarking",
    "reporting",
    "commands",
)
GROUND = {
    "helpers",
    "helpers.cluster",
    "helpers.config",
    "helpers.console",
    "helpers.metrics",
    "helpers.records",
}
MODULES = sorted((ROOT / "helpers").rglob("*.py"))

# Imports that run up, each with its reason: one that is gone must be taken out here.
BACKWARD = {}

LONGEST = 400  # lines


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def room(module):
    """The room of a module or of a name in one, `helpers.data.chips.read_chip`."""
    first = module.split(".")[1:2]
    if module in GROUND or not first:
        return "ground"
    if first[0] in ROOMS:
        return first[0]
    above = module.rpartition(".")[0]
    return "ground" if above in GROUND - {"helpers"} or first[0][0].isupper() else "commands"


def imported(source):
    """What a module imports anywhere in it, as full names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the house in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(source):
    """The same of `helpers` alone."""
    return [name for name in imported(source) if name.split(".")[0] == "helpers"]


def backward(source, module):
    """The rooms above its own that a module imports from."""
    height = ROOMS.index(room(module))
    return {r for r in map(room, imports(source)) if ROOMS.index(r) > height}


def test_imports_run_one_way():
    found = {
        (module_name(path), above)
        for path in MODULES
        for above in backward(path.read_text(), module_name(path))
    }
    assert found == set(BACKWARD)


@pytest.mark.parametrize(
    "module, source, above",
    [
        ("helpers.records", "from helpers import InputError", set()),
        ("helpers.records", "from helpers.console import one_line", set()),
        ("helpers.records", "from helpers import data", {"data"}),
        ("helpers.config", "import helpers.finetune", {"commands"}),
        ("helpers.data.chips", "from helpers.models.files import load_classifier", {"models"}),
        ("helpers.data.chips", "def f():\n    from helpers.reporting import plots", {"reporting"}),
        ("helpers.reporting.plots", "from helpers.data.chips import read_chip", set()),
        ("helpers.finetune", "from helpers.training.methods import train", set()),
        ("helpers.data.chips", "import numpy\nfrom torch import nn", set()),
    ],
)
def test_the_walk_sees_what_runs_back(module, source, above):
    assert backward(source, module) == above


def test_every_room_says_its_one_job():
    packages = [path for path in MODULES if path.name == "__init__.py"]
    rooms = {room(module_name(path)) for path in packages}
    assert rooms == set(ROOMS) - {"commands"}
    for path in packages:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path}: no docstring"


def test_no_file_is_too_long():
    folders = ("helpers", "tools", "benchmarks", "example", "tests")
    paths = [path for folder in folders for path in Path(ROOT, folder).rglob("*.py")]
    long = {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if len(path.read_text().splitlines()) > LONGEST
    }
    assert not long
