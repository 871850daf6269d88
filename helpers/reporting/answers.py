"""Every sentence that is generated from numbers."""

import html
import math

import pandas as pd

from helpers.benchmarking.bench import Bench
from helpers.benchmarking.benchmark import Benchmark
from helpers.benchmarking.limits import energy_meter
from helpers.evaluation.comparison import first_seed, full_set_cost
from helpers.evaluation.robustness import ACQUISITION_ALONE, accuracy_intervals
from helpers.metrics import with_interval
from helpers.records import environment
from helpers.training.runs import Run


def conclusion(record: dict, baselines: dict) -> str:
    """What a head-only run's test metrics say beside the baselines', as a Markdown paragraph."""
    name, own = record["backbone"], record["test"]
    majority, colour = (baselines["test"][n] for n in ("majority class", "colour statistics"))
    ahead = own["auroc"]["low"] > colour["auroc"]["high"]
    behind = own["auroc"]["high"] < colour["auroc"]["low"]
    verdict = (
        "clearly better than colour statistics (the intervals do not touch)"
        if ahead
        else "worse than colour statistics: these features do not suit the task"
        if behind
        else "not clearly apart from colour statistics (the intervals overlap): on this task "
        "much of the answer lies in colour, so it shows little of what a backbone is worth"
    )
    return (
        f"On `{record['data']}` ({record['chips']['train']} training and "
        f"{record['chips']['test']} test chips) a linear head of "
        f"{record['parameters']['trainable']:,} weights on {name} reaches an accuracy of "
        f"**{with_interval(own['accuracy'])}** and an AUROC of "
        f"**{with_interval(own['auroc'])}**. Always answering with the larger class reaches an "
        f"accuracy of {majority['accuracy']['value']:.3f}; a logistic regression on colour "
        f"statistics an accuracy of {with_interval(colour['accuracy'])} and an AUROC of "
        f"{with_interval(colour['auroc'])}. The frozen features are {verdict}."
    )


def pair_sentence(tests: pd.DataFrame, first: str, second: str) -> str:
    """What the paired tests say of two methods, as Markdown; tests as from `paired_tests`."""
    own = tests[(tests["first"] == first) & (tests["second"] == second)]
    if own.empty:
        return f"This run does not compare {second} with {first}."
    return (
        f"**{second} against {first}**, on the same test images: {pair_numbers(own)}. By the "
        f"interval of the AUROC difference {second} is {pair_verdict(own)}."
    )


def pair_numbers(own: pd.DataFrame) -> str:
    """The numbers of the paired tests of two methods; rows of `paired_tests` of that pair."""
    first, second = own["first"].iloc[0], own["second"].iloc[0]
    differences, p_values = own.auroc_difference, own.p_value
    if len(own) == 1:
        auroc = f"{differences.iloc[0]:+.4f} [{own.low.iloc[0]:+.4f}, {own.high.iloc[0]:+.4f}]"
        if "group_low" in own:
            low, high = own.group_low.iloc[0], own.group_high.iloc[0]
            auroc += f" (drawing whole groups [{low:+.4f}, {high:+.4f}])"
        p_value = f"p = {p_values.iloc[0]:.2g}"
    else:
        auroc = (
            f"{differences.mean():+.4f} on average over {len(own)} seeds "
            f"({differences.min():+.4f} to {differences.max():+.4f})"
        )
        if "group_low" in own:
            auroc += (
                f", above zero with {(own.group_low > 0).sum()} and below with "
                f"{(own.group_high < 0).sum()} of them when whole groups are drawn"
            )
        p_value = f"p from {p_values.min():.2g} to {p_values.max():.2g}"
    return (
        f"AUROC {auroc}; {second} alone is right on {own.only_second.mean():.0f} chips, {first} "
        f"alone on {own.only_first.mean():.0f} (McNemar {p_value})"
    )


def pair_verdict(own: pd.DataFrame) -> str:
    """In words, which side of zero the intervals of the AUROC difference lie on."""
    better, worse, seeds = int((own.low > 0).sum()), int((own.high < 0).sum()), len(own)
    if seeds == 1:
        return "better" if better else "worse" if worse else "not clearly different"
    if better == seeds or worse == seeds:
        return f"{'better' if better else 'worse'} with every seed"
    open_seeds = seeds - better - worse
    return (
        f"better with {better}, worse with {worse} and not clearly different with {open_seeds} "
        f"of {seeds} seeds"
    )


def cost_sentence(costs: pd.DataFrame, first: str, second: str) -> str:
    """What a method costs beside another, as Markdown; costs as from `cost_table`."""
    if not {first, second} <= set(costs.index):
        return ""
    one, two = costs.loc[first], costs.loc[second]
    ratio = two.seconds_per_epoch / one.seconds_per_epoch
    cached = " on cached features" if first == "head_only" else ""
    return (
        f"{second} trains {two.trainable_parameters:,.0f} parameters ({first} "
        f"{one.trainable_parameters:,.0f}) and keeps {two.bytes_to_keep / 1e3:,.0f} kB per task "
        f"({one.bytes_to_keep / 1e3:,.0f} kB); an epoch takes {two.seconds_per_epoch:,.3g} s "
        f"({one.seconds_per_epoch:.3g} s{cached}), {ratio:,.3g} times as long, at a peak of "
        f"{two.peak_memory_bytes / 1e9:.2f} GB ({one.peak_memory_bytes / 1e9:.2f} GB)."
    )


