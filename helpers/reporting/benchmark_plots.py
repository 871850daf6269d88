"""Figures of the benchmark, each drawn from a table that is also on disk."""

import html

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from helpers.benchmarking.decision import over_reference
from helpers.deployment.variants.source import REFERENCE
from helpers.reporting.plots import PAGE, PALETTE, bars, label_points, line_style, titled

_FAMILIES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "pruned": "PyTorch, pruned",
             "structured": "PyTorch, pruned", "sparse": "PyTorch, pruned"}  # fmt: skip
_COLOURS = dict(
    zip(("PyTorch", "PyTorch, pruned", "ONNX Runtime", "OpenVINO"), PALETTE, strict=False)
)
_MARKERS = {"PyTorch": "o", "PyTorch, pruned": "v", "ONNX Runtime": "s", "OpenVINO": "D"}
_HATCHES = {"PyTorch": "", "PyTorch, pruned": "///", "ONNX Runtime": "...", "OpenVINO": "xxx"}
_FAR = 8
_ABOUT = "\u2248 "


def _family(variant: str) -> str:
    if variant.startswith("structured") and "int8" in variant:
        return "OpenVINO"
    return _FAMILIES.get(variant.split("_")[0], "PyTorch")


def captioned(table: pd.DataFrame, caption: str, precision: int = 3):
    """A table as a notebook shows it: a caption that names what it was measured with.

    Names of files and classes are text, whatever HTML they hold.
    """
    styled = table.style.format(precision=precision, na_rep="", escape="html").hide(axis="index")
    styled = styled.format_index(escape="html", axis="columns")
    return styled.set_caption(html.escape(caption)).set_uuid("table")


def _intervals(table: pd.DataFrame, column: str, form: str) -> list[str]:
    """`value [low, high]` of every row; empty where there is none."""
    ends = (table[f"{column}{end}"] for end in ("", "_low", "_high"))
    shown = f"{{:{form}}} [{{:{form}}}, {{:{form}}}]"
    return [shown.format(*row) if row[0] == row[0] else "" for row in zip(*ends, strict=True)]


def quality_view(quality: pd.DataFrame) -> pd.DataFrame:
    """`measure_quality` as narrow as a page: intervals beside their values."""
    columns = ["precision", "recall", "f1", "auroc", "max_logit_difference", "agreement"]
    view = quality[["split", "variant", "batch_size", *columns]].rename(
        columns={"batch_size": "batch", "max_logit_difference": "max Δ logit"}
    )
    view.insert(3, "accuracy", _intervals(quality, "accuracy", ".3f"))
    lost = _intervals(quality, "accuracy_loss_points", "+.2f")
    return view.assign(**{"points lost": lost, "gate": quality.passes_gate})


def ladder_view(summary: pd.DataFrame) -> pd.DataFrame:
    """What runs here, form by form: quality lost, latency, throughput, file and memory.

    Points lost are those of the validation split, which decides. In brackets the speedup and its
    interval, with a sign for about equal where it is not beyond noise.
    """
    table = summary[summary.p50_ms.notna()].set_index("variant")

    def with_speedup(column: str, form: str) -> list[str]:
        return [
            f"{value:{form}} ({'' if over.beyond_noise else _ABOUT}{over.ratio:.2f}x "
            f"[{over.ratio_low:.2f}, {over.ratio_high:.2f}])"
            for value, over in zip(
                table[column], over_reference(table, column).itertuples(), strict=True
            )
        ]

    judged = table.valid_accuracy_loss_points.notna()
    return pd.DataFrame(
        {
            "form": table.index,
            "points lost": _intervals(table, "valid_accuracy_loss_points", "+.2f"),
            "passes": np.where(judged, np.where(table.passes_gate, "yes", "no"), "only timed"),
            "one chip, ms": with_speedup("p50_ms", ".1f"),
            "images/s": with_speedup("images_per_s", ".0f"),
            "batches": table.batches.fillna("").to_numpy(),
            "file, MiB": table.mebibytes_on_disk.to_numpy(),
            "memory, MiB": table.peak_mib.to_numpy(),
        }
    )


