"""Windows of scenes of every size, and the files with what was said of their cells."""

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from rasterio.transform import from_origin
from rio_cogeo import cog_validate

from helpers import InputError
from helpers.data import cells, scenes
from helpers.data.cells import NODATA, BlockFiles, cell_boxes, write_cells, write_map
from helpers.data.chips import read_chip
from helpers.data.scenes import Block, Grid, open_raster, open_scene, read_windows
from tests.fake_data import make_chip, write_scene

# Height, width, window and stride: whole cells, edges, finer cells, odd leads, smaller than a
# window, a single pixel.
SHAPES = [
    (56, 84, 28, 28),
    (50, 71, 28, 28),
    (50, 71, 28, 9),
    (23, 40, 8, 5),
    (9, 5, 28, 28),
    (9, 5, 28, 7),
    (1, 1, 28, 28),
    (30, 30, 1, 1),
]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of at most a few cells, so that small scenes have many."""
    monkeypatch.setattr(scenes, "BLOCK_CELLS", 6)


def numbered(height, width, bands=3):
    """Every pixel another value, in float32 exactly."""
    return np.arange(bands * height * width, dtype=np.float32).reshape(bands, height, width)


@pytest.mark.parametrize("height, width, window, stride", SHAPES)
@pytest.mark.parametrize("most", [1, 6, 512])
def test_every_pixel_lies_in_exactly_one_cell_of_one_block(
    height, width, window, stride, most, monkeypatch
):
    monkeypatch.setattr(scenes, "BLOCK_CELLS", most)
    grid = Grid(height, width, window, stride)
    times = np.zeros((height, width), int)
    for block in grid.blocks(3):
        assert block.cells <= most
        for row in range(block.row, block.row + block.rows):
            for col in range(block.col, block.col + block.cols):
                area = times[row * stride : (row + 1) * stride, col * stride : (col + 1) * stride]
                assert area.size
                area += 1
    assert (times == 1).all()


@pytest.mark.parametrize("height, width, window, stride", SHAPES)
def test_windows_are_those_of_the_mirrored_scene(
    tmp_path, small_blocks, height, width, window, stride
):
    values = numbered(height, width)
    path = write_scene(tmp_path / "scene.tif", values)
    grid = Grid(height, width, window, stride)
    around = ((0, 0), (window, window), (window, window))
    mirrored = np.pad(values, around, mode="reflect")[[2, 0]]
    with open_raster(path) as raster:
        for block in grid.blocks(12):
            windows = read_windows(raster, grid, block, (2, 0))
            assert (windows.share == 1).all()
            chips = windows.chips(np.argwhere(windows.share > 0))
            chips = chips.reshape(windows.values.shape)
            for i, j in np.ndindex(block.rows, block.cols):
                top = (block.row + i) * stride - grid.lead + window
                left = (block.col + j) * stride - grid.lead + window
                expected = mirrored[:, top : top + window, left : left + window]
                np.testing.assert_array_equal(chips[i, j], expected)


def test_memory_of_a_block_is_bounded(monkeypatch):
    monkeypatch.setattr(scenes, "BLOCK_BYTES", 1_000_000)
    for window, stride in ((98, 98), (98, 14), (224, 100)):
        grid = Grid(40_000, 40_000, window, stride)
        block = max(grid.blocks(3), key=lambda block: block.cells)
        sides = [(n - 1) * stride + window for n in (block.rows, block.cols)]
        assert 3 * sides[0] * sides[1] <= 1_000_000
        assert block.cells <= scenes.BLOCK_CELLS


@pytest.mark.parametrize("dtype, nodata", [("uint8", 0), ("float32", -9999), ("float32", np.nan)])
def test_pixels_without_data(tmp_path, dtype, nodata):
    values = np.random.default_rng(0).integers(1, 200, (3, 20, 30)).astype(dtype)
    values[:, :, :14] = nodata  # the first cell and four of ten columns of the second
    values[0, 3, 25:29] = nodata  # one band is enough
    path = write_scene(tmp_path / "scene.tif", values, nodata=nodata)
    with open_raster(path) as raster:
        windows = read_windows(raster, Grid(20, 30, 10, 10), Block(0, 0, 2, 3), (0, 1, 2))
    np.testing.assert_allclose(windows.share, [[0, 0.6, 0.96], [0, 0.6, 1]])
    chips = windows.chips(np.array([[1, 1], [0, 2]]))
    for chip, (top, left) in zip(chips, [(10, 10), (0, 20)], strict=True):
        area = values[:, top : top + 10, left : left + 10]
        write_scene(tmp_path / "chip.tif", area, nodata=nodata)
        np.testing.assert_array_equal(chip, read_chip(tmp_path / "chip.tif"))


def test_a_cell_without_data_has_none_whatever_its_window_sees(tmp_path):
    values = np.full((1, 30, 30), 7, "uint8")
    values[:, 10:20, 10:20] = 0
    path = write_scene(tmp_path / "scene.tif", values, nodata=0)
    with open_raster(path) as raster:
        share = read_windows(raster, Grid(30, 30, 30, 10), Block(0, 0, 3, 3), (0,)).share
    assert share[1, 1] == 0
    assert share[0, 0] > 0.5


def test_infinite_values_are_no_data(tmp_path):
    values = np.full((1, 4, 4), np.inf, "float32")
    path = write_scene(tmp_path / "scene.tif", values)
    with open_raster(path) as raster:
        assert read_windows(raster, Grid(4, 4, 4, 4), Block(0, 0, 1, 1), (0,)).share == 0


def test_zeroes_inside_a_stored_block_are_found(tmp_path):
    """GDAL reads on past them; only the windows over that block are refused."""
    path = write_scene(tmp_path / "scene.tif", make_chip(size=256))
    with open_raster(path) as raster:
        places = {what: int(raster.get_tag_item(f"BLOCK_{what}_1_2", "TIFF", 1))
                  for what in ("OFFSET", "SIZE")}  # fmt: skip
    content = bytearray(path.read_bytes())
    middle = places["OFFSET"] + places["SIZE"] // 2
    content[middle : middle + 10] = bytes(10)
    path.write_bytes(content)
    grid, bands = Grid(256, 256, 64, 64), (0, 1, 2)
    with open_raster(path) as raster:
        for row, col in np.ndindex(4, 4):
            if (row, col) != (2, 1):
                read_windows(raster, grid, Block(row, col, 1, 1), bands)
        with pytest.raises(InputError, match="damaged or cut off in rows 128 to 191"):
            read_windows(raster, grid, Block(2, 1, 1, 1), bands)


def test_alpha_is_no_band_and_transparent_is_no_data(tmp_path):
    values = np.full((4, 8, 8), 255, "uint8")
    values[3, :, :4] = 0
    path = write_scene(tmp_path / "scene.tif", values, photometric="RGB", alpha="yes")
    assert open_scene(path).bands == 3
    with open_raster(path) as raster:
        windows = read_windows(raster, Grid(8, 8, 4, 4), Block(0, 0, 2, 2), (0, 1, 2))
    assert windows.share.tolist() == [[0, 1], [0, 1]]


def test_metres_per_pixel(tmp_path):
    def metres(crs):
        path = write_scene(tmp_path / "scene.tif", np.ones((1, 4, 4), "uint8"), crs=crs)
        return open_scene(path).metres_per_pixel

    assert metres("EPSG:32615") == pytest.approx(0.5)
    assert metres("EPSG:2277") == pytest.approx(0.5 * 1200 / 3937)  # US survey feet
    assert metres("EPSG:4326") is None


@pytest.mark.parametrize("window, stride", [(0, 1), (8, 0), (8, 9), (8, -1)])
def test_windows_and_strides_that_leave_ground_unseen_are_refused(window, stride):
    with pytest.raises(InputError, match=r"^(window|stride): "):
        Grid(10, 10, window, stride)


# ------------------------------------------------------------------------------ maps and tables


@pytest.fixture
def said(tmp_path, small_blocks):
    """A scene of 50 x 71 pixels, its grid, and the files with each cell's number in them."""
    scene = open_scene(write_scene(tmp_path / "scene.tif", numbered(50, 71)))
    grid = Grid(50, 71, 10, 7)
    rows, cols = grid.shape
    numbers = np.arange(rows * cols).reshape(rows, cols)

    def of(block):
        return numbers[block.row : block.row + block.rows, block.col : block.col + block.cols]

    blocks = grid.blocks(12)
    assert len(blocks) > 5
    planes = ((b, np.stack([of(b) % 3, of(b), of(b)]).astype("uint8")) for b in blocks)
    tables = ((b, pd.DataFrame({"number": of(b).ravel()})) for b in blocks)
    bands = ["class", "p_a", "unsure"]
    write_map(tmp_path / "map.tif", scene, grid, planes, ["a", "b", "c"], bands, tmp_path)
    write_cells(tmp_path / "map.parquet", scene, grid, tables)
    return scene, grid, numbers


