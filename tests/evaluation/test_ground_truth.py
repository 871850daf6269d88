"""A map against polygons: cover of windows, judged cells, errors."""

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from affine import Affine

from helpers import InputError
from helpers.data.scenes import Grid, open_scene
from helpers.evaluation import ground_truth

CLASSES = ("no_tree", "tree")


@pytest.fixture
def scene(tmp_path):
    path = tmp_path / "scene.tif"
    with rasterio.open(
        path, "w", driver="GTiff", height=40, width=60, count=3, dtype="uint8",
        crs="EPSG:32612", transform=Affine(0.5, 0, 1000, 0, -0.5, 2000),
    ) as raster:  # fmt: skip
        raster.write(np.ones((3, 40, 60), np.uint8))
    return open_scene(path)


def pixel_box(left, top, right, bottom):
    """A box of pixels in the scene's coordinates."""
    return shapely.box(1000 + left / 2, 2000 - bottom / 2, 1000 + right / 2, 2000 - top / 2)


def polygons(*boxes, crs="EPSG:32612"):
    return gpd.GeoDataFrame(geometry=[pixel_box(*box) for box in boxes], crs=crs)


def test_window_cover_is_that_of_a_mask_of_pixels(scene):
    """Overlapping boxes count once; windows reach beyond their cells, and end at the scene."""
    grid = Grid(40, 60, window=20, stride=10)
    boxes = [(3, 4, 25, 17), (20, 10, 31, 22), (55, 30, 60, 40)]
    rows, cols = np.indices(grid.shape).reshape(2, -1)
    cells = pd.DataFrame({"row": rows, "col": cols})
    cover = ground_truth.window_cover(cells, scene, grid, polygons(*boxes))
    mask = np.zeros((40, 60))
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = 1
    for row, col, share in zip(rows, cols, cover, strict=True):
        top, left = row * 10 - 5, col * 10 - 5
        window = mask[max(top, 0) : top + 20, max(left, 0) : left + 20]
        assert share == pytest.approx(window.mean())
    assert 0 < cover.max() < 1 and cover.min() == 0


def judged():
    cells = pd.DataFrame(
        {
            "row": [0, 0, 1, 1, 2],
            "col": [0, 1, 0, 1, 0],
            "class": ["tree", "tree", "no_tree", None, "no_tree"],
            "answer": ["tree", "unsure", "no_tree", None, "no_tree"],
            "p_no_tree": [0.1, 0.45, 0.9, np.nan, 0.7],
            "p_tree": [0.9, 0.55, 0.1, np.nan, 0.3],
        }
    )
    cover = np.array([0.5, 0.01, 0.1, 0.9, 0.3])
    return ground_truth.judge_cells(cells, cover, CLASSES, (0.02, 0.25))


def test_only_cells_with_data_and_clear_ground_are_judged():
    table = judged()
    assert table.index.tolist() == [0, 1, 4]  # 2 lies between the bounds, 3 has no data
    assert table.truth.tolist() == ["tree", "no_tree", "tree"]
    assert table.right.tolist() == [True, False, False]
    assert table.sure.tolist() == [True, False, True]


def test_quality_of_sure_and_unsure_cells():
    table = ground_truth.map_quality(judged(), Grid(30, 20, 10, 10), "tree").set_index("shown")
    assert table.cells.to_dict() == {"all": 3, "sure": 2, "unsure": 1}
    assert table.accuracy.str.split().str[0].to_dict() == {
        "all": "0.333", "sure": "0.500", "unsure": "0.000"
    }  # fmt: skip
    assert table.recall["all"].startswith("0.500")


def test_confident_errors_come_first_and_do_not_overlap(scene):
    grid = Grid(40, 60, window=20, stride=10)
    table = judged()
    errors = ground_truth.confident_errors(table, scene, grid)
    assert errors.p.tolist() == [0.7, 0.55]
    near = table.assign(row=[0, 0, 0], col=[0, 1, 2])  # their windows overlap
    assert ground_truth.confident_errors(near, scene, grid).p.tolist() == [0.7]
    assert len(ground_truth.confident_errors(table, scene, grid, count=1)) == 1


def test_polygons_are_read_in_the_coordinates_of_the_scene(scene, tmp_path):
    path = tmp_path / "boxes.gpkg"
    polygons((0, 0, 10, 10)).to_crs("EPSG:4326").to_file(path)
    (read,) = ground_truth.read_polygons(path, scene).geometry
    assert read.equals_exact(pixel_box(0, 0, 10, 10), 0.01) or read.symmetric_difference(
        pixel_box(0, 0, 10, 10)
    ).area == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (polygons((0, 0, 1, 1), crs=None), "has no coordinate system"),
        (gpd.GeoDataFrame(geometry=[shapely.Point(0, 0)], crs="EPSG:4326"), "holds no polygon"),
    ],
)
def test_polygons_that_cannot_be_used(scene, tmp_path, frame, message):
    path = tmp_path / "boxes.parquet"
    frame.to_parquet(path)
    with pytest.raises(InputError, match=message):
        ground_truth.read_polygons(path, scene)


def test_a_file_that_is_no_vector_data(scene, tmp_path):
    (tmp_path / "boxes.parquet").write_text("no")
    with pytest.raises(InputError, match=r"boxes\.parquet cannot be read"):
        ground_truth.read_polygons(tmp_path / "boxes.parquet", scene)
