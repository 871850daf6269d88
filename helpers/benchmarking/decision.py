"""One row per variant, and which one to deploy."""

import math
from typing import TYPE_CHECKING

import pandas as pd

from helpers.benchmarking.latency import beyond_noise
from helpers.benchmarking.quality import passing, worst_rows
from helpers.deployment.variants.source import REFERENCE

if TYPE_CHECKING:
    from helpers.benchmarking.benchmark import Benchmark

# What compression is expected to buy.
# int8 multiplies four times as many numbers at once as fp32 (VNNI, AMX, tensor cores).
INT8_SPEEDUP = 4.0
# A merged adapter leaves no computation behind; 2 % is what a quiet machine's medians vary.
MERGED_LATENCY = (0.98, 1.02)
# A quarter for the weights, and scales and what stays in fp32: embeddings, norms, head.
INT8_FILE = 0.27


def summarise(benchmark: "Benchmark") -> pd.DataFrame:
    """One row per variant, those that do not run included.

    Beside the columns of `build_variants`: those of `measure_quality` on the test split, of several
    batch sizes the one that loses most; accuracy and points lost on the validation split with
    `valid_` before their names; `passes_gate`; `p50_ms` at the smallest batch, `images_per_s` and
    `speedup` at the batch size that is best for the variant, the first two with `_low` and `_high`
    (95 % relative to the reference, see `latency_table`); `loaded_mib`, `peak_mib` (largest batch;
    on a GPU that of its memory) and `cold_start_s` (process start to the first prediction).
    What computes the same as another variant has the other's costs, named in `costs_as`.
    """
    sizes, latency, memory = benchmark.config.batch_sizes, benchmark.latency, benchmark.memory
    single = latency[latency.batch_size == min(sizes)].set_index("variant")
    best = latency.loc[latency.groupby("variant").images_per_s.idxmax()].set_index("variant")
    gpu = "gpu_" if benchmark.bench.device == "cuda" else ""
    memory = memory.set_index("variant")
    costs = pd.DataFrame(
        {
            "p50_ms": single.p50_ms,
            "p50_ms_low": single.p50_ms * single.speedup / single.speedup_high,
            "p50_ms_high": single.p50_ms * single.speedup / single.speedup_low,
            "images_per_s": best.images_per_s,
            "images_per_s_low": best.images_per_s * best.speedup_low / best.speedup,
            "images_per_s_high": best.images_per_s * best.speedup_high / best.speedup,
            "speedup": best.images_per_s / best.images_per_s[REFERENCE],
            "loaded_mib": memory.loaded_bytes / 2**20,
            "peak_mib": memory[f"{gpu}peak_bytes_{max(sizes)}"] / 2**20,
            "cold_start_s": memory.start_s + memory.load_s + memory.first_prediction_s,
        }
    )
    quality = benchmark.quality
    judged = worst_rows(quality, "valid").set_index("variant").filter(like="accuracy")
    test = worst_rows(quality, "test").rename(columns={"batch_size": "quality_batch"})
    test = test.drop(columns=["split", "passes_gate"])
    table = benchmark.built.merge(judged.add_prefix("valid_"), on="variant", how="left")
    table = table.merge(test, on="variant", how="left")
    table["costs_as"] = table.variant.map(benchmark.costs_as)
    measured = table.costs_as.fillna(table.variant)
    table = table.merge(costs, left_on=measured, right_index=True, how="left").drop(columns="key_0")
    return table.assign(passes_gate=table.variant.isin(passing(quality)))


def over_reference(summary: pd.DataFrame, column: str) -> pd.DataFrame:
    """How many times as good as the reference every variant is, and whether that is beyond noise.

    Args:
        summary: of `summarise`, by variant; a record without intervals has values of no width.
        column: `p50_ms`, `images_per_s` or `peak_mib`.

    Returns:
        By variant `ratio`, above 1 where it is faster or smaller, with `ratio_low` and
        `ratio_high`, and `beyond_noise` (see `latency.beyond_noise`).
    """
    power = 1 if column == "images_per_s" else -1
    ends = {end: summary.get(f"{column}{end}", summary[column]) for end in ("", "_low", "_high")}
    ratios = (pd.DataFrame(ends) / summary[column][REFERENCE]) ** power
    low, high = ratios.min(axis=1), ratios.max(axis=1)
    beyond = beyond_noise(low, high)
    return pd.DataFrame(
        {"ratio": ratios[""], "ratio_low": low, "ratio_high": high, "beyond_noise": beyond}
    )


def decide(summary: pd.DataFrame) -> dict[str, str]:
    """The best deployable variant by latency, throughput and memory, and the one recommended.

    What is ahead of the reference by no more than noise is not better. Recommended is the one that
    wins most of the three; the one with the highest throughput where none wins two.
    """
    costs = summary.set_index("variant")

    def best(column: str) -> str:
        over = over_reference(costs, column)
        ahead = over.ratio[costs.passes_gate & over.beyond_noise & (over.ratio > 1)]
        return ahead.idxmax() if len(ahead) else REFERENCE

    winners = {
        "lowest latency": best("p50_ms"),
        "highest throughput": best("images_per_s"),
        "smallest memory": best("peak_mib"),
    }
    names = list(winners.values())
    often = max(names, key=names.count)
    recommended = often if names.count(often) > 1 else winners["highest throughput"]
    return winners | {"recommended": recommended}


def expectations(
    summary: pd.DataFrame, latency: pd.DataFrame, decision: dict[str, str]
) -> pd.DataFrame:
    """What compression should buy, as ratios to the reference: expected and measured."""
    rows = summary.set_index("variant")
    name, reference = decision["recommended"], rows.loc[REFERENCE]
    speedups = latency[latency.variant == name].set_index("batch_size").speedup
    table = [
        (f"speed of {name}, {size} chips at once", INT8_SPEEDUP, math.inf, speedup)
        for size, speedup in speedups.items()
        if rows.arithmetic[name] == "int8"
    ]
    merged = latency[latency.variant == "lora_merged"]
    if len(merged):
        what = "latency of merged LoRA, median of the batch sizes"
        table.append((what, *MERGED_LATENCY, 1 / merged.speedup.median()))
    for name in rows.index[rows.arithmetic.eq("int8")]:
        ratio = rows.mebibytes_on_disk[name] / reference.mebibytes_on_disk
        table.append((f"file of {name}, relative", 0.0, INT8_FILE, ratio))
    frame = pd.DataFrame(table, columns=["what", "at_least", "at_most", "measured"])
    return frame.assign(met=frame.measured.between(frame.at_least, frame.at_most))
