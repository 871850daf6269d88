"""What the pages say is what the committed records say, and what stands behind their links."""

import re
import subprocess
from dataclasses import replace

import nbformat
import pytest

from helpers.evaluation.evidence_records import published_evidence
from helpers.records import ROOT
from tools import evidence_pages, results

LINKED = re.compile(r"(?:\| |\*\* \| )?([^|]*?) \(\[shown here\]\(([^#)]+)#([^)]+)\)\)")


@pytest.fixture(scope="module")
def sets():
    return results.published()


def test_every_page_says_what_the_records_say(sets):
    """`make results` would change nothing."""
    found = published_evidence()
    for name, parts in results.pages(sets, found).items():
        page = (ROOT / name).read_text()
        assert results.renew(page, parts) == page, name
    for name, text in evidence_pages.results(sets, found).items():
        assert (ROOT / name).read_text() == text, name


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
    page = ROOT / "docs/results.md"
    found = LINKED.findall(page.read_text())
    assert len(found) == page.read_text().count("[shown here]") > 10
    for answer, target, anchor in found:
        text = section_text(page.parent / target, anchor)
        assert answer.strip() in text, (target, anchor, answer)


PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "example/CARD.md",
    "example/BACKBONE_CARD.md",
    "reports/hurricane_harvey/README.md",
    "reports/log.md",
    *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
)


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(name):
    """To what is committed, and to a heading of it."""
    page = ROOT / name
    here = {path.resolve() for path in map(ROOT.joinpath, committed("*"))}
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        path = (page.parent / target).resolve() if target else page.resolve()
        assert path in here or any(path in file.parents for file in here), target
        if anchor:
            section_text(path, anchor)


def test_the_readme_is_read_in_minutes():
    assert len((ROOT / "README.md").read_text().split()) < 1300


def test_the_headline_follows_its_records(sets):
    """Other predictions there are other numbers here."""
    data_set = sets["hurricane_harvey"]
    pair = "full", data_set.config.seeds[0]
    run = data_set.runs[pair]
    predictions = run.predictions.assign(p_damage=1 - run.predictions.p_damage)
    tables = []
    for shown in (run, replace(run, predictions=predictions)):
        of_one = replace(data_set)  # nothing computed yet
        vars(of_one)["runs"] = {pair: shown}
        tables.append(results.methods_table(of_one))
    assert tables[0] != tables[1]


def test_every_method_of_the_published_comparison_has_its_seeds(sets):
    seeds = [method for method, _ in sets["hurricane_harvey"].runs]
    assert {method: seeds.count(method) for method in seeds} == {
        "head_only": 5, "lora": 5, "dora": 5, "full": 3,
    }  # fmt: skip


def test_the_share_of_the_backbones_images_is_that_of_its_card():
    card = (ROOT / "example" / "BACKBONE_CARD.md").read_text()
    assert f"{results.BACKBONE_IMAGES:,} chips, none from a validation or test block" in card


def committed(pattern):
    command = ["git", "ls-files", pattern]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_no_chip_of_the_published_data_is_in_the_repository():
    files = committed("reports")
    assert files and not [f for f in files if f.endswith((".jpg", ".jpeg", ".tif", ".npy"))]


def test_only_figures_that_a_page_links_to_are_committed():
    """And every one of them, and what `make results` reads: pictures stand in the notebooks."""
    needed = set()
    for name in PAGES:
        for link in re.findall(r"\]\(([^)]*figures/[^)]*\w)\)", (ROOT / name).read_text()):
            needed.add((ROOT / name).parent.joinpath(link).resolve().relative_to(ROOT).as_posix())
    needed |= {
        f"{folder}figures/lora_shortcuts.csv" for folder in ("", "reports/hurricane_harvey/")
    }
    assert set(committed(":(glob)**/figures/*")) == needed


def test_a_part_without_a_place_is_an_error():
    page = "a\n<!-- make results: one -->\nold\n<!-- end -->\nz\n"
    assert results.renew(page, {"one": "new"}) == page.replace("old", "new")
    with pytest.raises(ValueError, match=r"places for \['one'\], results are \['one', 'two'\]"):
        results.renew(page, {"one": "new", "two": "newer"})
