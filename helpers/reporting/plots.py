"""Every figure of the training notebooks, from tables and arrays that were computed elsewhere.

Each function returns a matplotlib figure; `save` writes it and the table behind it.
"""

import io
import itertools
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import PIL.Image
import seaborn as sns
from IPython.display import Image
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

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


def _bars(rows: pd.DataFrame, column: str = "value", prefix: str = "") -> np.ndarray:
    """How far an interval reaches below and above its value, (2, rows), as `errorbar` wants it."""
    ends = rows[[f"{prefix}low", f"{prefix}high"]].to_numpy().T
    return np.abs(ends - rows[column].to_numpy())


def as_rgb(chip: np.ndarray) -> np.ndarray:
    """A chip (bands, H, W) as (H, W, 3) in 0..1: its first three bands, or the first as grey.

    Values that are not 8-bit are stretched from their 2nd to their 98th percentile.
    """
    bands = chip[:3] if len(chip) >= 3 else chip[:1].repeat(3, axis=0)
    image = np.moveaxis(bands, 0, 2).astype(np.float32)
    if chip.dtype == np.uint8:
        return image / 255
    low, high = np.percentile(image, [2, 98])
    return np.clip((image - low) / max(high - low, 1e-9), 0, 1)


def chip_rows(rows: dict[str, list[np.ndarray]], titles: list[str] | None = None) -> Figure:
    """Rows of images under a name each; images are (bands, H, W) chips or (H, W, 3) colours."""
    columns = max(len(images) for images in rows.values())
    lines = 1 + max((title.count("\n") + 1 for title in titles or []), default=0)
    height = PAGE / columns + 0.17 * lines
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(PAGE, height * len(rows)),
        squeeze=False,
        layout="constrained",
        dpi=70,  # photographs make large files
    )
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image if image.shape[-1] == 3 else as_rgb(image))
        line[0].set_title(name, loc="left", fontsize=10)
    for axis, title in zip(axes.flat, titles or [], strict=False):
        axis.set_title(title, fontsize=8)
    return figure


def training_curves(history: pd.DataFrame, title: str) -> Figure:
    """Loss, accuracy and AUROC by epoch; a dotted line marks the epoch that was kept."""
    figure, axes = plt.subplots(1, 2, figsize=(PAGE, 3.2))
    best = history.epoch[history.valid_loss.idxmin()]
    loss = {"train": "train_loss", "valid": "valid_loss"}
    share = {"train accuracy": "train_acc", "valid accuracy": "valid_acc",
             "valid AUROC": "valid_auroc"}  # fmt: skip
    panels = {"loss (mean cross entropy per image)": loss, "share": share}
    for axis, (label, columns) in zip(axes, panels.items(), strict=True):
        for name, column in columns.items():
            axis.plot(history.epoch, history[column], label=name)
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
        figsize=(PAGE, 1.2 + 0.5 * candidates.head_input.nunique()),
        squeeze=False,
        sharey=True,
    )
    limits = {"vmin": candidates.valid_loss.min(), "vmax": candidates.valid_loss.quantile(0.9)}
    for axis, decay in zip(axes.flat, decays, strict=True):
        table = candidates[candidates.weight_decay == decay].pivot(
            index="head_input", columns="learning_rate", values="valid_loss"
        )
        sns.heatmap(table, annot=True, fmt=".3f", cmap="cividis_r", cbar=False, ax=axis, **limits)
        axis.set(
            title=f"weight decay {decay:g}", xlabel="learning rate (AdamW)", ylabel="head input"
        )
        axis.tick_params(axis="y", rotation=0)
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
            colour = PALETTE[(len(names) - 1 - height) % len(PALETTE)]
            axis.plot([row.low, row.high], [height, height], color=colour, linewidth=2)
            axis.plot(row.value, height, "o", color=colour)
        axis.set(title=METRIC_NAMES[metric], yticks=range(len(names)), yticklabels=names)
        axis.margins(y=0.15)
    return titled(figure, title)


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
            rows.accuracy, np.arange(len(rows)) + spread[method], xerr=_bars(rows, "accuracy"),
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


def shortcut_check(table: pd.DataFrame, title: str) -> Figure:
    """AUROC on degraded test chips with intervals, for the trained and for the refitted head."""
    names = list(dict.fromkeys(table.chips))[::-1]
    figure, axis = plt.subplots(figsize=(PAGE * 0.85, 1.2 + 0.4 * len(names)))
    for number, (head, rows) in enumerate(table.groupby("head", sort=False)):
        heights = np.array([names.index(name) for name in rows.chips]) + 0.1 - 0.2 * number
        axis.errorbar(
            rows.auroc, heights, xerr=_bars(rows, "auroc", "auroc_"), fmt="o",
            color=PALETTE[number], capsize=2, label=head,
        )  # fmt: skip
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel="test AUROC, 95 % interval")
    axis.legend(title="head", fontsize=8, loc="upper left")
    return titled(figure, title)


def confusion(matrix: list[list[int]], classes: list[str], title: str) -> Figure:
    """Counts of test chips by true and predicted class."""
    figure, axis = plt.subplots(figsize=(3.2 + 0.4 * len(classes), 2.2 + 0.3 * len(classes)))
    names = {"xticklabels": classes, "yticklabels": classes}
    sns.heatmap(np.array(matrix), annot=True, fmt="d", cmap="cividis", cbar=False, ax=axis, **names)
    axis.set(xlabel="predicted", ylabel="true", title=title)
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
        number = order.index(method) if method in order else next(left)
        styles[method] = {
            "color": PALETTE[number % len(PALETTE)],
            "marker": "osDv^P"[number % 6],
            "linestyle": ("-", "--", "-.", ":")[number % 4],
        }
    return styles


