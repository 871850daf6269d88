"""A map over its scene, as a picture of page size."""

import math
from itertools import zip_longest
from pathlib import Path

import geopandas as gpd
import numpy as np
import rasterio
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from pyproj import Geod
from rasterio.windows import Window, from_bounds

from helpers.data.cells import NODATA, class_colours
from helpers.data.scenes import Scene
from helpers.reporting.plots import PAGE, save

_PIXELS = 1600  # of the longer side: what a page shows
_DPI = 160  # of the picture beside a map
_PAGE_DPI = 100  # of a figure in a notebook
_TALLEST = 1.3  # height of a picture in widths of a page
_OPACITY = 0.45  # of a class over the scene; the first class lies at a third of it
_UNSURE = (0.1, 0.1, 0.1)
_STATES = {"right": ((0.0, 0.62, 0.45), None), "wrong": ((0.84, 0.37, 0.0), "xxx"),
           "unsure": (_UNSURE, "...")}  # fmt: skip
_STRETCH = (2, 98)  # percentiles of a band that become black and white
_OUTLINE = [withStroke(linewidth=3, foreground="black")]


def draw_map(scene: Path, bands: tuple[int, ...], map_path: Path, png: Path) -> None:
    """Write the picture of a map (`data.cells.write_map`), with legend, scale bar and north.

    Of the zero-based bands the first three become red, green and blue, or the first one grey.
    """
    save(map_figure(scene, bands, map_path), png)


def map_figure(scene: Path, bands: tuple[int, ...], map_path: Path) -> Figure:
    """The same as a matplotlib figure."""
    with rasterio.open(scene) as raster:
        picture = _read(raster, bands)
        height, width = raster.shape
        metres, pixel = _metres_across(raster), raster.transform.a
    with rasterio.open(map_path) as raster:
        names = raster.descriptions
        classes = raster.read(1, out_shape=_shape(raster.shape))
        unsure = np.zeros(classes.shape, bool)
        if names[-1] == "unsure":
            unsure = raster.read(raster.count, out_shape=classes.shape) == 1
        stride = raster.transform.a / pixel
        extent = (0, raster.width * stride, raster.height * stride, 0)
    labels = [name.removeprefix("p_") for name in names if name.startswith("p_")]
    # As wide as a page, and not much higher than wide.
    across = PAGE * min(1.0, _TALLEST * width / height)
    figure, axes = plt.subplots(figsize=(across, across * height / width), dpi=_DPI)
    axes.imshow(_stretched(picture), extent=(0, width, height, 0))
    axes.imshow(_overlay(classes, unsure, len(labels)), extent=extent, interpolation="nearest")
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    handles = [
        Patch(facecolor=np.divide(colour, 255), edgecolor="grey",
              label=f"{label} ({(classes == i).sum() / max(1, (classes != NODATA).sum()):.0%})")
        for i, (label, colour) in enumerate(zip(labels, class_colours(len(labels)), strict=True))
    ]  # fmt: skip
    if names[-1] == "unsure":
        share = unsure.sum() / max(1, (classes != NODATA).sum())
        handles.append(Patch(facecolor=_UNSURE, label=f"unsure ({share:.0%})"))
    _legend_below(axes, handles)
    _scale_bar(axes, metres)
    axes.annotate("N", (0.96, 0.97), (0.96, 0.87), "axes fraction", ha="center", va="bottom",
                  arrowprops={"arrowstyle": "-|>", "color": "white", "lw": 2},
                  color="white", weight="bold", path_effects=_OUTLINE)  # fmt: skip
    return figure


def judged_figure(
    scene: Scene, bands: tuple[int, ...], judged: gpd.GeoDataFrame, polygons: gpd.GeoDataFrame
) -> Figure:
    """A scene with what people drew on it, and below it where the map is right, wrong or unsure.

    Cells are of `ground_truth.judge_cells`, polygons in the scene's coordinates.
    """
    with rasterio.open(scene.path) as raster:
        picture = _stretched(_read(raster, bands))
        left, bottom, right, top = raster.bounds
    wide = scene.width >= scene.height
    size = (PAGE, (2.2 if wide else 0.55) * PAGE * scene.height / scene.width)
    grid = (2, 1) if wide else (1, 2)
    figure, axes = plt.subplots(*grid, figsize=size, dpi=_PAGE_DPI, layout="constrained")
    for axis in axes:
        axis.imshow(picture, extent=(left, right, bottom, top))
    polygons.boundary.plot(ax=axes[0], color="white", linewidth=0.7)
    axes[0].set_title("What people drew")
    states = np.where(~judged.sure, "unsure", np.where(judged.right, "right", "wrong"))
    for state, (colour, hatch) in _STATES.items():
        if (states == state).any():
            judged[states == state].plot(
                ax=axes[1], facecolor=(*colour, _OPACITY), edgecolor=(*colour, 1), hatch=hatch,
                linewidth=0.3,
            )  # fmt: skip
    handles = [
        Patch(facecolor=(*colour, _OPACITY), edgecolor=colour, hatch=hatch,
              label=f"{state} ({(states == state).sum()})")
        for state, (colour, hatch) in _STATES.items()
    ]  # fmt: skip
    for axis in axes:  # after geopandas, which writes the names of the coordinates there
        axis.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], xlabel="", ylabel="")
    axes[1].set_title("What the map says of cells whose ground is clear")
    _legend_below(axes[1], handles)
    return figure


