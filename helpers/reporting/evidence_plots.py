"""Figures of the evidence on several tasks, from tables computed elsewhere.

Whatever is told apart by colour has a marker and a line of its own too, for grey prints.
"""

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from helpers.reporting.evidence import UNSEEN
from helpers.reporting.plots import PAGE, line_style, method_styles, titled


def gain_by_chips(rows: pd.DataFrame, title: str) -> Figure:
    """AUROC gain over the head against training chips, a line a task and method, bands of 95 %.

    Rows are the `shares` of `evidence.over_tasks`; markers are hollow where the backbone has not
    seen the chips.
    """
    figure, axis = plt.subplots(figsize=(PAGE, 4.2))
    for number, ((task, method), line) in enumerate(rows.groupby(["task", "second"], sort=False)):
        line = line.sort_values("train_chips")
        seen, style = bool(line.seen.iloc[0]), line_style(number)
        axis.fill_between(line.train_chips, line.low, line.high, color=style["color"], alpha=0.13)
        axis.plot(
            line.train_chips, line.value, **style,
            markerfacecolor=style["color"] if seen else "white",
            label=f"{task}, {method} ({'seen' if seen else 'not seen'})",
        )  # fmt: skip
    axis.axhline(0, color="0.3", linewidth=1)
    axis.set(xscale="log", xlabel="training chips", ylabel="test AUROC ahead of the head")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return titled(figure, title)


def methods_by_task(means: pd.DataFrame, title: str) -> Figure:
    """Test AUROC of every method with its interval, a panel a task (`evidence.over_tasks`)."""
    rows = means[means.metric == "auroc"]
    tasks, methods = list(dict.fromkeys(rows.task)), list(dict.fromkeys(rows.method))
    styles = method_styles(methods)
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(PAGE * 1.1, 1.2 + 0.32 * len(methods)), sharey=True, squeeze=False
    )
    for axis, task in zip(axes.flat, tasks, strict=True):
        for row in rows[rows.task == task].itertuples():
            height = len(methods) - 1 - methods.index(row.method)
            ends = np.abs([[row.low - row.value], [row.high - row.value]])
            axis.errorbar(
                row.value, height, xerr=ends, capsize=2, markersize=5,
                **styles[row.method] | {"linestyle": ""},
            )  # fmt: skip
        axis.set_title(task.replace(UNSEEN, f"\n{UNSEEN}"), fontsize=9)
        axis.set(yticks=range(len(methods)), yticklabels=methods[::-1], xlabel="test AUROC")
        axis.tick_params(axis="x", labelsize=7, rotation=45)
        axis.margins(y=0.12)
    return titled(figure, title)
