"""What the pages say is what the committed records say, and what stands behind their links."""

import re
import subprocess

import nbformat
import pytest

from helpers.records import ROOT
from tools import results
from tools.run_notebooks import NOTEBOOKS

LINKED = re.compile(r"(?:\| |\*\* \| )?([^|]*?) \(\[shown here\]\(([^#)]+)#([^)]+)\)\)")


@pytest.fixture(scope="module")
def sets():
    return results.published()


def test_every_page_says_what_the_records_say(sets):
    """`make results` would change nothing."""
    for name, parts in results.pages(sets).items():
        page = (ROOT / name).read_text()
        assert results.renew(page, parts) == page, name


def section_text(path, anchor):
    """Everything below a heading of a page or notebook, outputs included, up to the next alike."""
    if path.suffix == ".md":
        lines = path.read_text().splitlines()
    else:
        lines = []
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                lines += cell.source.splitlines()
                continue
            for output in cell.outputs:
                lines += output.get("data", {}).get("text/markdown", "").splitlines()
    text, level = [], 0
    for line in lines:
        heading = re.match(r"(#+) (.*)", line)
        if heading and level and len(heading[1]) <= level:
            break
        if heading and heading[2].replace(" ", "-").lower() == anchor.lower():
            level = len(heading[1])
        if level:
            text.append(line)
    assert text, f"{path.name} has no section {anchor}"
    return "\n".join(text)


def test_every_answer_stands_where_its_link_leads():
    readme = (ROOT / "README.md").read_text()
    found = LINKED.findall(readme)
    assert len(found) == readme.count("[shown here]") > 10
    for answer, target, anchor in found:
        assert answer.strip() in section_text(ROOT / target, anchor), (target, anchor, answer)


def test_the_headline_follows_its_records(sets):
    """Another prediction there is another number here."""
    before = results.methods_table(sets["hurricane_harvey"])
    changed = results.published()["hurricane_harvey"]
    run = changed.runs["full", changed.config.seeds[0]]
    run.predictions.loc[:, "p_damage"] = 1 - run.predictions.p_damage
    assert results.methods_table(changed) != before


def test_every_method_of_the_published_comparison_has_its_seeds(sets):
    seeds = [method for method, _ in sets["hurricane_harvey"].runs]
    assert {method: seeds.count(method) for method in seeds} == {
        "head_only": 5, "lora": 5, "dora": 5, "full": 3,
    }  # fmt: skip


def test_the_share_of_the_backbones_images_is_that_of_its_card():
    card = (ROOT / "example" / "BACKBONE_CARD.md").read_text()
    assert f"{results.BACKBONE_IMAGES:,} chips, none from a validation or test block" in card


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


def committed(pattern):
    command = ["git", "ls-files", pattern]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_no_chip_of_the_published_data_is_in_the_repository():
    files = committed("reports")
    assert files and not [f for f in files if f.endswith((".jpg", ".jpeg", ".tif", ".npy"))]
    chips = ("setup_chips.png", "setup_errors.png")
    assert not [f for f in files if f.endswith(chips)]


def test_only_figures_that_a_page_links_to_are_committed():
    """And every one of them, and what `make results` reads: pictures stand in the notebooks."""
    needed = set()
    for folder in ("", "reports/hurricane_harvey/"):
        page = (ROOT / folder / "README.md").read_text()
        needed |= {folder + link for link in re.findall(r"\]\(([^)]*figures/[^)]*\w)\)", page)}
        needed.add(f"{folder}figures/lora_shortcuts.csv")
    assert set(committed(":(glob)**/figures/*")) == needed


def test_a_part_without_a_place_is_an_error():
    page = "a\n<!-- make results: one -->\nold\n<!-- end -->\nz\n"
    assert results.renew(page, {"one": "new"}) == page.replace("old", "new")
    with pytest.raises(ValueError, match=r"places for \['one'\], results are \['one', 'two'\]"):
        results.renew(page, {"one": "new", "two": "newer"})
