"""The look of every figure, and the figures of one run, from tables that were computed elsewhere.

Each function returns a matplotlib figure, whose title names backbone, weights and data; `save`
writes it and the table behind it.
"""

import io
import itertools
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import PIL.Image
import seaborn as sns
from IPython.display import Image
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from helpers.records import written_whole

PALETTE = sns.color_palette("colorblind")
PAGE = 9.0  # inches, the width of a rendered notebook
METRIC_NAMES = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "brier": "Brier score",
    "calibration_error": "calibration error",
}


def use_style() -> None:
    """Set the look of every figure: colour-blind-safe, readable at page width."""
    sns.set_theme(style="whitegrid", palette="colorblind", font_scale=0.9)
    matplotlib.rcParams |= {
        "figure.dpi": 100,
        "savefig.dpi": "figure",
        "axes.titlesize": "medium",
        "text.parse_math": False,  # a class may be called $x$
    }


def save(figure: Figure, path: str | Path, table: pd.DataFrame | None = None) -> Image:
    """Write a figure as PNG or, of photographs, JPEG; beside it its table as CSV.

    Returns:
        The file for a notebook to show. A PNG has 256 colours, a third of the bytes of all of them.
    """
    path = Path(path)
    drawn = io.BytesIO()
    figure.savefig(drawn, bbox_inches="tight")
    with written_whole(path) as part, PIL.Image.open(drawn) as picture:
        picture = picture.convert("RGB")
        if path.suffix == ".png":
            picture = picture.quantize(256, dither=PIL.Image.Dither.NONE)
        picture.save(part, optimize=True, quality=80)
    if table is not None:
        with written_whole(path.with_suffix(".csv")) as part:
            table.to_csv(part, index=False, float_format="%.6g")
    plt.close(figure)
    return Image(filename=str(path))


def titled(figure: Figure, title: str) -> Figure:
    """The figure with its title, laid out: how most of them end."""
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    return figure


def bars(rows: pd.DataFrame, column: str = "value", prefix: str = "") -> np.ndarray:
    """How far an interval reaches below and above its value, (2, rows), as `errorbar` wants it."""
    ends = rows[[f"{prefix}low", f"{prefix}high"]].to_numpy().T
    return np.abs(ends - rows[column].to_numpy())


_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))


def label_points(axis: Axes, x, y, texts: Iterable[str], radii) -> None:
    """Name points, each at the nearest place around it where no point, text or legend is.

    From a name that is not beside its point a thin line leads there.

    The axis is laid out, with its final limits: places are compared in pixels. A point has one
    text, empty for no name; the first get the best places. Radii of markers, one or one each, are
    in points (1/72 inch).
    """
    renderer = axis.figure.canvas.get_renderer()
    places, radii = np.column_stack([x, y]), np.broadcast_to(radii, len(x))
    pixels = axis.transData.transform(places)
    around = radii[:, None] * axis.figure.dpi / 72
    taken = list(map(Bbox, np.stack([pixels - around, pixels + around], axis=1)))
    others = [*axis.texts, *filter(None, [axis.get_legend()])]
    taken += [other.get_window_extent(renderer) for other in others]
    line = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.5}
    for place, text, radius in zip(places, texts, radii, strict=True):
        if not text:
            continue
        label = axis.annotate(
            text, place, (0, 0), textcoords="offset points", fontsize=8, arrowprops=line
        )
        label.set_path_effects([withStroke(linewidth=2, foreground="white")])
        for gap, (across, up) in itertools.product(range(3, 150, 7), _SIDES):
            label.set(
                position=((radius + gap) * across, (radius + gap) * up),
                ha=("center", "left", "right")[across],
                va=("center", "bottom", "top")[up],
            )
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # without the line
            inside = Bbox.intersection(axis.bbox, box)
            if inside and np.allclose(inside, box) and not any(map(box.overlaps, taken)):
                break
        taken.append(box)


def training_curves(history: pd.DataFrame, title: str) -> Figure:
    """Loss, accuracy and AUROC by epoch; a dotted line marks the epoch that was kept."""
    figure, axes = plt.subplots(1, 2, figsize=(PAGE, 3.2))
    best = history.epoch[history.valid_loss.idxmin()]
    loss = {"train": "train_loss", "valid": "valid_loss"}
    share = {"train accuracy": "train_acc", "valid accuracy": "valid_acc",
             "valid AUROC": "valid_auroc"}  # fmt: skip
    panels = {"loss (mean cross entropy per image)": loss, "share": share}
    for axis, (label, columns) in zip(axes, panels.items(), strict=True):
        for number, (name, column) in enumerate(columns.items()):
            axis.plot(
                history.epoch, history[column], label=name, markersize=4,
                markevery=max(1, len(history) // 8), **line_style(number),
            )  # fmt: skip
        axis.axvline(best, color="0.4", linestyle=":", label=f"kept: epoch {best}")
        axis.set(xlabel="epoch", ylabel=label)
        axis.legend(fontsize=8)
    axes[0].set_ylim(bottom=0)
    return titled(figure, title)


def sweep_map(candidates: pd.DataFrame, title: str) -> Figure:
    """Best validation loss of every head: learning rate by head input, a panel a weight decay."""
    decays = sorted(candidates.weight_decay.unique())
    figure, axes = plt.subplots(
        1,
        len(decays),
        figsize=(PAGE * 1.1, 1.2 + 0.5 * candidates.head_input.nunique()),
        squeeze=False,
        sharey=True,
    )
    limits = {"vmin": candidates.valid_loss.min(), "vmax": candidates.valid_loss.quantile(0.9)}
    for axis, decay in zip(axes.flat, decays, strict=True):
        table = candidates[candidates.weight_decay == decay].pivot(
            index="head_input", columns="learning_rate", values="valid_loss"
        )
        sns.heatmap(
            table, annot=True, fmt=".2f", cmap="cividis_r", cbar=False, ax=axis, **limits,
            annot_kws={"fontsize": 8},
        )  # fmt: skip
        axis.set(
            title=f"weight decay {decay:g}", xlabel="learning rate (AdamW)", ylabel="head input"
        )
        axis.tick_params(axis="y", rotation=0, labelsize=8)
        axis.tick_params(axis="x", rotation=45, labelsize=8)
        axis.label_outer()
    return titled(figure, title)


def intervals(table: pd.DataFrame, title: str) -> Figure:
    """Values with their intervals: table of `model`, `metric`, `value`, `low`, `high`."""
    metrics = list(dict.fromkeys(table.metric))
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(PAGE, 0.9 + 0.34 * table.model.nunique()), sharey=True
    )
    names = list(dict.fromkeys(table.model))[::-1]
    for axis, metric in zip(np.atleast_1d(axes), metrics, strict=True):
        rows = table[table.metric == metric].set_index("model").loc[names]
        for height, row in enumerate(rows.itertuples()):
            style = line_style(len(names) - 1 - height) | {"linestyle": "-"}
            axis.plot([row.low, row.high], [height] * 2, color=style["color"], linewidth=2)
            axis.plot(row.value, height, **style)
        axis.set(title=METRIC_NAMES[metric], yticks=range(len(names)), yticklabels=names)
        axis.margins(y=0.15)
    return titled(figure, title)