def test_map(said, tmp_path):
    scene, _, numbers = said
    assert cog_validate(tmp_path / "map.tif", strict=True) == (True, [], [])
    with rasterio.open(tmp_path / "map.tif") as raster:
        np.testing.assert_array_equal(raster.read(2), numbers)
        np.testing.assert_array_equal(raster.read(1), numbers % 3)
        assert raster.crs == scene.crs and raster.nodata == NODATA
        assert raster.transform @ (3, 2) == scene.transform @ (21, 14)
        assert raster.descriptions == ("class", "p_a", "unsure")
        assert raster.scales == (1, cells.PROBABILITY_STEP, 1)
        colours = raster.colormap(1)
        assert [colours[i][:3] for i in range(3)] == cells.class_colours(3)
    assert {path.name for path in tmp_path.iterdir()} == {
        "scene.tif", "map.tif", "map.tif.aux.xml", "map.parquet", "plain.tif"
    }  # fmt: skip


def test_a_large_map_has_overviews(tmp_path):
    scene = open_scene(write_scene(tmp_path / "scene.tif", np.ones((1, 600, 520), "uint8")))
    grid = Grid(600, 520, 1, 1)
    planes = ((b, np.ones((1, b.rows, b.cols), "uint8")) for b in grid.blocks(1))
    write_map(tmp_path / "map.tif", scene, grid, planes, ["a", "b"], ["class"], tmp_path)
    assert cog_validate(tmp_path / "map.tif", strict=True) == (True, [], [])
    with rasterio.open(tmp_path / "map.tif") as raster:
        assert raster.overviews(1) == [2, 4]
        assert (raster.read(1, out_shape=(150, 130)) == 1).all()