def method_curves(histories: pd.DataFrame, title: str) -> Figure:
    """Training loss, validation loss and validation AUROC by epoch; one line a method and seed.

    Args:
        histories: `method`, `seed` and the columns of a history.
        title: names backbone, weights and data.
    """
    styles = method_styles(list(histories.method.unique()))
    panels = {
        "train_loss": "training loss (cross entropy)",
        "valid_loss": "validation loss (cross entropy)",
        "valid_auroc": "validation AUROC",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(PAGE, 3.2))
    for axis, (column, label) in zip(axes, panels.items(), strict=True):
        for (method, seed), history in histories.groupby(["method", "seed"], sort=False):
            first = seed == histories.seed.iloc[0]
            axis.plot(
                history.epoch, history[column], markersize=4, linewidth=1.2,
                label=method if first else None, markevery=max(1, len(history) // 8),
                **styles[method],
            )  # fmt: skip
        axis.set(xlabel="epoch", ylabel=label, xscale="log")
        axis.xaxis.set_major_formatter("{x:.0f}")
    axes[0].legend(fontsize=8)
    return titled(figure, title)


def against(rows: pd.DataFrame, x: str, metric: str, title: str, lines: bool = False) -> Figure:
    """A test metric with its interval against a column, on a log axis, one colour a method.

    Args:
        rows: `method`, `value`, `low`, `high` and the column x.
        x: name of that column, with underscores for spaces.
        metric: what the values are, one of METRIC_NAMES.
        title: names backbone, weights and data.
        lines: whether to join the points of a method.
    """
    figure, axis = plt.subplots(figsize=(PAGE * 0.7, 3.4))
    _against(axis, rows, x, metric, lines)
    axis.set_title(title)
    figure.tight_layout()
    return figure


def _against(axis, rows: pd.DataFrame, x: str, metric: str, lines: bool) -> None:
    styles = method_styles(list(rows.method.unique()))
    for method, points in rows.groupby("method", sort=False):
        points = points.sort_values(x)
        # Seeds of one method and place stand side by side.
        number = points.groupby(x).cumcount() - (points.groupby(x)[x].transform("size") - 1) / 2
        axis.errorbar(
            points[x] * 1.06**number, points.value, _bars(points), markersize=4, capsize=2,
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

    Args:
        table: as from `comparison.headline_rows`.
        title: names backbone, weights and data.
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
                place + np.asarray(offsets), seeds.value, _bars(seeds), markersize=4, capsize=2,
                linewidth=1, **styles[method] | {"linestyle": ""},
            )  # fmt: skip
        axis.set_xticks(range(len(methods)), [m.replace("_", "\n") for m in methods])
        axis.set(
            ylabel=f"test {METRIC_NAMES[metric]}, 95 % interval", xlim=(-0.6, len(methods) - 0.4)
        )
    _against(axes[2], by_size, "train_chips", "auroc", lines=True)
    return titled(figure, title)


def operating_curves(curves: pd.DataFrame, title: str) -> Figure:
    """ROC and precision-recall curves: `method`, `curve` (roc or pr), `x`, `y`."""
    figure, axes = plt.subplots(1, 2, figsize=(PAGE, 3.8))
    styles = method_styles(list(curves.method.unique()))
    for (method, curve), points in curves.groupby(["method", "curve"], sort=False):
        line = styles[method] | {"marker": ""}
        axes[int(curve == "pr")].plot(points.x, points.y, label=method, **line)
    axes[0].plot([0, 1], [0, 1], color="0.6", linestyle=":", label="chance")
    axes[0].set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
    axes[1].set(xlabel="recall", ylabel="precision", title="precision and recall")
    for axis in axes:
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axis.legend(fontsize=8)
    return titled(figure, title)


def reliability_diagram(table: pd.DataFrame, title: str) -> Figure:
    """Accuracy against confidence per bin; area of a point: images in the bin.

    Args:
        table: `method`, `confidence`, `accuracy`, `images`.
        title: names backbone, weights and data.
    """
    figure, axis = plt.subplots(figsize=(PAGE * 0.5, 3.8))
    low = min(0.45, table.confidence.min() - 0.05)
    axis.plot([low, 1], [low, 1], color="0.6", linestyle=":", label="perfectly calibrated")
    styles = method_styles(list(table.method.unique()))
    for method, bins in table.groupby("method", sort=False):
        size = 250 * bins.images / bins.images.sum()
        axis.scatter(
            bins.confidence, bins.accuracy, s=size + 8, color=styles[method]["color"],
            marker=styles[method]["marker"], alpha=0.7, label=method,
        )  # fmt: skip
    axis.set(xlabel="mean confidence of the bin", ylabel="accuracy in the bin", title=title)
    axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def change_map(changes: dict[str, pd.DataFrame], title: str) -> Figure:
    """Relative change of every linear layer by block (`weight_changes`), a panel a method."""
    figure, axes = plt.subplots(1, len(changes), figsize=(PAGE, 4), squeeze=False, sharey=True)
    top = max(table.relative_change.max() for table in changes.values())
    for axis, (method, table) in zip(axes.flat, changes.items(), strict=True):
        grid = table.pivot(index="block", columns="layer", values="relative_change")
        sns.heatmap(
            grid, annot=True, fmt=".3f", cmap="cividis", vmin=0, vmax=top, ax=axis, cbar=False,
            annot_kws={"fontsize": 7},
        )  # fmt: skip
        axis.set(title=method, xlabel="layer", ylabel="block")
        axis.tick_params(axis="y", rotation=0)
        axis.label_outer()
    return titled(figure, title)