def shortcut_check(table: pd.DataFrame, title: str) -> Figure:
    """AUROC on degraded test chips with intervals, for the trained and for the refitted head."""
    names = list(dict.fromkeys(table.chips))[::-1]
    figure, axis = plt.subplots(figsize=(PAGE * 0.85, 1.2 + 0.4 * len(names)))
    for number, (head, rows) in enumerate(table.groupby("head", sort=False)):
        heights = np.array([names.index(name) for name in rows.chips]) + 0.1 - 0.2 * number
        axis.errorbar(
            rows.auroc, heights, xerr=bars(rows, "auroc", "auroc_"), capsize=2, label=head,
            **line_style(number) | {"linestyle": ""},
        )  # fmt: skip
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel="test AUROC, 95 % interval")
    axis.legend(title="head", fontsize=8, loc="upper left")
    return titled(figure, title)


def features_by_acquisition(
    components: np.ndarray,
    shares: np.ndarray,
    labels: pd.Series,
    statistic: tuple[str, np.ndarray],
    title: str,
) -> Figure:
    """The same chips twice, placed by their features: by class, and by their acquisition.

    From `inspection.feature_components`, the class of each chip (N,) and
    `baselines.strongest_statistic`, whose 2 % and 98 % quantiles end the colours.
    """
    figure, axes = plt.subplots(1, 2, figsize=(PAGE * 1.05, 3.9), sharex=True, sharey=True)
    size = float(np.clip(6000 / len(components), 5, 25))  # square points
    for name, style in method_styles(sorted(labels.unique())).items():
        of_class = components[labels == name]
        axes[0].scatter(
            *of_class.T, s=size, color=style["color"], marker=style["marker"], alpha=0.6,
            linewidth=0, label=name,
        )  # fmt: skip
    axes[0].legend(fontsize=8, markerscale=1.5)
    axes[0].set_title("by class")
    name, values = statistic
    low, high = np.quantile(values, [0.02, 0.98])
    drawn = axes[1].scatter(
        *components.T, s=size, c=values, vmin=low, vmax=high, cmap="cividis", linewidth=0
    )
    axes[1].set_title(f"by {name}")
    figure.colorbar(drawn, ax=axes[1], extend="both")
    for number, (share, axis) in enumerate(zip(shares, "xy", strict=True), start=1):
        plt.setp(axes, **{f"{axis}label": f"component {number} ({share:.0%} of the variance)"})
    axes[1].set_ylabel("")
    return titled(figure, title)


def confusion(matrix: list[list[int]], classes: list[str], title: str) -> Figure:
    """Test chips by true and predicted class: counts, and the share of the true class."""
    counts = np.array(matrix)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    texts = [
        [f"{count}\n{share:.0%}" for count, share in zip(*row, strict=True)]
        for row in zip(counts, shares, strict=True)
    ]
    figure, axis = plt.subplots(figsize=(2.9 + 0.6 * len(classes), 2.0 + 0.45 * len(classes)))
    sns.heatmap(
        shares, annot=np.array(texts), fmt="", cmap="cividis", vmin=0, vmax=1, cbar=False, ax=axis,
        xticklabels=classes, yticklabels=classes, annot_kws={"fontsize": 9},
    )  # fmt: skip
    axis.set(xlabel="predicted", ylabel="true (rows add up to 100%)", title=title)
    figure.tight_layout()
    return figure


def method_styles(methods: list[str]) -> dict[str, dict]:
    """The same colour, marker and line for a method in every figure, so that grey prints work.

    Other names take what is left, in order.
    """
    order = ("head_only", "lora", "dora", "full")
    taken = {order.index(method) for method in methods if method in order}
    left = (number for number in itertools.count() if number not in taken)
    styles = {}
    for method in methods:
        styles[method] = line_style(order.index(method) if method in order else next(left))
    return styles


def line_style(number: int) -> dict:
    """Colour, marker and line that tell the lines of a figure apart, in grey prints too."""
    return {
        "color": PALETTE[number % len(PALETTE)],
        "marker": "osDv^PX<>"[number % 9],
        "linestyle": ("-", "--", "-.", ":")[number % 4],
    }