def test_cells_tile_the_scene(said, tmp_path):
    scene, _, numbers = said
    table = gpd.read_parquet(tmp_path / "map.parquet")
    assert table.crs == scene.crs.to_wkt()
    assert sorted(table["number"]) == sorted(numbers.ravel())
    left, top = scene.transform @ (0, 0)
    right, bottom = scene.transform @ (scene.width, scene.height)
    whole = shapely.box(left, bottom, right, top)
    assert table.area.sum() == pytest.approx(whole.area)
    assert table.union_all().equals(whole)
    cell = table.set_index("number").geometry[numbers[2, 3]]
    left, top = scene.transform @ (21, 14)
    right, bottom = scene.transform @ (28, 21)
    assert cell.equals(shapely.box(left, bottom, right, top))


def test_cells_in_several_row_groups_are_the_same(said, tmp_path, monkeypatch):
    scene, grid, _ = said
    monkeypatch.setattr(cells, "ROW_GROUP", 10)
    tables = ((b, pd.DataFrame({"number": np.arange(b.cells)})) for b in grid.blocks(12))
    write_cells(tmp_path / "again.parquet", scene, grid, tables)
    again = gpd.read_parquet(tmp_path / "again.parquet")
    boxes = np.concatenate([cell_boxes(scene, grid, b) for b in grid.blocks(12)])
    assert (again.geometry.to_numpy() == boxes).all()


# -------------------------------------------------------------------------------------- blocks


def test_blocks_of_other_numbers_are_dropped(tmp_path):
    block, values = Block(3, 0, 1, 2), np.ones((1, 2, 3), np.float32)
    with BlockFiles(tmp_path / "blocks", {"model": "a"}) as store:
        assert store.load(block) is None
        store.save(block, values)
    with BlockFiles(tmp_path / "blocks", {"model": "a"}) as store:
        np.testing.assert_array_equal(store.load(block), values)
        assert store.load(Block(3, 0, 2, 2)) is None  # another cut of the scene
    with BlockFiles(tmp_path / "blocks", {"model": "b"}) as store:
        assert store.load(block) is None
        store.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"no array"])
def test_a_damaged_block_is_not_used(tmp_path, content):
    block = Block(0, 0, 1, 2)
    with BlockFiles(tmp_path / "blocks", {}) as store:
        store.save(block, np.ones((1, 2, 3), np.float32))
        next(store.folder.glob("*.npy")).write_bytes(content)
        assert store.load(block) is None


def test_two_processes_do_not_write_one_output(tmp_path):
    with (
        BlockFiles(tmp_path / "blocks", {}),
        pytest.raises(InputError, match="another process"),
        BlockFiles(tmp_path / "blocks", {}),
    ):
        pass


def test_transform_of_other_pixels(tmp_path):
    transform = from_origin(100, 200, 2, 3)
    path = write_scene(tmp_path / "scene.tif", np.ones((1, 4, 4), "uint8"), transform=transform)
    box = cell_boxes(open_scene(path), Grid(4, 4, 2, 2), Block(1, 1, 1, 1))[0]
    assert box.bounds == (104, 188, 108, 194)
