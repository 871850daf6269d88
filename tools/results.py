"""Rebuild tables, figures and READMEs from the committed records, without training: `make results`.

What comes in: the histories, predictions and records of the comparisons, the tables of the
benchmarks, and the shortcut checks. What goes out: the comparisons' figures, and the parts between
`<!-- make results: NAME -->` and `<!-- end -->` of README.md, `docs/` and the data set's page.
Every answer stands once more where its link leads, from the same record.
"""

import argparse
import re
from pathlib import Path

import pandas as pd

from helpers.evaluation import comparison
from helpers.evaluation.baselines import strongest_baseline
from helpers.evaluation.evidence_records import Evidence, published_evidence
from helpers.evaluation.seeds import draws_of, method_gains, method_means
from helpers.metrics import with_group_interval, with_interval
from helpers.records import ROOT, written_whole
from helpers.reporting import answers, comparison_plots, plots
from helpers.reporting.evidence import headline_row, headline_table
from helpers.reporting.tables import markdown
from helpers.training.config import METHOD_DEFAULTS
from tools import evidence_pages
from tools.measured import (
    http_part,
    ray_table,
    scene_memory_table,
    time_to_quality_tables,
    training_speed_table,
)
from tools.published import DEPLOYED, Published, published, served

# Benchmark variants that the README shows; the others are in the linked table.
SHOWN = (
    "eager_fp32",
    "lora_unmerged",
    "bf16",
    "compiled_fp32",
    "compiled_bf16",
    "onnx_int8_dynamic",
    "openvino_fp32",
    "openvino_bf16",
    "openvino_int8",
    "pruned_50",
    *(f"structured_40{step}" for step in ("", "_recovered", "_int8", "_int8_bf16")),
    *(f"structured_40_taylor{step}" for step in ("", "_recovered", "_int8", "_int8_bf16")),
    *(f"structured_{percent}_taylor_int8" for percent in (25, 50, 60)),
)

RSSCN7 = Path("benchmark_results/benchmark_lora_rsscn7_example_seed0")  # no comparison of its own
ONLY_TIMED = "only timed"  # an adapter without an update says nothing of quality


# --- Figures and their tables ---------------------------------------------------------------------


def rebuild(data_set: Published) -> None:
    """Draw the comparison's figures again and write the tables behind them."""
    figures = ROOT / data_set.folder / "figures"
    title = data_set.config.title
    histories = comparison.histories(data_set.runs)
    curves = comparison.operating_points(data_set.runs)
    reliability = comparison.reliability_rows(data_set.runs)
    headline = comparison.headline_rows(data_set.all_runs, data_set.config)
    shapes = comparison.by_shape(data_set.all_runs, data_set.config, "accuracy")
    drawn = {
        "lora_curves": comparison_plots.method_curves(histories, title),
        "lora_roc_pr": comparison_plots.operating_curves(curves, f"Test split, {title}"),
        "lora_reliability": comparison_plots.reliability_diagram(reliability, title),
        "lora_headline": comparison_plots.headline(headline, title),
        "lora_ranks": comparison_plots.against(shapes, "trainable_parameters", "accuracy", title),
    }
    for name, figure in drawn.items():
        plots.save(figure, figures / f"{name}.png")


# --- Parts of the READMEs -------------------------------------------------------------------------


def methods_table(data_set: Published) -> str:
    """Test accuracy and AUROC of every method and baseline, and what it costs."""
    costs = comparison.cost_table(data_set.runs)
    lines = []
    for name, metrics in data_set.baselines.items():
        cells = [with_group_interval(metrics[metric], 4) for metric in ("accuracy", "auroc")]
        lines.append((name, *cells, *"-----"))
    for method, rows in data_set.means.groupby("method", sort=False):
        rows = rows.set_index("metric")
        histories = [run.history for (name, _), run in data_set.runs.items() if name == method]
        best = [h.valid_auroc[h.valid_loss.idxmin()] for h in histories]
        cells = [
            f"{with_interval(row, 4)}, seeds {row.least:.4f} to {row.most:.4f}"
            for _, row in rows.loc[["accuracy", "auroc"]].iterrows()
        ]
        lines.append(
            (
                f"`{method}`, {len(histories)} seeds",
                *cells,
                f"{sum(best) / len(best):.4f}",
                f"{costs.trainable_parameters[method]:,}",
                f"{costs.bytes_to_keep[method] / 1e3:,.0f}",
                "{seconds_per_epoch:.3g} ({seconds_least:.3g} to {seconds_most:.3g})".format(
                    **costs.loc[method]
                ),
                f"{costs.peak_memory_bytes[method] / 1e6:,.0f}",
            )
        )
    header = ("method", "accuracy", "AUROC", "AUROC on validation", "trained", "kB to keep",
              "s per epoch", "peak MB")  # fmt: skip
    return markdown(header, lines)


