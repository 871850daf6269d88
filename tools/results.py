"""Rebuild tables, figures and README from the committed records, without training: `make results`.

What comes in: the histories, predictions and records of the comparisons, the tables of the
benchmarks, and the shortcut checks, all CSV and JSON. What goes out: the comparisons' figures and
tables beside them, and the parts of the README between `<!-- make results: NAME -->` and
`<!-- end -->`.
"""

import argparse
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from papermill.iorw import read_yaml_file

from helpers.evaluation import comparison
from helpers.evaluation.baselines import read_baselines
from helpers.evaluation.robustness import accuracy_by_group, accuracy_intervals
from helpers.metrics import with_interval
from helpers.records import ROOT, written_whole
from helpers.reporting import answers, plots
from helpers.training.runs import Run

METRICS = ("accuracy", "f1", "auroc", "average_precision", "brier")
# Benchmark variants that the README shows; the others are in the linked table.
SHOWN = (
    "eager_fp32",
    "lora_unmerged",
    "lora_merged",
    "bf16",
    "compiled_fp32",
    "onnx_int8_dynamic",
    "openvino_fp32",
    "openvino_int8",
    "pruned_50",
    "structured_recovered",
)
MATTERS = 0.001  # a smaller difference of AUROC is a "no", however certain it is
SMALL_PLACE = 50  # test chips; the worst place is looked for among larger ones


@dataclass(frozen=True)
class Published:
    """What is published of one data set.

    Args:
        folder: holds the notebooks, `training_history`, `figures` and `benchmark_results`,
            relative to the project's folder.
        parameters: that finetune_lora.ipynb was run with.
        benchmark: name of the benchmark's results.
    """

    folder: Path
    parameters: dict
    benchmark: str

    @cached_property
    def config(self) -> comparison.CompareConfig:
        """Parameters of the comparison."""
        places = {
            "history_path": str(ROOT / self.folder / "training_history"),
            "output_path": str(ROOT / self.folder / "no_weights"),
        }
        return comparison.CompareConfig.checked(**self.parameters | places)

    @cached_property
    def all_runs(self) -> dict[str, Run]:
        """Every run of the comparison, by name."""
        return comparison.read_runs(self.config)

    @cached_property
    def runs(self) -> dict[tuple[str, int], Run]:
        """The main runs, by method and seed."""
        return comparison.main_runs(self.all_runs, self.config)

    @cached_property
    def baselines(self) -> dict[str, dict]:
        """Test metrics of what a model must beat, by name."""
        return read_baselines(self.config)["test"]

    @cached_property
    def tests(self) -> pd.DataFrame:
        """Paired tests of every two methods."""
        return comparison.paired_tests(self.runs)

    def table(self, name: str) -> pd.DataFrame:
        """One of the committed tables, by its path below the folder."""
        return pd.read_csv(ROOT / self.folder / name)

    @property
    def recommended(self) -> str:
        """The variant that the benchmark says to deploy."""
        record = ROOT / self.folder / "benchmark_results" / f"{self.benchmark}.json"
        return json.loads(record.read_text())["decision"]["recommended"]

    @property
    def served(self) -> pd.DataFrame:
        """The benchmark's summary, by variant."""
        return self.table(f"benchmark_results/{self.benchmark}.csv").set_index("variant")

    def link(self, notebook: str, section: str) -> str:
        """Markdown link to the section of a notebook."""
        return f"([shown here]({self.folder / notebook}.ipynb#{section}))"


def published() -> dict[str, Published]:
    """The published data sets by name."""
    harvey = Path("reports/hurricane_harvey")
    parameters = read_yaml_file(str(ROOT / harvey / "parameters.yaml"))
    benchmarked = Path(parameters["benchmark"]["model_path"]).parent.name
    return {
        "hurricane_harvey": Published(
            harvey, parameters["finetune_lora"], f"benchmark_{benchmarked}"
        ),
        "example": Published(Path(), {}, "benchmark_head_only_example_example_seed0"),
    }


# --- Figures and their tables ---------------------------------------------------------------------


