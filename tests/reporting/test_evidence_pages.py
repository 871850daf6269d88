"""What is published of the evidence is what its records say; its page works in a browser."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from helpers.evaluation.evidence_records import TRIVIAL, Evidence, published_evidence
from helpers.records import ROOT
from helpers.reporting import evidence
from helpers.reporting.results_page import Report, results_page
from helpers.reporting.results_table import COLUMNS, csv, evidence_rows, results_table
from tests.evidence_numbers import check_numbers
from tools import evidence_pages, results

PUBLISHED = published_evidence()
METRICS = {name: {"value": 0.9, "group_low": 0.8, "group_high": 0.95} for name in (
    "accuracy", "precision", "recall", "f1", "auroc", "average_precision", "brier",
    "calibration_error")}  # fmt: skip


def row(second, value, low, high, unit="places", better=0, worse=0, **more):
    return {
        "first": "head_only", "second": second, "metric": "auroc", "seeds": 5, "value": value,
        "low": low, "high": high, "unit": unit, "better": better, "worse": worse, **more,
    }  # fmt: skip


def made(name="farms", seen=False, gain=(0.03, 0.01, 0.05), valid=(0.8, 0.9), unit="places"):
    """Evidence on two methods, of which only what tables and figures read is there."""
    runs = [
        {"run": f"{method}_seed0", "backbone": "tiny", "method": method, "seed": 0,
         "train_fraction": 1.0, "random_split": False, "k": None, "learning_rate": 0.01,
         "train_chips": 500,
         "trained_parameters": 770, "seconds": 12.5, "memory_bytes": 5e8, "stopped": True,
         "test": METRICS, "valid": METRICS, "machine": "a CPU, threads: 2", "commit": "abc1234"}
        for method in ("head_only", "lora")
    ]  # fmt: skip
    means = [
        {"method": method, "metric": metric, "seeds": 5, "value": value, "low": value - 0.05,
         "high": value + 0.02, "unit": unit}
        for method, value in (("head_only", 0.9), ("lora", 0.93))
        for metric in ("accuracy", "auroc")
    ]  # fmt: skip
    gains = row("lora", *gain, unit=unit, better=5 * (gain[1] > 0))
    summary = {
        "means": means,
        "validation": [
            {"method": method, "metric": metric, "value": value}
            for method, value in zip(("head_only", "lora"), valid, strict=True)
            for metric in ("accuracy", "auroc")
        ],
        "gains": [gains],
        "shares": [gains | {"fraction": f, "train_chips": int(500 * f)} for f in (0.25, 1.0)],
        "random_split": [
            {"method": "lora", "seeds": 5, "value": 0.05, "low": 0.02, "high": 0.08}
            | {f"{kind}_{end}": 0.9 for kind in ("held_out", "mixed")
               for end in ("value", "low", "high")}
        ],
        "where": [
            {"method": "lora", "group": str(n), "accuracy": 0.8 + n / 20, "chips": 10 + n,
             "longitude": -95 + n / 10, "latitude": 42 + n / 10}
            for n in range(3)
        ],
        "matched": [m | {"value": 0.7} for m in means if m["metric"] == "auroc"],
        "shapes": [], "shape_gains": [],
    }  # fmt: skip
    settings = {"title": "farms or none", "seen": seen, "seen_note": "none.", "fractions": [0.25],
                "methods": {}, "shapes": {},
                "citation": "Somebody (2020).", "licence": "MIT."}  # fmt: skip
    record = {
        "task": name, "settings": settings, "places": {"test": 12}, "backbone": "tiny",
        "baselines": {
            name: {m: {"value": 0.6, "low": 0.5, "high": 0.7} for m in ("accuracy", "auroc")}
            for name in TRIVIAL
        },
        "choices": {"lora": {"rate": 0.001, "extended": 1, "on_edge": False}},
        "trials": [{"method": "lora", "learning_rate": r, "valid_loss": r, "failure": ""}
                   for r in (0.01, 0.001)],
        "runs": runs, "shapes": [], "missing": 0, "summary": summary,
        "matching": {"pairs": 40, "imbalance_before": 1.2, "imbalance_after": 0.05},
    }  # fmt: skip
    table = pd.DataFrame({"run": [run["run"] for run in runs]})
    return Evidence(record, table)


def test_the_page_says_what_the_records_say():
    """`make results` would change nothing."""
    for name, parts in evidence_pages.pages(PUBLISHED).items():
        page = (ROOT / name).read_text()
        assert results.renew(page, parts) == page, name


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_number_comes_from_the_predictions(name):
    check_numbers(PUBLISHED[name])


def test_the_parts_of_the_page_hold_tables_figures_and_words():
    (parts,) = evidence_pages.pages({"farms": made(), "towns": made("towns", True)}).values()
    assert (
        "| farms, not seen | majority class | 0.600 [0.500, 0.700] |" in parts["tasks"]
        and "| +0.0300 [+0.0100, +0.0500] | Yes | 770 | 12.5 | 500 |" in parts["tasks"]
    )
    assert parts["tasks"].startswith("![") and "figures/methods.png" in parts["tasks"]
    assert "| towns, seen | `lora` | 125 (25%) | +0.0300" in parts["shares"]
    assert "mixing" in parts["mixed"] and "| optimistic |" in parts["mixed"]
    assert "0.001: 0.0010; 0.01: 0.0100 | 0.001 | inside, extended 1 times" in parts["rates"]
    assert "40 pairs" in parts["matched"] and "lora 0.700 [0.880, 0.950]" in parts["matched"]
    assert parts["when"].splitlines()[2:] == [
        "| `lora` over `head_only` | farms, not seen (+0.0300); towns, seen (+0.0300) | - | - |"
    ]


def test_the_readmes_table_has_a_row_a_task_and_marks_what_is_clearly_ahead():
    found = {"farms": made(), "towns": made("towns", True, gain=(0.01, -0.01, 0.03))}
    for one in found.values():
        one.record["chips"] = {"test": 80}
    towns_by_hand = ("towns, seen", "1", *"-" * 6)
    table = evidence.headline_table(found, {"towns": towns_by_hand, "lakes": ("lakes", *"-" * 7)})
    assert table.splitlines()[2:] == [
        "| towns, seen | 80 | majority 0.600 [0.500, 0.700] | 0.900 [0.850, 0.920] | - | "
        "0.930 [0.880, 0.950] | - | - |",
        "| lakes | - | - | - | - | - | - | - |",
        "| farms, not seen | 80 | majority 0.600 [0.500, 0.700] | 0.900 [0.850, 0.920] | - | "
        "**0.930 [0.880, 0.950]** | - | - |",
    ]
    found["towns"].record["missing"] = 1
    table = evidence.headline_table(found, {"towns": towns_by_hand})
    assert table.splitlines()[2].startswith("| towns, seen | 1 |")


def predicted(skill):
    """Test predictions of both runs on 60 chips of 12 places: the higher the skill, the better."""
    generator = np.random.default_rng(0)
    target = generator.permutation(np.arange(60) % 2)
    p_tree = 1 / (1 + np.exp(-skill * (2 * target - 1) - generator.standard_normal(60)))
    table = pd.DataFrame({
        "split": "test", "target": target, "group": [str(n // 5) for n in range(60)],
        "predicted": (p_tree > 0.5).astype(int), "p_none": 1 - p_tree, "p_tree": p_tree,
    })  # fmt: skip
    return pd.concat([table.assign(run=f"{name}_seed0") for name in ("head_only", "lora")])


def test_a_backbone_that_has_seen_the_chips_is_compared_with_one_that_has_not():
    found = {
        "towns": Evidence(made("towns", True).record, predicted(3.0)),
        "towns_unseen": Evidence(made("towns_unseen").record, predicted(0.2)),
    }
    (parts,) = evidence_pages.pages(found).values()
    *_, head, lora = parts["unseen"].splitlines()
    assert head.startswith("| `head_only`, 1 seeds |") and head.endswith("| Yes |")
    assert lora == head.replace("head_only", "lora")
    gain = float(re.search(r"\| \+(\S+) \[\+", head)[1])
    aurocs = [roc_auc_score(p.target, p.p_tree) for p in (predicted(0.2), predicted(3.0))]
    assert gain == pytest.approx(aurocs[1] - aurocs[0], abs=6e-5)
    del found["towns"]
    (parts,) = evidence_pages.pages(found).values()
    assert parts["unseen"] == evidence_pages.NOTHING_YET


def test_shapes_have_a_table_of_their_own():
    one = made()
    shape = {"of": "lora", "method": "rslora", "changes": {"lora_rank": 16}}
    summary = one.record["summary"]
    summary["shapes"] = [m | {"method": "wide"} for m in summary["means"] if m["method"] == "lora"]
    gain = row("wide", -0.02, -0.03, -0.01, worse=5) | {"first": "lora", "seeds": 3}
    summary["shape_gains"] = [gain]
    settings = one.record["settings"] | {"shapes": {"wide": shape}}
    runs = [one.record["runs"][1] | {"run": "wide_seed0", "method": "wide"}]
    table = pd.DataFrame({"run": ["head_only_seed0", "lora_seed0", "wide_seed0"]})
    one = Evidence(one.record | {"settings": settings, "shapes": runs}, table)
    (parts,) = evidence_pages.pages({"farms": one}).values()
    assert (
        "| farms, not seen | `wide`, 3 seeds | `method` rslora, `lora_rank` 16 | "
        "0.930 [0.880, 0.950] | -0.0200 [-0.0300, -0.0100] over `lora` | No, it is worse | "
    ) in parts["ranks"]
    assert "wide" not in parts["tasks"] + parts["when"] + parts["sentences"]
    written = results_table(evidence_rows(one))
    assert len(written[written.method == "wide"]) == 2 + 8 + 2


def test_bands_have_a_table_of_their_own():
    one = made("bands")
    rows = {"head_only": {"method": "lora", "changes": {}}, "lora": {"method": "lora"}}
    rows["lora"]["changes"] = {"bands": [0, 0, 0, 1], "stem": "new"}
    settings = one.record["settings"] | {"methods": rows, "training": {"bands": [0, 0, 0]}}
    bands = replace(one, record=one.record | {"settings": settings})
    (parts,) = evidence_pages.pages({"farms": made(), "bands": bands}).values()
    lines = parts["bands"].splitlines()[2:]
    assert lines[0].startswith("| bands, not seen | `head_only`, 5 seeds | 0, 0, 0 | pretrained |")
    assert "| - | - | 770 |" in lines[0]
    assert lines[1].startswith("| bands, not seen | `lora`, 5 seeds | 0, 0, 0, 1 | new | 0.930")
    assert "| +0.0300 [+0.0100, +0.0500] over `head_only` | Yes | 770 | 12.5 |" in lines[1]
    assert "bands" not in parts["tasks"] and "Backbone, tiny: none." in parts["sources"]
    assert list(evidence_pages.figures({"bands": bands})) == ["gain_by_chips"]


def test_without_evidence_the_page_says_so():
    (parts,) = evidence_pages.pages({}).values()
    assert set(parts.values()) == {evidence_pages.NOTHING_YET}


@pytest.mark.parametrize(
    "gain, unit, places, word",
    [
        ((0.03, 0.01, 0.05), "places", 12, "Yes"),
        ((0.03, 0.01, 0.05), "places", 5, "Yes (5 places only)"),
        ((0.03, -0.01, 0.05), "places", 12, "Not clearly"),
        ((0.0001, -0.0002, 0.0003), "places", 12, "No, the difference is too small to matter"),
        ((0.03, 0.01, 0.05), "chips", 0, "no places are named, so no verdict"),
    ],
)
def test_a_verdict_needs_an_interval_over_places(gain, unit, places, word):
    one = made(gain=gain, unit=unit)
    one.record["places"]["test"] = places
    assert evidence.verdict(evidence.auroc_gain(one, "lora"), one) == word


def test_it_is_said_where_validation_ranks_otherwise():
    assert "rank the methods alike" in evidence.task_sentence(made())
    other = evidence.task_sentence(made(valid=(0.9, 0.8)))
    assert "Validation ranks head_only > lora; test lora > head_only." in other


def test_figures_are_drawn_and_their_lines_differ_in_grey(tmp_path, monkeypatch):
    found = {"farms": made(), "towns": made("towns", True)}
    evidence_pages.draw(found, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gain_by_chips.png", "methods.png", "places_farms.png", "places_towns.png",
    ]  # fmt: skip
    figure = evidence_pages.evidence_plots.gain_by_chips(
        evidence.over_tasks(found, "shares"), "tiny"
    )
    lines = [line for line in figure.axes[0].lines if line.get_marker() != "None"]
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == len(lines) == 2
    assert [line.get_markerfacecolor() == "white" for line in lines] == [True, False]


def test_the_table_is_tidy():
    table = results_table(evidence_rows(made()))
    assert tuple(table) == COLUMNS
    unique = ["study", "run", "method", "seed", "split", "metric"]
    assert not table.duplicated(unique).any() and table.value.notna().all()
    assert len(table) == 6 + 4 + 2 * (8 + 2)
    mean = table[(table.seed == "mean") & (table.metric == "auroc") & (table.method == "lora")]
    assert mean[["value", "group_low", "group_high"]].round(3).values.tolist() == [
        [0.93, 0.88, 0.95]
    ]
    assert ",770," in csv(table) and ",500000000," in csv(table)  # whole numbers stay whole


def test_intervals_over_chips_are_not_called_intervals_over_places():
    table = results_table(evidence_rows(made(unit="chips")))
    assert table[table.seed == "mean"].group_low.isna().all()


def test_no_text_of_the_data_ends_the_script_or_becomes_a_tag():
    wicked = "</script><img src=x onerror=alert(1)>"
    table = results_table(evidence_rows(made(wicked)))
    page = results_page(table, [Report(wicked, wicked, "a.html")])
    assert page.count("</script>") == 2 and "<img" not in page
    data = re.search(r'id="data">(.*?)</script>', page)[1]
    assert json.loads(data)["texts"][COLUMNS.index("task")] == [wicked]
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]* (?:src|href)=", page)


def test_the_page_works_in_a_browser(tmp_path):
    """Rows, filters and sorting, as a reader meets them, in the committed page."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed")
    page = (ROOT / "reports/results.html").read_text()
    # A reader who clicks on `value` twice: the highest first.
    clicks = "<script>const h = [...document.querySelectorAll('th button')].find(" \
        "b => b.textContent === 'value'); h.click(); h.click();</script></body>"  # fmt: skip
    (tmp_path / "page.html").write_text(page.replace("</body>", clicks))
    dom = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
         "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, check=True, timeout=300,
    ).stdout  # fmt: skip
    body = re.search(r"<tbody>(.*?)</tbody>", dom, re.DOTALL)[1]
    lines = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in body.split("</tr>")[:-1]]
    table = pd.read_csv(ROOT / "reports/results.csv", dtype={"seed": str})
    shown = table[(table.seed == "mean") & (table.split == "test") & (table.metric == "auroc")]
    assert f"{len(shown)} of {len(table)} rows" in dom and len(lines) == len(shown) > 3
    values = [float(line[COLUMNS.index("value")]) for line in lines]
    np.testing.assert_allclose(values, sorted(shown.value, reverse=True), atol=1e-5)
    assert 'aria-sort="descending"' in dom and dom.count("<select") == 8


def test_a_changed_record_changes_what_is_published():
    one = made()
    summary = one.record["summary"]
    gains = [summary["gains"][0] | {"value": 0.04}]
    other = replace(one, record=one.record | {"summary": summary | {"gains": gains}})
    assert evidence.tasks_table({"farms": one}) != evidence.tasks_table({"farms": other})
