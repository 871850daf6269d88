"""One row per variant, and which one to deploy."""

import math

import pandas as pd

from helpers.benchmarking.bench import Bench
from helpers.deployment.variants.source import REFERENCE


def summarise(
    bench: Bench,
    built: pd.DataFrame,
    quality: pd.DataFrame,
    latency: pd.DataFrame,
    memory: pd.DataFrame,
) -> pd.DataFrame:
    """One row per variant, those that could not be built included.

    Beside the columns of `build_variants` and `measure_quality`: `p50_ms` at the smallest batch,
    `images_per_s` and `speedup` at the batch size that is best for the variant, `loaded_mib`,
    `peak_mib` (largest batch) and `cold_start_s` (process start to the first prediction).
    """
    smallest, largest = min(bench.config.batch_sizes), max(bench.config.batch_sizes)
    single = latency[latency.batch_size == smallest][["variant", "p50_ms"]]
    best = latency.groupby("variant").images_per_s.max()
    speed = pd.DataFrame({"images_per_s": best, "speedup": best / best[REFERENCE]}).reset_index()
    footprint = pd.DataFrame(
        {
            "variant": memory.variant,
            "loaded_mib": memory.loaded_bytes / 2**20,
            "peak_mib": memory[f"peak_bytes_{largest}"] / 2**20,
            "cold_start_s": memory.start_s + memory.load_s + memory.first_prediction_s,
        }
    )
    table = built
    for part in (quality, single, speed, footprint):
        table = table.merge(part, on="variant", how="left")
    return table.assign(passes_gate=table.passes_gate.eq(True))


def decide(summary: pd.DataFrame) -> dict[str, str]:
    """The best deployable variant by latency, throughput and memory, and the one recommended.

    Recommended is the one that wins most of the three; the fastest under load where none wins two.
    """
    rows = summary[summary.passes_gate].set_index("variant")
    winners = {
        "lowest latency": rows.p50_ms.idxmin(),
        "highest throughput": rows.images_per_s.idxmax(),
        "smallest memory": rows.peak_mib.idxmin(),
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
        (f"speed of {name}, {size} chips at once", "at least 4", speedup, 4.0, math.inf)
        for size, speedup in speedups.items()
    ]
    merged = latency[latency.variant == "lora_merged"]
    if len(merged):
        ratio = 1 / merged.speedup.median()
        what = "latency of merged LoRA, median of the batch sizes"
        table.append((what, "0.98 to 1.02", ratio, 0.98, 1.02))
    for name in rows.index[rows.arithmetic.eq("int8")]:
        ratio = rows.mebibytes_on_disk[name] / reference.mebibytes_on_disk
        table.append((f"file of {name}, relative", "at most 0.27", ratio, 0.0, 0.27))
    frame = pd.DataFrame(table, columns=["what", "expected", "measured", "low", "high"])
    met = frame.measured.between(frame.low, frame.high)
    return frame.assign(met=met).drop(columns=["low", "high"])