def latency_view(latency: pd.DataFrame) -> pd.DataFrame:
    """`latency_table`, a row per variant: percentiles that the samples carry, and speedups.

    A speedup that is not beyond noise begins with a sign for about equal.
    """
    signs = np.where(latency.beyond_noise, "", _ABOUT)
    speedup = map("".join, zip(signs, _intervals(latency, "speedup", ".2f"), strict=True))
    columns = [*(name for name in latency if name.endswith("_ms")), "speedup"]
    wide = latency.assign(speedup=list(speedup)).pivot(
        index="variant", columns="batch_size", values=columns
    )
    wide = wide.loc[latency.variant.unique()].dropna(axis="columns", how="all")
    wide.columns = [
        f"{name.removesuffix('_ms')}, {'1 chip' if size == 1 else f'{size} chips'}"
        for name, size in wide.columns
    ]
    return wide.reset_index()


def scenario_view(scenarios: pd.DataFrame) -> pd.DataFrame:
    """`measure_scenarios` as narrow as a page; latencies in ms."""
    names = {
        "variant": "variant", "scenario": "scenario", "target_qps": "offered/s",
        "queries": "queries", "answered_per_second": "images/s", "p50_ms": "p50", "p90_ms": "p90",
        "p95_ms": "p95", "p99_ms": "p99", "mean_batch": "batch", "refused": "refused",
        "errors": "errors", "loadgen_valid": "valid",
    }  # fmt: skip
    return scenarios[list(names)].rename(columns=names)


def pareto(summary: pd.DataFrame, gate_points: float, title: str) -> Figure:
    """Points of accuracy lost in validation against latency and memory, with 95 % intervals.

    Those of the points are paired, and drawn over groups where the data name them; those of latency
    are relative to the reference. Hollow marks fail the gate. The line joins what nothing else
    beats in both; only that and the reference are named. What loses more than _FAR points is named
    in a corner, or the rest would be one line.
    """
    lost = "valid_accuracy_loss_points"
    rows = summary.dropna(subset=lost)
    rows = rows.assign(gain=-rows[lost])
    far = rows[rows[lost] > _FAR]
    rows = rows.drop(index=far.index)
    figure, axes = plt.subplots(1, 2, figsize=(PAGE, 4.4), sharey=True)
    panels = (
        ("p50_ms", "median latency of one chip (ms)"),
        ("peak_mib", "peak memory of the process (MiB)"),
    )
    names = {}
    for axis, (cost, label) in zip(axes, panels, strict=True):
        axis.axhline(gate_points, color="0.4", linestyle=":", label="gate")
        _mark(axis, rows, cost, lost)
        front = _front(rows, cost, "gain")
        axis.plot(front[cost], front[lost], color="0.6", zorder=0)
        texts = rows.variant.where(rows.variant.isin({REFERENCE, *front.variant}), "")
        names[axis] = (rows[cost], rows[lost], texts, 5)
        axis.set(xlabel=label, xscale="log")
        plain_log(axis.xaxis)
        axis.margins(x=0.2, y=0.1)
    least, most = axes[0].get_ylim()
    axes[0].set(ylabel="points of accuracy lost in validation", ylim=(min(most, _FAR), least))
    _family_legend(axes[1], rows.variant)
    below = ", ".join(
        f"{name} {points:.1f}" for name, points in zip(far.variant, far[lost], strict=True)
    )
    if below:
        corner = {"transform": axes[1].transAxes, "fontsize": 8, "ha": "right"}
        axes[1].text(0.98, 0.02, f"below this panel: {below}", **corner)
    titled(figure, title)
    for axis, points in names.items():
        label_points(axis, *points)
    return figure