def headline_of(data_set: Published, name: str) -> tuple:
    """The row of a comparison in the table of tasks: LoRA of the last blocks and of all."""
    by_blocks = {
        ("lora", seed): run
        for (shape, seed), run in comparison.block_runs(data_set.all_runs, data_set.config).items()
        if shape == comparison.ALL_BLOCKS
    }
    runs = {("lora_last6" if m == "lora" else m, s): run for (m, s), run in data_set.runs.items()}
    runs |= by_blocks
    draws = draws_of(runs)
    means = method_means(runs, draws, ("auroc",)).set_index("method").to_dict("index")
    gains = method_gains(runs, draws)
    gains = gains[gains["first"] == "head_only"].set_index("second").to_dict("index")
    trivial = strongest_baseline(data_set.baselines)
    chips = comparison.first_seed(data_set.runs)["head_only"].record["chips"]["test"]
    return headline_row(name, chips, trivial, means, gains)


def method_defaults_table() -> str:
    """What every method trains with unless told otherwise."""
    names = ("epochs", "patience", "batch_size", "learning_rate")
    lines = [
        (f"`{method}`", *(defaults.get(name, "swept") for name in names))
        for method, defaults in METHOD_DEFAULTS.items()
    ]
    return markdown(("method", *(f"`{name}`" for name in names)), lines)


def caveats(data_set: Published) -> str:
    """What must stand beside every number on Hurricane Harvey, counted from its predictions.

    The name of a chip is its coordinates; the shares of the backbone's images are those of its
    card (`example/BACKBONE_CARD.md`).
    """
    chips = comparison.first_seed(data_set.runs)["lora"].test_predictions
    place = chips.img_path.str.split("/").str[-1]
    damaged, undamaged = (set(place[chips.label == name]) for name in ("damage", "no_damage"))
    twins = len(damaged & undamaged) / len(damaged)
    two = chips.group.value_counts(normalize=True).head(2).sum()
    trained = data_set.runs["lora", data_set.config.seeds[0]].record["chips"]["train"]
    return (
        "Three things about Hurricane Harvey. The backbone has seen the "
        f"{trained:,} training chips before, without labels: "
        f"{trained / BACKBONE_IMAGES:.0%} of what it was distilled on. The labels are largely "
        f"before and after: {twins:.0%} of the damaged "
        "test chips have an undamaged one at the same coordinates, so what tells the acquisitions "
        f"apart tells the classes apart. And two of the {chips.group.nunique()} test places hold "
        f"{two:.0%} of the test chips, so intervals over places rest on few."
    )


BACKBONE_IMAGES = 9_135  # chips of the distillation, from example/BACKBONE_CARD.md


def shapes_table(data_set: Published) -> str:
    """Ranks and layers of LoRA: parameters, mean accuracy and AUROC with the range over seeds."""
    parts = [
        comparison.by_shape(data_set.all_runs, data_set.config, metric).assign(metric=metric)
        for metric in ("accuracy", "auroc")
    ]
    table = pd.concat(parts)
    lines = []
    for (layers, rank), rows in table.groupby(["layers", "rank"], sort=False):
        cells = [
            f"{v.mean():.4f} ({v.min():.4f} to {v.max():.4f})"
            for _, v in rows.groupby("metric").value
        ]
        lines.append((f"`{layers}`", rank, f"{rows.trainable_parameters.iloc[0]:,}", *cells))
    lines.sort(key=lambda line: int(line[2].replace(",", "")))
    return markdown(("layers", "rank", "trained", "accuracy", "AUROC"), lines)