def rebuild(own: Published) -> None:
    """Draw the comparison's figures again and write the tables behind them."""
    figures = ROOT / own.folder / "figures"
    rows = comparison.test_rows(own.runs, METRICS)
    costs = comparison.cost_table(own.runs)
    histories = comparison.histories(own.runs)
    curves, reliability = (
        comparison.operating_points(own.runs),
        comparison.reliability_rows(own.runs),
    )
    drawn = {
        "lora_curves": (plots.method_curves(histories, own.config.title), histories),
        "lora_roc_pr": (plots.operating_curves(curves, f"Test split, {own.config.title}"), curves),
        "lora_reliability": (plots.reliability_diagram(reliability, own.config.title), reliability),
    }
    if own.config.ranks or own.config.target_sets:
        shapes = comparison.by_shape(own.all_runs, own.config, "accuracy")
        figure = plots.against(shapes, "trainable_parameters", "accuracy", own.config.title)
        drawn["lora_ranks"] = figure, shapes
    headline = comparison.headline_rows(own.all_runs, own.config)
    drawn["lora_headline"] = plots.headline(headline, own.config.title), headline
    for name, (figure, table) in drawn.items():
        plots.save(figure, figures / f"{name}.png", table)
    tables = {"test": rows, "paired_tests": own.tests, "costs": costs.reset_index()}
    for name, table in tables.items():
        with written_whole(figures / f"lora_{name}.csv") as part:
            table.to_csv(part, index=False, float_format="%.6g")


# --- Parts of the README --------------------------------------------------------------------------