def latency_against_throughput(summary: pd.DataFrame, title: str) -> Figure:
    """Each form's throughput at its best batch against its latency; hollow marks fail the gate.

    Bars are 95 % intervals relative to the reference. Of those that pass only what nothing else
    beats in both is named, and the reference.
    """
    rows = summary[summary.p50_ms.notna()]
    figure, axis = plt.subplots(figsize=(PAGE * 0.75, 4.6))
    _mark(axis, rows, "p50_ms", "images_per_s")
    named = {REFERENCE, *_front(rows[rows.passes_gate], "p50_ms", "images_per_s").variant}
    axis.set(
        xlabel="median latency of one chip (ms)", ylabel="images per second at the best batch",
        xscale="log", yscale="log",
    )  # fmt: skip
    for scale in (axis.xaxis, axis.yaxis):
        plain_log(scale)
    axis.margins(0.2)
    _family_legend(axis, rows.variant, "lower left")
    titled(figure, title)
    texts = rows.variant.where(rows.variant.isin(named), "")
    label_points(axis, rows.p50_ms, rows.images_per_s, texts, 5)
    return figure


def _mark(axis, rows: pd.DataFrame, x: str, y: str) -> None:
    """One mark a variant, hollow where it fails the gate; intervals where the columns have them."""
    for _, row in rows.groupby("variant", sort=False):
        colour = _COLOURS[_family(row.variant.item())]
        reach = {
            f"{way}err": bars(row, column, f"{column}_")
            for way, column in (("x", x), ("y", y))
            if f"{column}_low" in row
        }
        axis.errorbar(
            row[x], row[y], fmt=_MARKERS[_family(row.variant.item())], color=colour, elinewidth=1,
            markerfacecolor=colour if row.passes_gate.item() else "none", markersize=8, **reach,
        )  # fmt: skip


def _front(rows: pd.DataFrame, cost: str, gain: str) -> pd.DataFrame:
    """Rows that no other beats in the gain without a higher cost, cheapest first."""
    ordered = rows.sort_values([cost, gain], ascending=[True, False])
    return ordered[ordered[gain] > ordered[gain].cummax().shift(fill_value=-np.inf)]


