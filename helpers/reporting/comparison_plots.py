"""Figures of runs side by side: methods, seeds, amounts of data and shapes.

Titles name backbone, weights and data.
"""

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from helpers.reporting.plots import METRIC_NAMES, PAGE, bars, method_styles, titled


def method_curves(histories: pd.DataFrame, title: str) -> Figure:
    """Losses and validation AUROC by epoch; a line a method and seed, pale after the first seed."""
    styles = method_styles(list(histories.method.unique()))
    panels = {
        "train_loss": "training loss (cross entropy)",
        "valid_loss": "validation loss (cross entropy)",
        "valid_auroc": "validation AUROC",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(PAGE, 3.2))
    for axis, (column, label) in zip(axes, panels.items(), strict=True):
        for (method, seed), history in histories.groupby(["method", "seed"], sort=False):
            style = styles[method] | {"label": method, "linewidth": 1.2}
            if seed != histories.seed.iloc[0]:
                style |= {"label": None, "linewidth": 0.6, "alpha": 0.3, "marker": ""}
            axis.plot(
                history.epoch, history[column], markersize=4, markevery=max(1, len(history) // 8),
                **style,
            )  # fmt: skip
        axis.set(xlabel="epoch", ylabel=label, xscale="log")
        axis.xaxis.set_major_formatter("{x:.0f}")
    axes[0].legend(fontsize=8)
    return titled(figure, title)


def against(rows: pd.DataFrame, x: str, metric: str, title: str) -> Figure:
    """A test metric with its interval against a column, on a log axis, one colour a method.

    Rows have `method`, `value`, `low`, `high` and that column, x, with underscores for spaces.
    """
    figure, axis = plt.subplots(figsize=(PAGE * 0.7, 3.4))
    _against(axis, rows, x, metric)
    axis.set_title(title)
    figure.tight_layout()
    return figure


def _against(axis, rows: pd.DataFrame, x: str, metric: str, lines: bool = False) -> None:
    styles = method_styles(list(rows.method.unique()))
    for method, points in rows.groupby("method", sort=False):
        points = points.sort_values(x)
        # Seeds of one method and place stand side by side.
        number = points.groupby(x).cumcount() - (points.groupby(x)[x].transform("size") - 1) / 2
        axis.errorbar(
            points[x] * 1.06**number, points.value, bars(points), markersize=4, capsize=2,
            linewidth=1, label=method, **styles[method] | ({} if lines else {"linestyle": ""}),
        )  # fmt: skip
    name = f"test {METRIC_NAMES[metric]}, 95 % interval"
    axis.set(xscale="log", xlabel=x.replace("train_", "training ").replace("_", " "), ylabel=name)
    values = sorted(rows[x].unique())
    if lines or len(values) <= 3:  # a power of ten may not lie between so few
        axis.set_xticks(values, minor=False)
    axis.set_xticks([], minor=True)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def headline(table: pd.DataFrame, title: str) -> Figure:
    """Accuracy and AUROC of every method and seed, and AUROC by number of training chips.

    From `comparison.headline_rows`.
    """
    tests, by_size = (table[table.panel == panel] for panel in ("methods", "training chips"))
    figure, axes = plt.subplots(1, 3, figsize=(PAGE * 1.15, 3.3), width_ratios=(1, 1, 1.25))
    methods = list(tests.method.unique())
    styles = method_styles(methods)
    for axis, metric in zip(axes, ("accuracy", "auroc"), strict=False):
        for place, method in enumerate(methods):
            seeds = tests[(tests.method == method) & (tests.metric == metric)]
            offsets = np.linspace(-0.25, 0.25, len(seeds)) if len(seeds) > 1 else [0]
            axis.errorbar(
                place + np.asarray(offsets), seeds.value, bars(seeds), markersize=4, capsize=2,
                linewidth=1, **styles[method] | {"linestyle": ""},
            )  # fmt: skip
        axis.set_xticks(range(len(methods)), [m.replace("_", "\n") for m in methods])
        axis.set(
            ylabel=f"test {METRIC_NAMES[metric]}, 95 % interval", xlim=(-0.6, len(methods) - 0.4)
        )
    _against(axes[2], by_size, "train_chips", "auroc", lines=True)
    return titled(figure, title)


def operating_curves(curves: pd.DataFrame, title: str) -> Figure:
    """ROC and precision-recall curves, the corner where they bend: `method`, `curve`, `x`, `y`."""
    figure, axes = plt.subplots(1, 2, figsize=(PAGE, 3.8))
    styles = method_styles(list(curves.method.unique()))
    for (method, curve), points in curves.groupby(["method", "curve"], sort=False):
        line = styles[method] | {"marker": ""}
        axes[int(curve == "pr")].plot(points.x, points.y, label=method, **line)
    axes[0].set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
    axes[1].set(xlabel="recall", ylabel="precision", title="precision and recall")
    for axis in axes:
        axis.legend(fontsize=8)
    reach = _reach(curves)
    axes[0].set(xlim=(-0.02 * reach, reach), ylim=(1 - reach, 1 + 0.02 * reach))
    axes[1].set(xlim=(1 - reach, 1 + 0.02 * reach), ylim=(1 - reach, 1 + 0.02 * reach))
    return titled(figure, title)


def _reach(curves: pd.DataFrame) -> float:
    """Three times the distance of the worst curve's best point from the ideal corner."""
    across = np.where(curves.curve == "roc", curves.x, 1 - curves.x)
    apart = curves.assign(apart=np.maximum(across, 1 - curves.y))
    return float(np.clip(3 * apart.groupby(["method", "curve"]).apart.min().max(), 0.05, 1))


def reliability_diagram(table: pd.DataFrame, title: str) -> Figure:
    """Accuracy against confidence, a bin a point, with exact intervals (`metrics.reliability`)."""
    figure, axis = plt.subplots(figsize=(PAGE * 0.6, 4.2))
    low = min(table.confidence.min(), table.accuracy.min()) - 0.02
    axis.plot([low, 1], [low, 1], color="0.6", linestyle=":", label="perfectly calibrated")
    styles = method_styles(list(table.method.unique()))
    for method, bins in table.groupby("method", sort=False):
        axis.errorbar(
            bins.confidence, bins.accuracy, bars(bins, "accuracy"), capsize=2, markersize=4,
            linewidth=1, label=method, **styles[method],
        )  # fmt: skip
    axis.set(
        xlabel="mean confidence of the bin (equally many chips in each)",
        ylabel="accuracy in the bin, exact 95 % interval",
        title=title,
    )
    axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def change_by_block(changes: dict[str, pd.DataFrame], title: str) -> Figure:
    """Relative change of every linear layer by block (`weight_changes`), a panel a method."""
    figure, axes = plt.subplots(1, len(changes), figsize=(PAGE, 3.4), squeeze=False, sharey=True)
    layers = dict.fromkeys(layer for table in changes.values() for layer in table.layer)
    styles = method_styles(list(layers))
    for axis, (method, table) in zip(axes.flat, changes.items(), strict=True):
        for layer, rows in table.groupby("layer", sort=False):
            axis.plot(rows.block, rows.relative_change, markersize=4, label=layer, **styles[layer])
        axis.set(title=method, xlabel="block", ylabel="change / norm of the weight", ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8)
        axis.label_outer()
    return titled(figure, title)
