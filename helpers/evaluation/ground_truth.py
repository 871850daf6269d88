"""A map against what people drew on the same ground."""

from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely

from helpers import InputError
from helpers.data.cells import window_boxes
from helpers.data.scenes import Grid, Scene
from helpers.evaluation.calibration import UNSURE
from helpers.metrics import evaluate, with_interval

PLACE = 4  # windows along one side of a place: cells nearer to each other are not independent


def read_polygons(path: str | Path, scene: Scene) -> gpd.GeoDataFrame:
    """Read a vector file (GeoParquet, GeoPackage, GeoJSON, shapefile) in a scene's coordinates.

    Raises:
        InputError: it cannot be read, has no polygon or no coordinate system.
    """
    path = Path(path)
    try:
        read = gpd.read_parquet if path.suffix.lower() == ".parquet" else gpd.read_file
        polygons = read(path)
    except Exception as error:  # each driver has exceptions of its own
        raise InputError(f"reference_path: {path} cannot be read ({error})") from error
    polygons = polygons[polygons.geom_type.isin(["Polygon", "MultiPolygon"])]
    if polygons.empty or polygons.crs is None:
        what = "holds no polygon" if polygons.empty else "has no coordinate system"
        raise InputError(f"reference_path: {path} {what}; give polygons of the positive class")
    return polygons.to_crs(scene.crs.to_wkt())


def window_cover(
    cells: pd.DataFrame, scene: Scene, grid: Grid, polygons: gpd.GeoDataFrame
) -> np.ndarray:
    """Share of each cell's window that lies below any of the polygons, (cells,) float64, 0 to 1.

    Cells have `row` and `col`, polygons the scene's coordinates.
    """
    windows = window_boxes(scene, grid, cells.row.to_numpy(), cells.col.to_numpy())
    parts = shapely.get_parts(shapely.union_all(polygons.geometry.to_numpy()))
    window, part = shapely.STRtree(parts).query(windows, predicate="intersects")
    areas = shapely.area(shapely.intersection(windows[window], parts[part]))
    return np.bincount(window, areas, minlength=len(cells)) / shapely.area(windows)


def judge_cells(
    cells: pd.DataFrame, cover: np.ndarray, classes: tuple[str, str], bounds: tuple[float, float]
) -> pd.DataFrame:
    """The cells whose ground says one class clearly, with what it says.

    Args:
        cells: of a map, with `row, col, class, answer` and the probabilities.
        cover: of `window_cover`.
        classes: the negative class, then the one that the polygons show.
        bounds: a cover up to the first is the negative class, one from the second the positive.

    Returns:
        Those cells with `truth`, `cover`, `right` and `sure` (bool); cells without data and cells
        between the bounds are left out.
    """
    truth = np.select([cover <= bounds[0], cover >= bounds[1]], classes, "")
    judged = cells.assign(truth=truth, cover=cover)
    judged = judged[(truth != "") & cells["class"].notna().to_numpy()]
    return judged.assign(
        right=(judged["class"] == judged.truth).to_numpy(bool),
        sure=(judged.answer != UNSURE).to_numpy(bool),
    )


def map_quality(judged: pd.DataFrame, grid: Grid, positive: str) -> pd.DataFrame:
    """Accuracy, precision and recall of a map, of its sure cells and of its unsure ones.

    Returns:
        One row for `all`, `sure` and `unsure` cells (those that exist): `shown`, `cells` (their
        number), and each metric with its interval in words, 95 %, drawing whole places of PLACE
        windows a side.
    """
    side = PLACE * grid.window // grid.stride
    place = judged.row // side * (grid.shape[1] // side + 1) + judged.col // side
    rows = []
    for name, shown in {
        "all": judged.sure | True, "sure": judged.sure, "unsure": ~judged.sure
    }.items():  # fmt: skip
        if shown.any():
            part = judged[shown]
            said = (part["class"] == positive).to_numpy(float)
            table = evaluate(
                (part.truth == positive).to_numpy(int),
                np.stack([1 - said, said], axis=1),  # decisions: the threshold is in them
                groups=place[shown].astype(str).to_numpy(),
            )
            table = table.assign(low=table.group_low, high=table.group_high)
            rows.append(
                {"shown": name, "cells": len(part)}
                | {m: with_interval(table.loc[m]) for m in ("accuracy", "precision", "recall")}
            )
    return pd.DataFrame(rows)


def confident_errors(
    judged: pd.DataFrame, scene: Scene, grid: Grid, count: int = 10
) -> pd.DataFrame:
    """The wrong cells with the highest probability of what is wrong; overlapping windows once.

    Returns:
        At most `count` rows of `judged`, with the probability as `p` and the `window` as a box.
    """
    wrong = judged[~judged.right]
    wrong = wrong.assign(
        p=[row[f"p_{row['class']}"] for _, row in wrong.iterrows()],
        window=window_boxes(scene, grid, wrong.row.to_numpy(), wrong.col.to_numpy()),
    ).sort_values("p", ascending=False, kind="stable")
    shown = []
    for position, window in enumerate(wrong.window):
        if len(shown) < count and not any(window.overlaps(wrong.window.iloc[i]) for i in shown):
            shown.append(position)
    return wrong.iloc[shown]
