"""What `make run` and `make notebooks` do around the notebooks, with notebooks of one cell."""

import sys

import nbformat
import pytest

from helpers.console import run_command
from helpers.records import ROOT
from tools import run_notebooks

RESULT = """
from pathlib import Path
Path("runs/training_history").mkdir(parents=True)
Path("runs/training_history/new.csv").write_text("renewed")
Path("runs/weights.bin").write_text("not to be committed")
print("executed")
"""
SCRIPT = """
from IPython.display import HTML
HTML("<img src=x onerror=alert(6)><script>alert(6)</script>")
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of two notebooks, with results of earlier runs; returns what writes a notebook."""
    (tmp_path / "helpers").symlink_to(ROOT / "helpers")
    for folder in ("runs/training_history", "training_history"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "old.csv").write_text("mine")
        (tmp_path / folder / "new.csv").write_text("old")

    def write(**cells):
        for name, source in cells.items():
            notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
            nbformat.write(notebook, tmp_path / f"{name}.ipynb")
        monkeypatch.setattr(run_notebooks, "NOTEBOOKS", {name: {} for name in cells})

    monkeypatch.setattr(run_notebooks, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return write


def run(monkeypatch, *arguments):
    """Run the tool; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["run_notebooks", *arguments])
    try:
        run_command(run_notebooks.main, with_lines=False)
    except SystemExit as stop:
        return stop.code
    return 0


def outputs(path):
    return [
        output
        for cell in nbformat.read(path, as_version=4).cells
        for output in cell.get("outputs", [])
    ]


def test_committed_notebooks_and_results_are_renewed_and_nothing_else(
    project, tmp_path, monkeypatch
):
    project(first=RESULT, second=SCRIPT)
    assert run(monkeypatch, "--in_place") == 0
    assert outputs(tmp_path / "first.ipynb")[0].text == "executed\n"
    assert "papermill" not in nbformat.read(tmp_path / "first.ipynb", as_version=4).metadata
    texts = {p.relative_to(tmp_path).as_posix(): p.read_text() for p in tmp_path.glob("**/*.csv")}
    assert texts == {
        "training_history/new.csv": "renewed",
        "training_history/old.csv": "mine",
        "runs/training_history/new.csv": "old",
        "runs/training_history/old.csv": "mine",
    }
    assert not list(tmp_path.rglob("weights.bin"))
    page = (tmp_path / "reports/second.html").read_text()
    assert page.index("Content-Security-Policy") < page.index("<script")
    assert "default-src 'none'" in page  # and with it nothing in the page runs
    assert '<a href="second.html">second</a>' in (tmp_path / "reports/index.html").read_text()


def test_a_notebook_that_fails_renews_nothing(project, tmp_path, monkeypatch, capsys):
    project(first=RESULT, second="raise ValueError('in the\\nmiddle')")
    before = (tmp_path / "first.ipynb").read_text()
    assert run(monkeypatch, "--in_place") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: second.ipynb failed: ValueError: in the middle (see ")
    assert error.count("\n") == 1
    assert (tmp_path / "first.ipynb").read_text() == before
    assert (tmp_path / "training_history/new.csv").read_text() == "old"
    assert outputs(tmp_path / "reports/second.ipynb")[-1].output_type == "error"


def test_an_unknown_notebook_is_named(project, tmp_path, monkeypatch, capsys):
    project(first=RESULT)
    (tmp_path / "parameters.yaml").write_text("third: {}")
    assert run(monkeypatch, "--parameters", "parameters.yaml") == 2
    assert "parameters.yaml: no notebook third.ipynb here" in capsys.readouterr().err