def serving_table(summary: pd.DataFrame, recommended: str) -> str:
    """What the deployable forms cost, from `published.served`."""
    eager = summary.loc["eager_fp32"]
    lines = []
    for name in summary.index.intersection(SHOWN, sort=False):
        row = summary.loc[name]
        mark = "**" if name == recommended else ""
        if isinstance(row.get("unavailable"), str):
            lines.append((f"`{name}`", row.unavailable, *["-"] * 7))
            continue
        only_timed = pd.isna(row.get("valid_accuracy_loss_points"))
        lines.append(
            (
                f"{mark}`{name}`{mark}",
                f"{row.accuracy:.3f}" if pd.notna(row.accuracy) else "-",
                ONLY_TIMED if only_timed else _points(row),
                f"{row.p50_ms:.1f} ({eager.p50_ms / row.p50_ms:.2f}x)",
                f"{row.images_per_s:.0f} ({row.images_per_s / eager.images_per_s:.2f}x)",
                f"{row.mebibytes_on_disk:.1f}",
                f"{row.peak_mib:.0f}",
                f"{row.cold_start_s:.1f}",
                "-" if only_timed else "yes" if row.passes_gate else "no",
            )
        )
    header = (
        "variant",
        "test accuracy",
        "points lost in validation",
        "one chip, ms (speedup)",
        "images/s (speedup)",
        "file, MiB",
        "peak memory, MiB",
        "cold start, s",
        "passes",
    )
    return markdown(header, lines)


def _points(row: pd.Series) -> str:
    """Percentage points of accuracy lost on the validation split, which decides."""
    ends = (row[f"valid_accuracy_loss_points{end}"] for end in ("", "_low", "_high"))
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*ends)


def questions_table(sets: dict[str, Published]) -> str:
    """The project's questions with short answers for every published data set."""
    harvey, example = sets["hurricane_harvey"], sets["example"]
    lines = []
    for question in dict.fromkeys([*harvey.answers, *example.answers]):
        notebook = "benchmark.ipynb#The-decision"
        if question != DEPLOYED:
            notebook = "finetune_lora.ipynb#The-answers"
        shown = [(harvey, f"{harvey.folder}/README.md#Answers"), (example, notebook)]
        cells = [
            f"{answer} ([shown here](../{page}))" if (answer := of.answers.get(question)) else "-"
            for of, page in shown
        ]
        lines.append((f"**{question}**", *cells))
    return markdown(("question", "Hurricane Harvey, satellite", "embedded example, aerial"), lines)


def pages(sets: dict[str, Published], found: dict[str, Evidence]) -> dict[str, dict[str, str]]:
    """Page -> name of a part -> what stands between its marks."""
    harvey, example = sets["hurricane_harvey"], sets["example"]
    others = {"hurricane_harvey": headline_of(harvey, "hurricane_harvey, seen")}
    tasks = headline_table(evidence_pages.of_methods(found), others)
    return {
        "README.md": {"tasks": tasks, "caveats": caveats(harvey)},
        "docs/results.md": {
            "questions": questions_table(sets),
            "shapes": shapes_table(harvey),
            "training_speed": training_speed_table(),
            **time_to_quality_tables(),
            "serving": serving_table(*harvey.served),
            "serving_rsscn7": serving_table(*served(RSSCN7)),
            "serving_example": serving_table(*example.served),
        },
        "docs/deployment.md": {
            "http": http_part(),
            "scene_memory": scene_memory_table(),
            "ray": ray_table(),
        },
        "docs/parameters.md": {"method_defaults": method_defaults_table()},
        str(harvey.folder / "README.md"): {
            "caveats": caveats(harvey),
            "answers": answers.listed(harvey.answers),
            "methods": methods_table(harvey),
        },
    }


def renew(page: str, parts: dict[str, str]) -> str:
    """A page with every marked part replaced.

    Raises:
        ValueError: a part has no place, or a place no part.
    """
    pattern = re.compile(r"(<!-- make results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    places = [match[1] for match in pattern.findall(page)]
    if sorted(places) != sorted(parts):
        raise ValueError(f"the page has places for {places}, results are {list(parts)}")
    return pattern.sub(lambda match: f"{match[1]}{parts[match[2]]}\n{match[3]}", page)


def main() -> None:
    """Rebuild everything that is published from the committed records."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    plots.use_style()
    sets, found = published(), published_evidence()
    for data_set in sets.values():
        rebuild(data_set)
    evidence_pages.draw(found)
    evidence_pages.write_results(sets, found)
    every = pages(sets, found) | evidence_pages.pages(found)
    for name, parts in every.items():
        with written_whole(ROOT / name) as part:
            part.write_text(renew((ROOT / name).read_text(), parts))
    print("renewed", ", ".join(every), "and the figures of", ", ".join([*sets, *found]))


if __name__ == "__main__":
    main()
