"""Every sentence that is generated from numbers, and the numbers that decide its words."""

import html
from pathlib import Path

import pandas as pd

from helpers.benchmarking.bench import Bench
from helpers.benchmarking.benchmark import Benchmark
from helpers.benchmarking.decision import over_reference
from helpers.benchmarking.limits import energy_meter
from helpers.deployment.mapping import MapConfig
from helpers.deployment.scoring import PredictConfig
from helpers.deployment.variants.source import REFERENCE
from helpers.evaluation.baselines import (
    read_baseline_predictions,
    read_baselines,
    strongest_baseline,
)
from helpers.evaluation.comparison import CompareConfig, cost_table, first_seed, full_set_cost
from helpers.evaluation.robustness import ACQUISITION_ALONE, SMALL_PLACE, accuracy_by_group
from helpers.evaluation.seeds import (
    Draws,
    draws_of,
    gain_over,
    method_gains,
    method_means,
    test_draws,
)
from helpers.metrics import with_interval
from helpers.records import environment
from helpers.training.config import RunConfig, TrainingConfig
from helpers.training.runs import Run, metric_entries

MATTERS = 0.001
"""A mean difference of AUROC below this is not worth a second method, however certain it is: on
10,000 pairs of a positive and a negative chip it turns ten."""
TELLS = 0.75
"""AUROC above which a cue alone gives much of an answer away: halfway from guessing to right."""


def _over(row) -> str:
    """What an interval of `evaluation.seeds` was drawn over."""
    return f"95 % over {row.unit}" + (f" and {row.seeds} seeds" if row.seeds > 1 else ", one seed")


def comparison_answers(
    config: CompareConfig,
    runs: dict[tuple[str, int], Run],
    draws: dict[tuple[str, int], Draws],
    shortcuts: pd.DataFrame,
    by_blocks: dict[tuple[str, int], Run],
) -> dict[str, str]:
    """Question -> answer, from the main runs of a comparison, by method and seed.

    With their `draws_of`, the `shortcut_check` of LoRA or the last method, and the `block_runs`.
    """
    gains = method_gains(runs, draws)
    first = first_seed(runs)
    shown = "lora" if "lora" in first else list(first)[-1]
    said = {}
    if "head_only" in first:
        said["Does training only the head give good results?"] = _head_answer(config, runs, draws)
    said["Does LoRA improve on it?"] = gain_answer(gains, "head_only", "lora")
    if "full" in first:
        said["Does full fine-tuning improve on the head?"] = gain_answer(gains, "head_only", "full")
    if by_blocks:
        said["Would LoRA in all blocks be better?"] = _blocks_answer(by_blocks)
    return said | {
        "Is DoRA worth its extra cost?": gain_answer(gains, "lora", "dora"),
        "Does it read the ground, or the acquisition?": f"{shown}: {shortcut_answer(shortcuts)}",
        "Is it as good at every place?": f"{shown}, seed {config.seeds[0]}: "
        + place_answer(first[shown].test_predictions),
        "Can it be used on a full data set?": cost_answer(
            cost_table(runs), full_set_cost(runs).hours_per_pass, first[shown].record
        ),
    }


def _blocks_answer(by_blocks: dict[tuple[str, int], Run]) -> str:
    draws = draws_of(by_blocks)
    last, every = dict.fromkeys(name for name, _ in by_blocks)
    seconds = cost_table(by_blocks).seconds_per_epoch
    return (
        f"{gain_answer(method_gains(by_blocks, draws), last, every)} An epoch takes "
        f"{seconds[every] / seconds[last]:.1f} times as long."
    )


def _head_answer(config: TrainingConfig, runs: dict, draws: dict) -> str:
    name, trivial = strongest_baseline(read_baselines(config)["test"])
    baseline = test_draws(read_baseline_predictions(config)[name])
    head = [of_run for (method, _), of_run in draws.items() if method == "head_only"]
    return head_answer(
        method_means(runs, draws, ("accuracy", "auroc")),
        name,
        trivial["auroc"]["value"],
        gain_over(baseline, head),
    )


