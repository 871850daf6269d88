"""The service over HTTP beside the model in process: a table, a figure, a sentence."""

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from helpers.benchmarking.http import IN_PROCESS
from helpers.reporting.benchmark_plots import plain_log
from helpers.reporting.plots import PAGE, PALETTE, titled


def http_view(table: pd.DataFrame) -> pd.DataFrame:
    """`http.measure_http` as narrow as a page; milliseconds, shares in percent."""
    names = {
        "way": "way", "scenario": "scenario", "queries": "queries", "images_per_s": "images/s",
        "share": "of in process, %", "p50_ms": "p50", "p90_ms": "p90", "p99_ms": "p99",
        "added_ms": "added to p50", "refused": "refused", "errors": "errors",
        "client_cpu_ms": "client, CPU ms", "service_cpu_ms": "service, CPU ms",
    }  # fmt: skip
    return table.assign(share=100 * table.share)[list(names)].rename(columns=names)


def http_curve(
    curve: pd.DataFrame, in_process: pd.DataFrame, bound_ms: float, title: str
) -> Figure:
    """Latency and answered images against the offered ones, by what a request holds.

    From `http.measure_http` and `load.measure_load` of the same variant.
    """
    alone = in_process[in_process.load < 1]
    ways = {"in process": alone.assign(offered_images_per_s=alone.target_qps,
                                       images_per_s=alone.answered_per_second)}  # fmt: skip
    ways |= dict(list(curve.groupby("way", sort=False)))
    figure, axes = plt.subplots(1, 2, figsize=(PAGE, 3.6))
    for (way, rows), colour in zip(ways.items(), PALETTE, strict=False):
        style = {"marker": "o", "color": colour, "label": way}
        axes[0].plot(rows.offered_images_per_s, rows.p90_ms, **style)
        axes[1].plot(rows.offered_images_per_s, rows.images_per_s, **style)
    axes[0].axhline(bound_ms, color="0.4", linestyle=":", label="bound")
    axes[0].set(yscale="log", ylabel="p90 from scheduled arrival (ms)")
    plain_log(axes[0].yaxis)
    ends = (0, alone.target_qps.max())
    axes[1].plot(ends, ends, color="0.6", zorder=0, label="offered")
    axes[1].set(ylabel="answered images per second")
    for axis in axes:
        axis.set(xlabel="offered images per second (Poisson)", xlim=(0, None))
        axis.legend(fontsize=8)
    return titled(figure, title)


def http_answer(table: pd.DataFrame) -> str:
    """What HTTP costs, alone and under load, and how much of the cores the client takes."""
    over = table[table.way != IN_PROCESS]
    said = []
    for way, rows in over.groupby("way", sort=False):
        rows = rows.set_index("scenario")
        one = rows.loc["SingleStream" if "SingleStream" in rows.index else "MultiStream"]
        parts = [f"{way}: {one.added_ms:+.1f} ms on the median of one alone"]
        for scenario in ("Server", "Offline"):
            if scenario in rows.index:
                row = rows.loc[scenario]
                share = f" ({row.share:.0%})" if row.share == row.share else ""
                parts.append(f"{scenario} {row.images_per_s:.0f} images/s{share}")
        cost = rows.loc["Offline"]
        client = cost.client_cpu_ms / (cost.client_cpu_ms + cost.service_cpu_ms)
        said.append(f"{', '.join(parts)}; the client computes {client:.0%} of the time")
    return (
        f"{'. '.join(said)}. Percentages are of the same scenario in process; there the model gets "
        "decoded chips, over HTTP the files as they are stored."
    )
