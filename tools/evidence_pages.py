"""What `make results` makes of the evidence: parts of its page, figures, one table and its page."""

import io
from pathlib import Path

import pandas as pd

from helpers.evaluation.evidence_records import Evidence
from helpers.records import ROOT, written_whole
from helpers.reporting import evidence, evidence_plots, place_plots, plots
from helpers.reporting.results_page import Report, results_page
from helpers.reporting.results_table import comparison_rows, csv, evidence_rows, results_table
from tools.published import Published

FIGURES = "reports/evidence/figures"
NOTHING_YET = "No task has been run yet; `make evidence` does it."
LINKS = {"hurricane_harvey": "hurricane_harvey/README.md", "example": "../docs/results.md"}


def pages(found: dict[str, Evidence]) -> dict[str, dict[str, str]]:
    """Page -> name of a part -> what stands between its marks."""
    methods = of_methods(found)
    sentences = [f"- {evidence.task_sentence(one)}" for one in methods.values()]
    matched = [
        f"**{name}**: {evidence.matched_sentence(one)}"
        for name, one in found.items()
        if "matching" in one.record
    ]
    unseen = [
        evidence.backbones_table(found[seen], one)
        for name, one in found.items()
        if (seen := name.removesuffix(evidence.UNSEEN)) != name and seen in found
    ]
    parts = {
        "when": evidence.when_lora_pays(found),
        "tasks": with_figure("methods", found, evidence.tasks_table(methods)),
        "sentences": "\n".join(sentences),
        "ranks": evidence.ranks_table(found),
        "shares": with_figure("gain_by_chips", found, evidence.shares_table(found)),
        "mixed": evidence.random_split_table(found),
        "where": "\n\n".join(picture(f"places_{name}") for name in places_of(found)),
        "matched": "\n\n".join(matched),
        "bands": evidence.bands_table({n: e for n, e in found.items() if n not in methods}),
        "unseen": "\n\n".join(unseen),
        "rates": evidence.rates_table(found),
        "sources": evidence.sources(found),
    }
    return {"docs/evidence.md": {name: text or NOTHING_YET for name, text in parts.items()}}


def of_methods(found: dict[str, Evidence]) -> dict[str, Evidence]:
    """The tasks whose rows are methods on the same bands."""
    return {name: one for name, one in found.items() if not evidence.compares_bands(one)}


CAPTIONS = {
    "methods": "Test AUROC of methods and tasks, pretrained, mean over seeds with its interval",
    "gain_by_chips": "How far LoRA is ahead of the head, against the number of training chips",
}


def picture(name: str) -> str:
    """A figure on a page in `docs/`."""
    caption = CAPTIONS.get(name, f"Accuracy of {evidence.LORA} at the test places of {name[7:]}")
    return f"![{caption}](../{FIGURES}/{name}.png)"


def with_figure(name: str, found: dict[str, Evidence], table: str) -> str:
    """A figure above its table, where there is something to draw."""
    return f"{picture(name)}\n\n{table}" if name in figures(found) else table


def figures(found: dict[str, Evidence]) -> dict[str, pd.DataFrame]:
    """Name of a figure over all tasks -> what it draws, where there is something."""
    means = evidence.over_tasks(of_methods(found), "means")
    if len(means):  # a backbone of random weights lies so far off that nothing else could be told
        means = means[means.method.isin(evidence.HEADLINE)]
    tables = {"methods": means, "gain_by_chips": evidence.over_tasks(found, "shares")}
    return {name: table for name, table in tables.items() if len(table)}


def places_of(found: dict[str, Evidence]) -> dict[str, pd.DataFrame]:
    """Accuracy of LoRA by test place, of the tasks that have coordinates."""
    rows = {
        name: [row for row in one.record["summary"]["where"] if row["method"] == evidence.LORA]
        for name, one in found.items()
    }
    return {name: pd.DataFrame(places) for name, places in rows.items() if places}


def draw(found: dict[str, Evidence], folder: Path = ROOT / FIGURES) -> None:
    """Draw the figures of the evidence."""
    backbones = {name: one.record["backbone"] for name, one in found.items()}
    drawing = {
        "methods": evidence_plots.methods_by_task,
        "gain_by_chips": evidence_plots.gain_by_chips,
    }
    for name, table in figures(found).items():
        title = ", ".join(dict.fromkeys(table.task.map(backbones)))
        plots.save(drawing[name](table, title), folder / f"{name}.png")
    for name, places in places_of(found).items():
        title = f"{evidence.LORA} on the test places of {name}, {backbones[name]}"
        plots.save(place_plots.places_map(places, title), folder / f"places_{name}.png")


def results(sets: dict[str, Published], found: dict[str, Evidence]) -> dict[str, str]:
    """The table of all results and its page, by path."""
    rows = []
    for name, data_set in sets.items():
        config = data_set.config
        measured = {config.run(method, config.seeds[0]).name for method in config.methods}
        rows += comparison_rows(
            name, data_set.all_runs, measured, data_set.means, data_set.baselines
        )
    for one in found.values():
        rows += evidence_rows(one)
    written = csv(results_table(rows))
    # The page shows what the file holds, as it is rounded there.
    table = pd.read_csv(io.StringIO(written), keep_default_na=False, na_values=[""])
    reports = [
        Report(f"evidence, {name}", evidence.task_sentence(one), "../docs/evidence.md")
        for name, one in found.items()
    ] + [
        Report(
            f"comparison, {name}",
            "does LoRA improve on the head? " + data_set.answers["Does LoRA improve on it?"],
            LINKS[name],
        )
        for name, data_set in sets.items()
    ]
    return {
        "reports/results.csv": written,
        "reports/results.html": results_page(table, reports),
    }


def write_results(sets: dict[str, Published], found: dict[str, Evidence]) -> None:
    """Write the table of all results and its page."""
    for name, text in results(sets, found).items():
        with written_whole(ROOT / name) as part:
            part.write_text(text)
