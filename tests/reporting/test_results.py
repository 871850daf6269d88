"""What the README says is what the committed records say."""

import subprocess

import nbformat
import pandas as pd
import pytest

from helpers.records import ROOT
from tools import results
from tools.run_notebooks import NOTEBOOKS


@pytest.fixture(scope="module")
def sets():
    return results.published()


def test_the_readme_says_what_the_records_say(sets):
    """`make results` would change nothing."""
    readme = (ROOT / "README.md").read_text()
    assert results.renew(readme, results.readme_parts(sets)) == readme


def test_the_headline_follows_its_records():
    """Another accuracy there is another accuracy here."""
    own = results.published()["hurricane_harvey"]
    before = results.methods_table(own)
    run = own.runs["full", own.config.seeds[0]]
    run.record["test"]["accuracy"]["value"] -= 0.3
    assert results.methods_table(own) != before


def test_every_method_of_the_published_comparison_has_its_seeds(sets):
    seeds = [method for method, _ in sets["hurricane_harvey"].runs]
    assert {method: seeds.count(method) for method in seeds} == {
        "head_only": 5, "lora": 5, "dora": 5, "full": 3,
    }  # fmt: skip


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_published_notebook_is_executed_clean_and_small(name):
    path = ROOT / "reports" / "hurricane_harvey" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    assert path.stat().st_size < 1_500_000 and "papermill" not in notebook.metadata
    assert str(ROOT) not in path.read_text()


def test_no_chip_of_the_published_data_is_in_the_repository():
    files = subprocess.run(
        ["git", "ls-files", "reports"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert files and not [f for f in files if f.endswith((".jpg", ".jpeg", ".tif", ".npy"))]
    chips = ("setup_chips.png", "setup_errors.png")
    assert not [f for f in files if f.endswith(chips)]


@pytest.mark.parametrize(
    ("intervals", "word"),
    [
        ([(0.01, 0.03), (0.02, 0.04)], "Yes"),
        ([(0.01, 0.03), (0.02, 0.04), (-0.01, 0.03)], "A little, with most seeds"),
        ([(-0.01, 0.03), (0.02, 0.04)], "Not clearly"),
        ([(-0.03, -0.01)], "No, it is worse"),
        ([(0.0001, 0.0003)], "No, the difference is too small to matter"),
    ],
)
def test_an_answer_in_a_word_weighs_certainty_and_size(intervals, word):
    rows = pd.DataFrame(intervals, columns=["low", "high"])
    assert results.in_a_word(rows.assign(auroc_difference=rows.mean(axis=1))) == word


def test_a_part_without_a_place_is_an_error():
    readme = "a\n<!-- make results: one -->\nold\n<!-- end -->\nz\n"
    assert results.renew(readme, {"one": "new"}) == readme.replace("old", "new")
    with pytest.raises(ValueError, match=r"places for \['one'\], results are \['one', 'two'\]"):
        results.renew(readme, {"one": "new", "two": "newer"})
