"""One row per variant, and which one to deploy."""

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from helpers.benchmarking.latency import noise
from helpers.benchmarking.quality import passing, worst_rows
from helpers.deployment.variants.source import CONTROL, REFERENCE

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
    `speedup` at the batch size that is best for the variant, `loaded_mib`, `peak_mib` (largest
    batch; on a GPU that of its memory) and `cold_start_s` (process start to the first prediction).
    What computes the same as another variant has the other's costs, named in `costs_as`.
    """
    sizes, latency, memory = benchmark.config.batch_sizes, benchmark.latency, benchmark.memory
    single = latency[latency.batch_size == min(sizes)].set_index("variant").p50_ms
    best = latency.groupby("variant").images_per_s.max()
    gpu = "gpu_" if benchmark.bench.device == "cuda" else ""
    memory = memory.set_index("variant")
    costs = pd.DataFrame(
        {
            "p50_ms": single,
            "images_per_s": best,
            "speedup": best / best[REFERENCE],
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


def speedups(summary: pd.DataFrame) -> pd.DataFrame:
    """How many times as fast as the reference every variant is, and whether that is beyond noise.

    Args:
        summary: of `summarise`, by variant.

    Returns:
        By variant `one_chip` (median latency) and `batches` (images per second at the best size),
        above 1 where it is faster, and `<column>_beyond_noise`: whether the ratio is further from 1
        than the control's.
    """
    rates = pd.DataFrame({"one_chip": 1 / summary.p50_ms, "batches": summary.images_per_s})
    ratios = rates / rates.loc[REFERENCE]
    control = ratios.reindex([CONTROL]).iloc[0].fillna(1.0)
    beyond = np.abs(np.log(ratios)) > np.log(control.map(noise))
    return ratios.join(beyond.add_suffix("_beyond_noise"))


def decide(summary: pd.DataFrame) -> dict[str, str]:
    """The best deployable variant by latency, throughput and memory, and the one recommended.

    A variant that is ahead of the reference by no more than the control is apart from it is not
    better. Recommended is the one that wins most of the three; the one with the highest throughput
    where none wins two.
    """
    costs = summary.set_index("variant").assign(seconds_per_image=lambda t: 1 / t.images_per_s)

    def best(column: str) -> str:
        values = costs[column][costs.passes_gate]
        control = costs[column].get(CONTROL, math.nan) / values[REFERENCE]
        limit = noise(control if control > 0 else 1.0)
        return REFERENCE if values[REFERENCE] <= limit * values.min() else values.idxmin()

    winners = {
        "lowest latency": best("p50_ms"),
        "highest throughput": best("seconds_per_image"),
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