def run_answer(config: RunConfig, run: Run) -> str:
    """`head_answer` for one head-only run."""
    runs = {("head_only", run.record["config"]["seed"]): run}
    return _head_answer(config, runs, draws_of(runs))


def listed(said: dict[str, str]) -> str:
    """Questions and answers as Markdown, a paragraph each."""
    return "\n\n".join(f"**{question}** {answer}" for question, answer in said.items())


def head_answer(means: pd.DataFrame, name: str, baseline: float, gain: dict[str, float]) -> str:
    """Whether a trained head is good: against the strongest baseline that knows no shapes.

    From `seeds.method_means` with head_only's accuracy and AUROC, the name and AUROC of the
    baseline, and the head's gain over it (`seeds.gain_over`).
    """
    rows = means[means.method == "head_only"].set_index("metric")
    verdict = "Yes" if gain["low"] > 0 else "No, it is worse" if gain["high"] < 0 else "Not clearly"
    return (
        f"{verdict}: accuracy {with_interval(rows.loc['accuracy'])}, AUROC "
        f"{with_interval(rows.loc['auroc'])} ({_over(rows.loc['auroc'])}). The strongest baseline, "
        f"{name}, reaches an AUROC of {baseline:.3f}; the head is ahead by {signed(gain, 3)}."
    )


def gain_answer(gains: pd.DataFrame, first: str, second: str) -> str:
    """Whether the second method improves on the first, from `seeds.method_gains`."""
    rows = gains[(gains["first"] == first) & (gains["second"] == second)]
    if rows.empty:
        return f"This run does not compare {second} with {first}."
    row = rows.iloc[0]
    clear = f"; above zero with {row.better} of {row.seeds} seeds alone" if row.seeds > 1 else ""
    return (
        f"{in_a_word(row)}: AUROC {signed(row, 4)} ({_over(row)}{clear}). {second} alone is right "
        f"on {row.only_second:.0f} test chips, {first} alone on {row.only_first:.0f}."
    )


def in_a_word(row) -> str:
    """The verdict on a difference of `seeds.method_gains`.

    The interval of the mean decides, but percentile intervals over some dozen places are too
    narrow, so that more than half of the seeds must be clear alone as well.
    """
    if max(abs(row.low), abs(row.high)) < MATTERS:
        return "No, the difference is too small to matter"
    if row.low > 0 and row.better > row.seeds / 2:
        return "Yes"
    if row.high < 0 and row.worse > row.seeds / 2:
        return "No, it is worse"
    return "Not clearly"


