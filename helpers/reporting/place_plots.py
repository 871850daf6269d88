"""Where on the ground a classifier is right."""

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from helpers.reporting.plots import PAGE, bars, method_styles, titled


def accuracy_by_group(table: pd.DataFrame, title: str, largest: int = 20) -> Figure:
    """Test accuracy of the largest groups with exact intervals; a line for all groups together.

    Args:
        table: `method` and the columns of `robustness.accuracy_by_group`.
        title: names backbone, weights and data.
        largest: so many groups are shown.
    """
    styles = method_styles(list(table.method.unique()))
    spread = dict(zip(styles, np.linspace(0.4, -0.4, len(styles) + 2)[1:-1], strict=True))
    sizes = table.groupby("group", sort=False).chips.first().head(largest)[::-1]
    figure, axis = plt.subplots(
        figsize=(PAGE * 0.75, 1.0 + (0.13 + 0.09 * len(styles)) * len(sizes))
    )
    for method, groups in table.groupby("method", sort=False):
        overall = np.average(groups.accuracy, weights=groups.chips)
        rows = groups.set_index("group").loc[sizes.index]
        style = styles[method]
        axis.errorbar(
            rows.accuracy, np.arange(len(rows)) + spread[method], xerr=bars(rows, "accuracy"),
            markersize=4, capsize=2, label=f"{method}, all groups: {overall:.3f}",
            **style | {"linestyle": ""},
        )  # fmt: skip
        axis.axvline(overall, color=style["color"], linestyle=style["linestyle"], linewidth=1)
    names = [f"{group} ({chips} chips)" for group, chips in sizes.items()]
    axis.set(
        yticks=np.arange(len(sizes)), yticklabels=names, xlabel="test accuracy, exact 95 % interval"
    )
    axis.tick_params(axis="y", labelsize=8)
    axis.legend(fontsize=8)
    return titled(figure, title)


def places_map(where: pd.DataFrame, title: str) -> Figure:
    """Test places where they lie, with their accuracy; the area of a circle is their chips.

    Args:
        where: `group`, `chips`, `longitude`, `latitude` (degrees), `accuracy` of one method.
        title: names the task and the method.
    """
    figure, axis = plt.subplots(figsize=(PAGE * 0.7, 4.6))
    areas = 20 + 400 * where.chips / where.chips.max()  # square points
    drawn = axis.scatter(
        where.longitude, where.latitude, s=areas, c=where.accuracy, cmap="cividis", edgecolor="0.2",
        alpha=0.85,
    )  # fmt: skip
    for row, area in zip(where.itertuples(), areas, strict=True):
        axis.annotate(
            f"{row.accuracy:.2f}", (row.longitude, row.latitude), va="center", fontsize=7,
            xytext=((area / np.pi) ** 0.5 + 2, 0), textcoords="offset points",
        )  # fmt: skip
    # A degree of longitude is shorter than one of latitude by the cosine of the latitude.
    axis.set_aspect(1 / np.cos(np.deg2rad(where.latitude.mean())))
    axis.set(xlabel="longitude (degrees)", ylabel="latitude (degrees)")
    axis.tick_params(axis="x", rotation=30)
    axis.margins(0.12)
    figure.colorbar(drawn, label="accuracy, mean over seeds")
    return titled(figure, title)
