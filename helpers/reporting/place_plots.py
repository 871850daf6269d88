"""Where on the ground a classifier is right. Titles name backbone, weights and data."""

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from helpers.evaluation.robustness import SMALL_PLACE
from helpers.reporting.plots import PAGE, bars, label_points, method_styles, titled

WORST_ROWS = 20  # places in a list of them
WORST_NAMED = 5  # places with their accuracy written beside them


def accuracy_by_place(table: pd.DataFrame, where: pd.DataFrame, title: str) -> Figure:
    """A map of the test places where all have coordinates, else a list of the worst.

    From `robustness.accuracy_by_group` with `method`, and `robustness.place_coordinates`.
    """
    if where.empty:
        return worst_places(table, title)
    return places_map(table.merge(where, on="group"), title)


def worst_places(table: pd.DataFrame, title: str) -> Figure:
    """The places with the lowest accuracy, with exact intervals; a line for all chips together.

    The mean over methods puts places in order.
    """
    styles = method_styles(list(table.method.unique()))
    spread = dict(zip(styles, np.linspace(0.3, -0.3, len(styles) + 2)[1:-1], strict=True))
    places = table.groupby("group").agg(accuracy=("accuracy", "mean"), chips=("chips", "first"))
    worst = places.sort_values(["accuracy", "chips"], ascending=[True, False])[:WORST_ROWS][::-1]
    figure, axis = plt.subplots(figsize=(PAGE * 0.8, 1.3 + 0.22 * len(worst)))
    for method, groups in table.groupby("method", sort=False):
        overall = np.average(groups.accuracy, weights=groups.chips)
        rows, style = groups.set_index("group").loc[worst.index], styles[method]
        axis.errorbar(
            rows.accuracy, np.arange(len(rows)) + spread[method], xerr=bars(rows, "accuracy"),
            markersize=4, capsize=0, linewidth=1, label=f"{method}, all chips: {overall:.3f}",
            **style | {"linestyle": ""},
        )  # fmt: skip
        axis.axvline(overall, color=style["color"], linestyle=style["linestyle"], linewidth=1)
    names = [f"{group} ({chips})" for group, chips in worst.chips.items()]
    shown = f"the worst {len(worst)} of {len(places)}" if len(worst) < len(places) else "all"
    axis.set(
        yticks=np.arange(len(worst)), yticklabels=names, ylabel=f"place (chips), {shown}",
        xlabel="test accuracy, exact 95 % interval", ylim=(-0.6, len(worst) - 0.4),
    )  # fmt: skip
    axis.tick_params(axis="y", labelsize=8)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.7 / figure.get_figheight()),
                ncols=len(styles), frameon=False)  # fmt: skip
    return titled(figure, title)


def places_map(where: pd.DataFrame, title: str) -> Figure:
    """Test places where they lie, a panel a method; the area of a circle is their chips.

    The worst places of `robustness.SMALL_PLACE` chips or more (of all, where none has so many)
    are named with accuracy and chips; colours end at the worst of these. Columns: `method`,
    `group`, `chips`, `longitude`, `latitude` (degrees), `accuracy`.
    """
    large = where[where.chips >= SMALL_PLACE]
    large = where if large.empty else large
    methods = list(where.method.unique())
    across = min(2, len(methods))
    down = -(-len(methods) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(PAGE * (0.72, 1)[across - 1], (4.6, 4.0)[across - 1] * down),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, method in zip(axes.flat, methods, strict=False):
        places = where[where.method == method].sort_values("chips", ascending=False)
        drawn = axis.scatter(
            places.longitude, places.latitude, s=_area(places.chips, where.chips.max()),
            c=places.accuracy, cmap="cividis", vmin=min(0.95, large.accuracy.min()), vmax=1,
            edgecolor="0.2", linewidth=0.8, alpha=0.85,
        )  # fmt: skip
        # A degree of longitude is shorter than one of latitude by the cosine of the latitude.
        axis.set_aspect(1 / np.cos(np.deg2rad(where.latitude.mean())), adjustable="datalim")
        axis.set(xlabel="longitude (degrees)", ylabel="latitude (degrees)", title=method)
        axis.margins(0.12)
        axis.label_outer()
    for axis in axes.flat[len(methods) :]:
        axis.set_axis_off()
    below = "min" if where.accuracy.min() < large.accuracy.min() else "neither"
    figure.colorbar(
        drawn,
        ax=axes,
        label="test accuracy; of the worst: accuracy (chips)",
        extend=below,
        shrink=0.8,
    )
    figure.suptitle(title, fontsize=10)
    figure.draw_without_rendering()
    for axis, method in zip(axes.flat, methods, strict=False):
        places = where[where.method == method].sort_values("accuracy")
        worst = large[large.method == method].nsmallest(WORST_NAMED, "accuracy").group
        texts = [
            f"{row.accuracy:.2f} ({row.chips})" if row.group in set(worst) else ""
            for row in places.itertuples()
        ]
        radii = np.sqrt(_area(places.chips, where.chips.max()) / np.pi)
        label_points(axis, places.longitude, places.latitude, texts, radii)
    return figure


def _area(chips: pd.Series, most: int) -> pd.Series:
    """Of a circle, in square points."""
    return 12 + 288 * chips / most