def signed(entry, digits: int) -> str:
    """A difference with its sign and interval, `+0.010 [-0.002, +0.031]`."""
    value, low, high = (f"{entry[name]:+.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def place_answer(predictions: pd.DataFrame) -> str:
    """How sure a run's test accuracy is over places, and how it differs between them."""
    if (predictions.group == "").any():
        return "The data name no groups."
    entry, places = metric_entries(predictions)["accuracy"], accuracy_by_group(predictions)
    low, high = entry["group_low"], entry["group_high"]
    right = predictions.predicted == predictions.target
    largest = predictions.group.isin(places.group.head(2))
    worst = places[places.chips >= SMALL_PLACE]
    row = worst.loc[worst.accuracy.idxmin()] if len(worst) else None
    return (
        f"Accuracy {with_interval(entry)} over chips becomes [{low:.3f}, {high:.3f}] when whole "
        f"places are drawn ({len(places)}). The two largest hold {largest.mean():.0%} of the "
        f"chips: accuracy {right[largest].mean():.3f} there, {right[~largest].mean():.3f} "
        f"elsewhere, {places.accuracy.mean():.3f} averaged over places"
        + (f"; worst {row.accuracy:.3f} ({row.group}, {row.chips} chips)." if len(worst) else ".")
    )


def shortcut_answer(table: pd.DataFrame) -> str:
    """What a shortcut check says; table of `robustness.shortcut_check`."""
    rows = table.set_index(["head", "chips"]).rename(columns={"auroc": "value"})
    rows = rows.rename(columns={"auroc_low": "low", "auroc_high": "high"})
    refitted, trained = rows.loc["refitted"], rows.loc["as trained"]
    alone = refitted.loc[ACQUISITION_ALONE]
    worst = refitted.drop(index=["as it is", ACQUISITION_ALONE]).value.idxmin()
    hardest = trained.drop(index="as it is").value.idxmin()
    more = "more" if refitted.low[worst] > alone.high else "not clearly more"
    return (
        f"Sharpness, haze and brightness alone reach an AUROC of {with_interval(alone)}: the "
        f"acquisition gives {'much' if alone.low > TELLS else 'little'} of the answer away. The "
        f"features reach {with_interval(refitted.loc['as it is'])}; with the worst cue taken away "
        f"({worst}) a refitted head keeps {with_interval(refitted.loc[worst])}, {more} than the "
        f"acquisition alone, and the head as trained falls to "
        f"{with_interval(trained.loc[hardest])} ({hardest})."
    )


def cost_answer(costs: pd.DataFrame, hours: pd.Series, record: dict) -> str:
    """Whether a method can be used on a full data set: hours over a million chips, by method.

    From `comparison.cost_table`, `full_set_cost`, and the record of a run on the same machine.
    """
    machine = record["environment"]["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, threads: {machine['torch_threads']}"
    parts = [
        f"{method} {hours[method]:.1f} hours"
        + (" in all" if method == "head_only" else " an epoch")
        + f" ({costs.trainable_parameters[method]:,} weights, "
        f"{costs.bytes_to_keep[method] / 1e3:,.0f} kB to keep)"
        for method in hours.index
    ]
    return f"A million chips take: {', '.join(parts)}; at the rates of this run ({where})."


def form_answer(summary: pd.DataFrame, name: str) -> str:
    """What the recommended form is worth, from `decision.summarise` by variant."""
    eager, best = summary.loc[REFERENCE], summary.loc[name]

    def as_fast(column: str) -> str:
        over = over_reference(summary, column).loc[name]
        return (
            f"{over.ratio:.1f} times as fast" if over.beyond_noise else "as fast within the noise"
        )

    return (
        f"`{name}`: {best.accuracy_loss_points:+.2f} points of accuracy lost "
        f"[{best.accuracy_loss_points_low:+.2f}, {best.accuracy_loss_points_high:+.2f}], "
        f"{as_fast('p50_ms')} for one chip, {as_fast('images_per_s')} in batches, "
        f"{best.mebibytes_on_disk / eager.mebibytes_on_disk:.2f} of the file."
    )


def gate_sentence(bench: Bench) -> str:
    """What the quality gate means on so many validation chips, and what they can certify."""
    n, gate = len(bench.source.valid[1]), bench.config.gate_points
    # Of n independent chips without a loss, with 95 % confidence (Wilks 1941).
    certain = 100 * (1 - 0.05 ** (1 / n))
    enough = "no more than" if certain <= gate else "more than"
    return (
        f"A form passes where the upper end of the interval of its points lost on the {n} "
        f"validation chips is at most {gate:g}. One of these chips is {100 / n:.2f} points, and a "
        f"form that loses none of them may still lose {certain:.2f} points of all (95 %, chips "
        f"taken as independent): {enough} the gate allows, so that these chips "
        f"{'can' if certain <= gate else 'cannot'} certify it."
    )


def deployment_sentence(benchmark: Benchmark) -> str:
    """What a team could paste into its deployment plan."""
    bench, decision = benchmark.bench, benchmark.decision
    scenarios, scaled = benchmark.scenarios, benchmark.scaling
    name = decision["recommended"]
    row = benchmark.summary.set_index("variant").loc[name]
    wins = [what for what, winner in decision.items() if winner == name and what != "recommended"]
    server = scenarios[(scenarios.variant == name) & (scenarios.scenario == "Server")]
    load = ""
    if len(server):
        answer = server.iloc[0]
        load = (
            f" One process with {bench.threads} threads sustained {answer.target_qps:.0f} Poisson "
            f"queries/s with p99 {answer.p99_ms:.0f} ms (bound {bench.config.latency_bound_ms:g} "
            f"ms, {answer.queries:.0f} queries, nothing refused)."
        )
    copies = scaled[scaled.variant == name]
    if len(copies):
        best = copies.loc[copies.images_per_s.idxmax()]
        load += (
            f" Best layout for throughput (processes x threads): {best.processes} x "
            f"{best.threads_each}, {best.images_per_s:.0f} images/s."
        )
    machine = environment()["machine"]
    return (
        f"Deploy {name} ({row.made}): of the variants that lose at most "
        f"{bench.config.gate_points:g} points of accuracy (upper end of the 95 % interval on "
        f"{len(bench.source.valid[1])} validation chips) it has the {' and the '.join(wins)}. "
        f"Accuracy {row.accuracy:.3f} [{row.accuracy_low:.3f}, {row.accuracy_high:.3f}] on "
        f"{len(bench.targets)} test chips, {row.accuracy_loss_points:+.2f} points lost "
        f"[{row.accuracy_loss_points_low:+.2f}, {row.accuracy_loss_points_high:+.2f}]; median "
        f"latency {row.p50_ms:.1f} ms for one chip, {row.images_per_s:.0f} images/s, "
        f"{row.speedup:.1f} times the reference; {row.mebibytes_on_disk:.1f} MiB on disk, "
        f"{row.peak_mib:.0f} MiB in memory.{load} Measured with {bench.label} on "
        f"{machine['gpu'] if bench.device == 'cuda' else machine['cpu']}, "
        f"{machine['cpu_cores']} cores. Not an MLPerf submission."
    )


def decision_text(decision: dict[str, str], sentence: str) -> str:
    """The decision as Markdown."""
    lines = [f"- {what}: **{name}**" for what, name in decision.items() if what != "recommended"]
    best = "\n".join(lines)
    return (
        f"Among the variants within the quality gate:\n\n{best}\n\n"
        f"**Recommended: {decision['recommended']}.** For the deployment plan:\n\n"
        f"> {html.escape(sentence)}"
    )


def energy_sentence(benchmark: Benchmark) -> str:
    """Energy per 1,000 images, or that the machine does not say."""
    meter = energy_meter(benchmark.bench.device)
    if meter is None:
        return "This machine exposes no energy counter (RAPL, NVML); energy was not measured."
    rows = benchmark.scenarios[benchmark.scenarios.scenario == "Offline"]
    values = [f"{r.variant} {r.joules_per_1000_images:.0f} J" for r in rows.itertuples()]
    return f"Energy per 1,000 images, Offline ({meter[0]}): {', '.join(values)}."


def map_answer(record: dict, quality: pd.DataFrame | None, positive: str) -> str:
    """What a map's record says of a class, and how often the map is right (`map_quality`).

    Quality is None where people drew nothing to compare with.
    """
    counts = record["counts"]
    answered, rate = sum(counts["classes"].values()), record["config"]["error_rate"]
    said = f"{counts['classes'][positive] / answered:.0%} of {answered:,} cells are {positive}."
    if rate is not None:
        said += f" {counts['unsure'] / answered:.0%} are unsure at an error rate of {rate:.0%}."
    if quality is None:
        return said
    parts = [f"{row.accuracy} of {row.cells:,} ({row.shown})" for row in quality.itertuples()]
    return (
        f"{said} Where the drawn ground is clear, the map is right on {', '.join(parts)} cells; "
        "intervals are 95 % over places."
    )


def map_command(config: MapConfig) -> str:
    """What a person types for the same map."""
    given = {n: v for n, v in config.model_dump().items() if n in PredictConfig.model_fields}
    typed = {
        name: value
        for name, value in given.items()
        if value != PredictConfig.model_fields[name].default
    }
    typed["input"] = Path(config.input).name
    return (
        "```\npython -m helpers.predict "
        + " ".join(f"--{name} {value}" for name, value in typed.items())
        + "\n```"
    )