def error_figure(
    scene: Scene, bands: tuple[int, ...], errors: gpd.GeoDataFrame, polygons: gpd.GeoDataFrame
) -> Figure:
    """The ground around wrong cells, with what people drew on it and the cell's window outlined.

    Cells are of `ground_truth.confident_errors`, polygons in the scene's coordinates.
    """
    across = min(5, len(errors))
    down = -(-len(errors) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(PAGE, 2.3 * down), squeeze=False, dpi=_PAGE_DPI, layout="constrained"
    )
    with rasterio.open(scene.path) as raster:
        for axis, (_, cell) in zip_longest(axes.flat, errors.iterrows(), fillvalue=(None, None)):
            axis.set_axis_off()
            if cell is None:
                continue
            west, south, east, north = cell.window.buffer((cell.window.length / 4) / 2).bounds
            area = from_bounds(west, south, east, north, raster.transform)
            axis.imshow(_stretched(_read(raster, bands, area)), extent=(west, east, south, north))
            polygons.boundary.plot(ax=axis, color="white", linewidth=0.8)
            gpd.GeoSeries([cell.window]).boundary.plot(ax=axis, color="yellow", linewidth=1.5)
            axis.set(xlim=(west, east), ylim=(south, north))
            axis.set_title(f"{cell['class']} {cell.p:.2f}\npeople: {cell.cover:.0%} covered",
                           fontsize=8)  # fmt: skip
    return figure


def _legend_below(axes: Axes, handles: list[Patch]) -> None:
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), frameon=False,
                ncols=min(4, len(handles)))  # fmt: skip


def _read(
    raster: rasterio.DatasetReader, bands: tuple[int, ...], window: Window | None = None
) -> np.ma.MaskedArray:
    """Three bands or one of a scene or a part of it, no larger than a page shows them."""
    shown = [band + 1 for band in (bands[:3] if len(bands) >= 3 else bands[:1])]
    if window is not None:
        return raster.read(shown, window=window, boundless=True, masked=True)
    return raster.read(shown, out_shape=_shape(raster.shape), masked=True)


def _shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Height and width of what is read for a page."""
    shrink = max(1, max(shape) / _PIXELS)
    return max(1, round(shape[0] / shrink)), max(1, round(shape[1] / shrink))


def _stretched(picture: np.ma.MaskedArray) -> np.ndarray:
    """Bands (1 or 3, H, W) as (H, W, 4) in 0..1; what has no data is transparent."""
    values = np.ma.masked_invalid(picture.astype(np.float32))
    if picture.dtype == np.uint8:
        low, high = 0, 255
    else:
        low, high = (
            np.array([np.percentile(band.compressed() if band.count() else [0], q)
                      for band in values])[:, None, None]
            for q in _STRETCH
        )  # fmt: skip
    values = (values - low) / np.maximum(high - low, 1e-6)
    seen = ~np.ma.getmaskarray(values).all(axis=0)
    colours = np.broadcast_to(values.filled(0).clip(0, 1), (3, *seen.shape))
    return np.concatenate([colours, seen[None]]).transpose(1, 2, 0)


def _overlay(classes: np.ndarray, unsure: np.ndarray, n_classes: int) -> np.ndarray:
    """Class numbers (H, W) as (H, W, 4): the first class is faint, unsure cells are dark."""
    colours = np.zeros((NODATA + 1, 4))
    colours[:n_classes, :3] = np.divide(class_colours(n_classes), 255)
    colours[:n_classes, 3] = _OPACITY
    colours[0, 3] = _OPACITY / 3
    overlay = colours[classes]
    overlay[unsure] = (*_UNSURE, _OPACITY)
    return overlay


def _metres_across(raster: rasterio.DatasetReader) -> float:
    """Width of a scene on the ground, in metres, along its middle row."""
    if not raster.crs.is_geographic:
        return raster.width * raster.transform.a * raster.crs.units_factor[1]
    left, right = (raster.transform @ (x, raster.height / 2) for x in (0, raster.width))
    return Geod(ellps="WGS84").inv(*left, *right)[2]


def _scale_bar(axes: Axes, metres: float) -> None:
    """Draw a bar of a round length, about a fifth of the picture."""
    power = 10 ** math.floor(math.log10(metres / 5))
    length = max(step * power for step in (1, 2, 5) if step * power <= metres / 5)
    left, right, y = 0.03, 0.03 + length / metres, 0.03
    text = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    axes.plot([left, right], [y, y], transform=axes.transAxes, color="white", lw=3,
              path_effects=_OUTLINE, solid_capstyle="butt")  # fmt: skip
    axes.text((left + right) / 2, y + 0.01, text, transform=axes.transAxes, ha="center",
              va="bottom", color="white", path_effects=_OUTLINE)  # fmt: skip
