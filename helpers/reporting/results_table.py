"""Every published number in one tidy table: a row is one metric of one run on one split."""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from helpers.evaluation.evidence_records import SHOWN, TRIVIAL, Evidence, run_facts
from helpers.metrics import METRICS
from helpers.training.runs import Run

COLUMNS = (
    "study", "task", "backbone", "run", "method", "k", "rank", "layers", "seed", "train_chips",
    "train_fraction", "places", "split", "metric", "value", "group_low", "group_high", "seconds",
    "memory_bytes", "trained_parameters", "machine", "commit",
)  # fmt: skip
"""`study` is where the runs come from (`sources` of the results page); `backbone` names its weights
too, and is empty where there is none; `k` the last blocks that
were adapted, none for all; `seed` is `mean` for the mean over seeds; `places` says whether the
splits hold whole places (`held out`) or mix them (`mixed`). Intervals are over places. `seconds`
are those of the whole training, its frozen part included (`evidence_records.training_seconds`)."""


def evidence_rows(evidence: Evidence) -> list[dict[str, Any]]:
    """Rows of a task's evidence: all runs, the baselines, and the means over seeds."""
    record, summary = evidence.record, evidence.record["summary"]
    runs = record["runs"] + record["shapes"]
    common = {"study": "evidence", "task": record["task"]}
    rows = baseline_rows(common, record["baselines"])
    labels = {entry["method"]: entry["backbone"] for entry in runs}
    means = mean_rows(common, summary["means"] + summary["shapes"])
    rows += [row | {"backbone": labels[row["method"]]} for row in means]
    for entry in runs:
        facts = {name: entry.get(name) for name in COLUMNS if name in entry}
        places = "mixed" if entry["random_split"] else "held out"
        rows += run_rows(common | facts | {"places": places}, entry)
    return rows


def comparison_rows(
    task: str, runs: dict[str, Run], measured: Iterable[str], means: pd.DataFrame, trivial: dict
) -> list[dict[str, Any]]:
    """Rows of a comparison: all runs, the baselines, and the means over seeds of the main runs.

    `measured` are names of the runs that trained in a process of their own, `trivial` metrics of
    the baselines by name.
    """
    common = {"study": "comparison", "task": task}
    rows = baseline_rows(common, trivial)
    common["backbone"] = next(iter(runs.values())).record["backbone"]
    rows += mean_rows(common, means.to_dict("records"))
    for name, run in runs.items():
        record, config = run.record, run.record["config"]
        facts = run_facts(run, name in measured) | {
            "run": name,
            "method": record["method"],
            "seed": config["seed"],
            "train_fraction": config["train_fraction"],
            "places": "held out",
        }
        rows += run_rows(common | facts, record)
    return rows


def run_rows(facts: dict[str, Any], record: dict[str, Any]) -> list[dict[str, Any]]:
    """All test metrics of a run, and accuracy and AUROC on validation where the record has them."""
    rows = [facts | {"split": "test"} | _metric(record["test"], name) for name in METRICS]
    if "valid" in record:
        rows += [facts | {"split": "valid"} | _metric(record["valid"], name) for name in SHOWN]
    return rows


def baseline_rows(common: dict[str, Any], entries: dict[str, dict]) -> list[dict[str, Any]]:
    """Accuracy and AUROC of what knows no shapes, on the test split; it is alike for all seeds."""
    facts = common | {"seed": "mean", "places": "held out", "split": "test"}
    return [
        facts | {"method": name, "run": name} | _metric(entries[name], metric)
        for name in TRIVIAL
        for metric in SHOWN
    ]


def mean_rows(common: dict[str, Any], means: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds on the test split, with intervals over places where there are some."""
    rows = []
    for row in means:
        ends = {"group_low": row["low"], "group_high": row["high"]}
        facts = {"method": row["method"], "seed": "mean", "places": "held out", "split": "test"}
        numbers = {"metric": row["metric"], "value": row["value"]}
        rows.append(common | facts | numbers | (ends if row["unit"] == "places" else {}))
    return rows


def _metric(entries: dict[str, dict], name: str) -> dict[str, Any]:
    entry = entries[name]
    ends = {end: entry.get(end) for end in ("group_low", "group_high")}
    return {"metric": name, "value": entry["value"], **ends}


def results_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows as a table of COLUMNS; whole numbers stay whole where some are missing."""
    table = pd.DataFrame(rows, columns=COLUMNS)
    for name in ("k", "rank", "train_chips", "memory_bytes", "trained_parameters"):
        table[name] = table[name].astype("Int64")
    table["seed"] = table["seed"].map(lambda seed: "" if pd.isna(seed) else str(seed))
    return table


def csv(table: pd.DataFrame) -> str:
    """The table as the text of its file."""
    return table.to_csv(index=False, float_format="%.6g")