def plain_log(axis) -> None:
    """Logarithmic, with plain numbers at 1, 2 and 5."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


def _family_legend(axis, variants, loc: str = "best") -> None:
    for family in dict.fromkeys(map(_family, variants)):
        axis.plot([], [], _MARKERS[family], color=_COLOURS[family], label=family)
    axis.legend(fontsize=8, loc=loc)


def latency_distributions(samples: pd.DataFrame, title: str) -> Figure:
    """Box plots of the latency of one chip (the smallest batch), fastest variant on top."""
    smallest = samples[samples.batch_size == samples.batch_size.min()]
    order = smallest.groupby("variant").seconds.median().sort_values(ascending=False).index
    figure, axis = plt.subplots(figsize=(PAGE, 0.8 + 0.26 * len(order)))
    groups = [1e3 * smallest.seconds[smallest.variant == name] for name in order]
    boxes = axis.boxplot(groups, orientation="horizontal", patch_artist=True, sym=".", widths=0.6)
    for name, box, median in zip(order, boxes["boxes"], boxes["medians"], strict=True):
        family = _family(name)
        box.set(facecolor=(*_COLOURS[family], 0.6), hatch=_HATCHES[family], label=family)
        median.set(color="black")
    axis.set_yticks(range(1, len(order) + 1), order)
    axis.set(xscale="log", xlabel="latency of one prediction (ms); box: quartiles, dots: outliers")
    families = {box.get_label(): box for box in boxes["boxes"]}
    axis.legend(families.values(), families, fontsize=8)
    plain_log(axis.xaxis)
    return titled(figure, title)


def load_curve(curve: pd.DataFrame, capacity: float, bound_ms: float, title: str) -> Figure:
    """Latency and answered rate against the offered load; capacity is the Offline rate."""
    figure, axes = plt.subplots(1, 2, figsize=(PAGE, 3.6))
    for number, name in enumerate(("p50", "p90")):
        axes[0].plot(curve.target_qps, curve[f"{name}_ms"], label=name, **line_style(number))
    axes[0].axhline(bound_ms, color="0.4", linestyle=":", label="bound")
    axes[0].set(yscale="log", ylabel="latency from scheduled arrival (ms)")
    plain_log(axes[0].yaxis)
    axes[1].plot(curve.target_qps, curve.answered_per_second, "o-", label="answered")
    if curve.refused.any():
        share = curve.refused / (curve.refused + curve["samples"])
        axes[1].plot(curve.target_qps, share * curve.target_qps, "s--", label="refused")
    axes[1].plot(curve.target_qps, curve.target_qps, color="0.6", zorder=0, label="offered")
    axes[1].set(ylabel="queries per second")
    for axis in axes:
        axis.axvline(capacity, color="0.4", linestyle="--", label="capacity (Offline)")
        axis.set(xlabel="offered load (queries per second, Poisson)", xlim=(0, None))
        axis.legend(fontsize=8)
    return titled(figure, title)


def roofline(table: pd.DataFrame, limits: dict, title: str) -> Figure:
    """Achieved rate of every variant, at its smallest and largest batch, under the limits.

    Each is named at its largest batch, the fastest first.
    """
    figure, axis = plt.subplots(figsize=(PAGE, 6.0))
    intensity = np.geomspace(table.intensity.min() / 2, table.intensity.max() * 4, 100)
    styles = dict(zip(("fp32", "bf16", "int8"), ("-", "--", ":"), strict=True))
    for precision, style in styles.items():
        limit = np.minimum(limits[precision], intensity * limits["bytes_per_s"])
        label = f"limit {precision}: {limits[precision] / 1e9:.0f} GFLOP/s"
        axis.plot(intensity, limit / 1e9, style, color="0.3", label=label)
    ends = table[table.batch_size.isin([table.batch_size.min(), table.batch_size.max()])]
    for variant, rows in ends.groupby("variant", sort=False):
        family = _family(variant)
        axis.plot(
            rows.intensity, rows.flops_per_s / 1e9, _MARKERS[family] + "-",
            color=_COLOURS[family], linewidth=0.6, alpha=0.8,
        )  # fmt: skip
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte that must move (FLOP/byte); left end: smallest batch",
        ylabel="achieved (GFLOP/s)",
    )
    for scale in (axis.xaxis, axis.yaxis):
        plain_log(scale)
    _family_legend(axis, table.variant, "lower right")
    titled(figure, title)
    ends = ends.sort_values("flops_per_s", ascending=False)
    texts = ends.variant.where(ends.batch_size == ends.batch_size.max(), "")
    label_points(axis, ends.intensity, ends.flops_per_s / 1e9, texts, 4)
    return figure


def sharing(competition: pd.DataFrame, scaling: pd.DataFrame, title: str) -> Figure:
    """Throughput and tail latency beside competing processes, and with more model processes."""
    figure, axes = plt.subplots(1, 3, figsize=(PAGE, 3.2))
    offline = competition[competition.scenario == "Offline"]
    server = competition[competition.scenario == "Server"]
    axes[0].bar(offline.competing.astype(str), offline.answered_per_second, color=PALETTE[0])
    axes[0].set(xlabel="competing processes", ylabel="Offline (images/s)")
    axes[1].bar(server.competing.astype(str), server.p90_ms, color=PALETTE[1])
    axes[1].set(xlabel="competing processes", ylabel="p90 at half the capacity (ms)", yscale="log")
    plain_log(axes[1].yaxis)
    groups = scaling.groupby("variant", sort=False)
    for number, (variant, rows) in enumerate(groups, start=2):
        style = line_style(number) | {"linestyle": "-"}
        ideal = rows.images_per_s.iloc[0] * rows.processes / rows.processes.iloc[0]
        axes[2].plot(rows.processes, rows.images_per_s, label=variant, **style)
        axes[2].plot(rows.processes, ideal, ":", color=style["color"])
    axes[2].set(
        xlabel="model processes (dotted: ideal)", ylabel="Offline (images/s)", ylim=(0, None),
        xticks=scaling.processes.unique(),
    )  # fmt: skip
    axes[2].legend(fontsize=7)
    return titled(figure, title)