def adapter_sentence(run: Run, logit_difference: float) -> str:
    """What a LoRA or DoRA run adds to the classifier and what remains, as Markdown."""
    parts = run.record["parameters"]
    return (
        f"{parts['lora']:,} in the thin matrices beside "
        f"{', '.join(run.record['config']['lora_targets'])} of every block and {parts['head']:,} "
        f"in the head, {parts['trainable'] / parts['total']:.2%} of the classifier. After merging, "
        f"**none remain**: the classifier has its {parts['total']:,} parameters as before, the "
        f"same speed, and logits that differ by at most {logit_difference:.1e}."
    )


def full_set_sentence(
    runs: dict[tuple[str, int], Run], bytes_per_chip: int, limit_gb: float
) -> str:
    """What ten epochs over a million chips take, as Markdown; see `full_set_cost`."""
    hours = full_set_cost(runs).hours_per_pass
    times = ", ".join(
        f"head_only one pass of {value:.1f} hours"
        if method == "head_only"
        else f"ten epochs of {method} about {10 * value:.0f} hours"
        for method, value in hours.items()
    )
    machine = first_seed(runs)[hours.index[-1]].record["environment"]["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['torch_threads']} thread(s)"
    return (
        f"A million chips decoded to 8 bits take {bytes_per_chip:,} bytes each, "
        f"{bytes_per_chip / 1e3:.1f} GB in all; above {limit_gb:g} GB they are memory-mapped. Over "
        f"them, {times}, at the rates of the machine that trained these runs ({where})."
    )


def group_sentence(predictions: pd.DataFrame) -> str:
    """How sure the accuracy is when whole groups are drawn instead of chips, as Markdown."""
    if (predictions.group == "").any():
        return ""
    by_chip, by_group = accuracy_intervals(predictions)
    return (
        f"Accuracy {by_chip.value:.3f}. Drawing chips, its 95 % bootstrap interval is "
        f"[{by_chip.low:.3f}, {by_chip.high:.3f}]; drawing whole groups, of which there are "
        f"{predictions.group.nunique()}, it is **[{by_group.low:.3f}, {by_group.high:.3f}]**. "
        "Chips of one place are not independent, so the second says better how other such places "
        "would do."
    )


def shortcut_sentence(table: pd.DataFrame) -> str:
    """What a shortcut check says, as Markdown."""
    rows = table[table["head"] == "refitted"].set_index("chips")
    whole, alone = rows.loc["as it is"], rows.loc[ACQUISITION_ALONE]
    worst = rows.drop(index=["as it is", ACQUISITION_ALONE]).auroc.idxmin()
    kept = table[table["head"] == "as trained"].set_index("chips").drop(index="as it is")
    hardest = kept.auroc.idxmin()
    given = (
        "does give much of the answer away here, and a part of every headline on these data may be "
        "read from it"
        if alone.auroc_low > 0.75
        else "gives little of the answer away here"
    )
    left = (
        "more than the acquisition alone gives, so the features do not live on that cue alone"
        if rows.auroc_low[worst] > alone.auroc_high
        else "not clearly more than the acquisition alone gives"
    )
    return (
        f"Sharpness, haze and brightness alone reach an AUROC of **{_interval(alone)}**, the "
        f"backbone's features {_interval(whole)}: the acquisition {given}. Of the degradations, "
        f"*{worst}* costs a refitted head most: {_interval(rows.loc[worst])} remains, {left}. "
        "The head as trained, which never saw such chips, suffers most from "
        f"*{hardest}*: {_interval(kept.loc[hardest])}."
    )


def _interval(row) -> str:
    return f"{row.auroc:.3f} [{row.auroc_low:.3f}, {row.auroc_high:.3f}]"


def gate_sentence(bench: Bench) -> str:
    """What the quality gate means on so many test chips."""
    n, gate = len(bench.targets), bench.config.gate_points
    chips = math.floor(gate / 100 * n + 1e-9)
    may = "no chip at all" if chips == 0 else f"{chips} chip{'s' if chips > 1 else ''} net"
    return (
        f"One of the {n} test chips is {100 / n:.2f} points of accuracy, so a gate of {gate:g} "
        f"points lets a variant lose {may}."
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
            f" Best layout for throughput: {best.processes} process(es) of {best.threads_each} "
            f"thread(s) each, {best.images_per_s:.0f} images/s."
        )
    machine = environment()["machine"]
    return (
        f"Deploy {name} ({row.made}): of the variants within {bench.config.gate_points:g} points "
        f"of the reference's accuracy it has the {' and the '.join(wins)}. Accuracy "
        f"{row.accuracy:.3f} [{row.accuracy_low:.3f}, {row.accuracy_high:.3f}] on "
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