def markdown(header: tuple[str, ...], rows: list[tuple]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def methods_table(own: Published) -> str:
    """Test accuracy and AUROC of every method, and what it costs."""
    rows = comparison.test_rows(own.runs, ("accuracy", "auroc"))
    summary, costs = comparison.test_summary(rows), comparison.cost_table(own.runs)
    colour = own.baselines["colour statistics"]
    lines = [
        (
            "colour statistics",
            with_interval(colour["accuracy"]),
            with_interval(colour["auroc"]),
            *"----",
        )
    ]
    for method, cost in costs.iterrows():
        seeds = sum(name == method for name, _ in own.runs)
        lines.append(
            (
                f"`{method}`, {seeds} seeds",
                summary.accuracy[method],
                summary.auroc[method],
                f"{cost.trainable_parameters:,.0f}",
                f"{cost.bytes_to_keep / 1e3:,.0f}",
                f"{cost.seconds_per_epoch:.3g}",
                f"{cost.peak_memory_bytes / 1e9:.2f}",
            )
        )
    header = ("method", "accuracy", "AUROC", "trained", "kB to keep", "s per epoch", "peak GB")
    return markdown(header, lines)


def shapes_table(own: Published) -> str:
    """Ranks and layers of LoRA: parameters, mean accuracy and AUROC with the range over seeds."""
    parts = [
        comparison.by_shape(own.all_runs, own.config, metric).assign(metric=metric)
        for metric in ("accuracy", "auroc")
    ]
    table = pd.concat(parts)
    lines = []
    for (targets, rank), rows in table.groupby(["targets", "rank"], sort=False):
        cells = [
            f"{v.mean():.4f} ({v.min():.4f} to {v.max():.4f})"
            for _, v in rows.groupby("metric").value
        ]
        lines.append((f"`{targets}`", rank, f"{rows.trainable_parameters.iloc[0]:,}", *cells))
    lines.sort(key=lambda line: int(line[2].replace(",", "")))
    return markdown(("layers", "rank", "trained", "accuracy", "AUROC"), lines)


def serving_table(own: Published) -> str:
    """What the deployable forms cost."""
    summary, recommended = own.served, own.recommended
    eager = summary.loc["eager_fp32"]
    lines = []
    for name in SHOWN:
        row = summary.loc[name]
        mark = "**" if name == recommended else ""
        lines.append(
            (
                f"{mark}`{name}`{mark}",
                f"{row.accuracy:.3f} ({row.accuracy_loss_points:+.1f})",
                f"{row.p50_ms:.1f} ({eager.p50_ms / row.p50_ms:.2f}x)",
                f"{row.images_per_s:.0f} ({row.images_per_s / eager.images_per_s:.2f}x)",
                f"{row.mebibytes_on_disk:.1f}",
                f"{row.peak_mib:.0f}",
                f"{row.cold_start_s:.1f}",
                "yes" if row.passes_gate else "no",
            )
        )
    header = (
        "variant",
        "accuracy (points lost)",
        "one chip, ms (speedup)",
        "images/s (speedup)",
        "file, MiB",
        "peak memory, MiB",
        "cold start, s",
        "passes",
    )
    return markdown(header, lines)


def training_speed_table() -> str:
    """Images per second of the training loops."""
    table = pd.read_csv(ROOT / "benchmark_results/training_speed.csv")
    lines = []
    for (backbone, size), rows in table.groupby(["backbone", "image_size_px"], sort=False):
        own = rows.set_index(["loop", "precision", "compiled"])
        plain, fp32, compiled, bf16 = (
            own.loc[key]
            for key in (
                ("plain", "fp32", False),
                ("project", "fp32", False),
                ("project", "fp32", True),
                ("project", "bf16", False),
            )
        )
        lines.append(
            (
                f"{backbone}, {size} px",
                f"{plain.images_per_second:.3g}",
                *(f"{r.images_per_second:.3g} ({r.ratio_to_plain:.2f}x)" for r in (fp32, compiled)),
                f"{compiled.start_s:.0f}",
                f"{bf16.images_per_second:.3g} ({bf16.ratio_to_plain:.2f}x)",
                f"{fp32.share_of_matmul_rate:.0%} of {fp32.matmul_gflop_per_second:.0f} GFLOP/s",
            )
        )
    header = (
        "backbone",
        "plain loop",
        "this project, fp32",
        "with `torch.compile`",
        "compiling, s",
        "bf16",
        "share of the measured matmul rate (fp32)",
    )
    return markdown(header, lines)


def questions_table(sets: dict[str, Published]) -> str:
    """The project's questions with one-line answers for every published data set."""
    answers = [answers_for(own) for own in sets.values()]
    lines = [(f"**{question}**", *(a[question] for a in answers)) for question in answers[0]]
    header = ("question", "Hurricane Harvey, satellite", "embedded example, aerial")
    return markdown(header, lines)


def answers_for(own: Published) -> dict[str, str]:
    """Question -> answer, as Markdown, from the committed tables of one data set."""
    seed = own.config.seeds[0]
    ours, colour = own.runs["head_only", seed].record["test"], own.baselines["colour statistics"]
    good = ours["auroc"]["low"] > colour["auroc"]["high"]
    shortcuts = own.table("figures/setup_shortcuts.csv").set_index(["chips", "head"]).auroc
    refitted = shortcuts.xs("refitted", level="head")
    alone = refitted["acquisition statistics alone"]
    worst = refitted.drop(["as it is", "acquisition statistics alone"])
    costs = comparison.cost_table(own.runs)
    hours = comparison.full_set_cost(own.runs).hours_per_pass
    parts = own.runs["lora", seed].record["parameters"]
    chosen = own.recommended
    served = own.served
    eager, best = served.loc["eager_fp32"], served.loc[chosen]
    pair = {
        second: own.tests[(own.tests["first"] == first) & (own.tests.second == second)]
        for first, second in (("head_only", "lora"), ("lora", "dora"))
    }
    slower = costs.seconds_per_epoch["dora"] / costs.seconds_per_epoch["lora"]
    return {
        "Does training only the head give good results?": (
            f"{'Yes' if good else 'Not clearly'}: accuracy "
            f"{with_interval(ours['accuracy'])}, AUROC {with_interval(ours['auroc'])}; "
            "colour statistics reach "
            f"{colour['accuracy']['value']:.3f} and {colour['auroc']['value']:.3f} "
            f"{own.link('setup_finetune', 'The-answer')}"
        ),
        "Does it read the ground, or the acquisition?": (
            f"Sharpness, haze and brightness alone reach an AUROC of {alone:.3f}; the features "
            f"{refitted['as it is']:.3f}, and {worst.min():.3f} with the worst cue taken away "
            f"({worst.idxmin()}) "
            f"{own.link('setup_finetune', 'What-does-it-read?-A-check-for-shortcuts')}"
        ),
        "Does LoRA improve on it?": (
            f"{in_a_word(pair['lora'])}: {answers.pair_numbers(pair['lora'])}; by its interval "
            f"{answers.pair_verdict(pair['lora'])} {own.link('finetune_lora', 'The-answers')}"
        ),
        "Is DoRA worth its extra cost?": (
            f"{in_a_word(pair['dora'])}: {answers.pair_numbers(pair['dora'])}; "
            f"{slower:.2f} times the time per epoch {own.link('finetune_lora', 'The-answers')}"
        ),
        "What does LoRA add?": (
            f"{parts['lora']:,} weights beside {', '.join(own.config.lora_targets)} and a head of "
            f"{parts['head']:,}, {costs.bytes_to_keep['lora'] / 1e3:,.0f} kB per task; nothing "
            f"remains after merging {own.link('finetune_lora', 'What-it-costs')}"
        ),
        "Is it as good at every place?": place_answer(own),
        "Can it be used on a full data set?": (
            f"A million chips: head-only one pass of {hours['head_only']:.1f} hours, three epochs "
            f"of LoRA {3 * hours['lora']:.0f} hours "
            f"({own.runs['lora', seed].record['environment']['machine']['torch_threads']} CPU "
            f"thread(s)) {own.link('finetune_lora', 'The-answers')}"
        ),
        "Which form should be deployed?": (
            f"`{chosen}`: {best.accuracy_loss_points:+.2f} points of accuracy lost, "
            f"{eager.p50_ms / best.p50_ms:.1f} times as fast for one chip, "
            f"{best.images_per_s / eager.images_per_s:.1f} times in batches, "
            f"{best.mebibytes_on_disk / eager.mebibytes_on_disk:.2f} of the file "
            f"{own.link('benchmark', 'The-decision')}"
        ),
    }


def in_a_word(own: pd.DataFrame) -> str:
    """Whether one method improves on another; rows of `compare.paired_tests` of that pair."""
    better, worse = (own.low > 0).mean(), (own.high < 0).mean()
    if own.auroc_difference.abs().mean() < MATTERS:
        return "No, the difference is too small to matter"
    if worse > 0.5:
        return "No, it is worse"
    if better == 1:
        return "Yes"
    return "A little, with most seeds" if better > 0.5 else "Not clearly"


def place_answer(own: Published) -> str:
    """How sure LoRA's accuracy is over places, and how far it falls at the worst of the larger."""
    predictions = own.runs["lora", own.config.seeds[0]].test_predictions
    by_chip, by_place = accuracy_intervals(predictions)
    places = accuracy_by_group(predictions)
    large = places[places.chips >= SMALL_PLACE]
    worst = ""
    if len(large):
        row = large.loc[large.accuracy.idxmin()].rename({"accuracy": "value"})
        worst = (
            f"; worst of the {len(large)} with {SMALL_PLACE} chips or more: "
            f"{with_interval(row)}, best: {large.accuracy.max():.3f}"
        )
    return (
        f"LoRA's accuracy {with_interval(by_chip)} becomes "
        f"[{by_place.low:.3f}, {by_place.high:.3f}] when whole places are drawn "
        f"({len(places)}){worst} "
        f"{own.link('finetune_lora', 'Where-on-the-ground')}"
    )


def readme_parts(sets: dict[str, Published]) -> dict[str, str]:
    """What stands between the marks of the README, by name."""
    harvey, example = sets["hurricane_harvey"], sets["example"]
    return {
        "methods": methods_table(harvey),
        "questions": questions_table(sets),
        "shapes": shapes_table(harvey),
        "training_speed": training_speed_table(),
        "serving": serving_table(harvey),
        "serving_example": serving_table(example),
    }


def renew(readme: str, parts: dict[str, str]) -> str:
    """The README with every marked part replaced.

    Raises:
        ValueError: a part has no place, or a place no part.
    """
    pattern = re.compile(r"(<!-- make results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    places = [match[1] for match in pattern.findall(readme)]
    if sorted(places) != sorted(parts):
        raise ValueError(f"README.md has places for {places}, results are {list(parts)}")
    return pattern.sub(lambda match: f"{match[1]}{parts[match[2]]}\n{match[3]}", readme)


def main() -> None:
    """Rebuild everything that is published from the committed records."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    plots.use_style()
    sets = published()
    for own in sets.values():
        rebuild(own)
    readme = ROOT / "README.md"
    with written_whole(readme) as part:
        part.write_text(renew(readme.read_text(), readme_parts(sets)))
    print("renewed README.md and", ", ".join(str(own.folder / "figures") for own in sets.values()))


if __name__ == "__main__":
    main()
