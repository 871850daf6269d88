"""Files with what was said of a scene's cells: a raster, a table, and blocks on the way there."""

import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
import shapely
from affine import Affine
from rasterio.enums import ColorInterp
from rasterio.shutil import copy as copy_raster
from rasterio.windows import Window

from helpers import InputError
from helpers.data.scenes import Block, Grid, Scene
from helpers.records import write_json, written_whole

NODATA = 255  # in every band of a map; a class or a probability is never that high
PROBABILITY_STEP = 1 / 250  # of a stored probability: whole numbers, a round decimal, below NODATA
ROW_GROUP = 50_000  # cells that are written to the table at once

# Okabe and Ito's colours, which colour-blind people can tell apart; the first class is often
# the absence of the others, and pale.
_COLOURS = ((213, 213, 213), (213, 94, 0), (0, 114, 178), (0, 158, 115), (230, 159, 0),
            (86, 180, 233), (204, 121, 167), (240, 228, 66))  # fmt: skip


class BlockFiles:
    """What was said of each block, in a folder beside the output that is gone when all is done.

    A file's name is its block's place, so that writing it twice does no harm. Use as a context:
    a second process that writes the same output is refused.
    """

    def __init__(self, folder: Path, identity: dict):
        """Name the folder, and what decides its numbers: blocks of anything else are dropped."""
        self.folder, self.identity = folder, identity

    def __enter__(self) -> "BlockFiles":
        """Take the folder; raises InputError while another process holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise InputError(
                f"{self.folder}: another process is writing this output; wait for it"
            ) from None
        if not self.resumable:
            for stale in self.folder.glob("*.npy"):
                stale.unlink()
            write_json(self.folder / "identity.json", self.identity)
        return self

    @property
    def resumable(self) -> bool:
        """Whether blocks of these very numbers are there, or may have been."""
        try:
            return json.loads((self.folder / "identity.json").read_text()) == self.identity
        except (OSError, ValueError):
            return False

    def __exit__(self, *error) -> None:
        """Let the folder go."""
        self._lock.close()

    def save(self, block: Block, values: np.ndarray) -> None:
        """Write the values (rows, cols, n) of a block, float32."""
        with written_whole(self._file(block)) as part:
            np.save(part, values)

    def load(self, block: Block) -> np.ndarray | None:
        """Read what was saved of a block; None where there is nothing usable."""
        try:
            values = np.load(self._file(block), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return values if values.shape[:2] == (block.rows, block.cols) else None

    def remove(self) -> None:
        """Remove the folder and all in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, block: Block) -> Path:
        return self.folder / f"{block.row:06d}_{block.col:06d}.npy"


def class_colours(classes: int) -> list[tuple[int, int, int]]:
    """One colour (red, green, blue) a class; they begin again after the eighth."""
    return [_COLOURS[i % len(_COLOURS)] for i in range(classes)]


def write_map(
    path: Path,
    scene: Scene,
    grid: Grid,
    blocks: Iterable[tuple[Block, np.ndarray]],
    classes: Sequence[str],
    bands: Sequence[str],
    scratch: Path,
) -> None:
    """Write a Cloud Optimized GeoTIFF of one pixel a cell, whole or not at all.

    Args:
        path: ends in `.tif`. Beside it appears `.tif.aux.xml`, where GDAL keeps the colours and
            names of the classes, since a TIFF of several bands cannot hold a colour table.
        scene: gives coordinates.
        grid: of the cells.
        blocks: each block with its values (bands, rows, cols), uint8, NODATA where nothing is said.
        classes: names of the values of the first band.
        bands: names; those that begin with `p_` are probabilities in units of PROBABILITY_STEP.
        scratch: a folder on the same disk, for what GDAL needs on the way.
    """
    rows, cols = grid.shape
    profile = {"driver": "GTiff", "height": rows, "width": cols, "count": len(bands),
               "dtype": "uint8", "nodata": NODATA, "crs": scene.crs, "bigtiff": "if_safer",
               "transform": scene.transform @ Affine.scale(grid.stride)}  # fmt: skip
    plain, cog = scratch / "plain.tif", scratch / "cog.tif"
    with rasterio.open(plain, "w", **profile) as raster:
        for block, values in blocks:
            raster.write(values, window=Window(block.col, block.row, block.cols, block.rows))
        raster.descriptions = bands
        raster.scales = [PROBABILITY_STEP if name.startswith("p_") else 1 for name in bands]
        # All are plain numbers: GDAL would take three bands for a picture.
        raster.colorinterp = [ColorInterp.gray, *[ColorInterp.undefined] * (len(bands) - 1)]
    copy_raster(plain, cog, driver="COG", compress="deflate", blocksize=256,
                overview_resampling="nearest")  # fmt: skip
    with written_whole(path) as part:
        cog.replace(part)
    with written_whole(Path(f"{path}.aux.xml")) as part:
        part.write_bytes(_colour_table(classes))


def _colour_table(classes: Sequence[str]) -> bytes:
    """GDAL's own side-car format: colours and names of the values of the first band."""
    root = ElementTree.Element("PAMDataset")
    band = ElementTree.SubElement(root, "PAMRasterBand", band="1")
    ElementTree.SubElement(band, "ColorInterp").text = "Palette"
    table = ElementTree.SubElement(band, "ColorTable")
    names = ElementTree.SubElement(band, "CategoryNames")
    for name, colour in zip(classes, class_colours(len(classes)), strict=True):
        values = {f"c{i}": str(value) for i, value in enumerate((*colour, 255), start=1)}
        ElementTree.SubElement(table, "Entry", values)
        ElementTree.SubElement(names, "Category").text = name
    ElementTree.indent(root)
    return ElementTree.tostring(root)


def write_cells(
    path: Path, scene: Scene, grid: Grid, blocks: Iterable[tuple[Block, pd.DataFrame]]
) -> None:
    """Write a GeoParquet file of one row a cell, whole or not at all.

    geopandas writes this format too, but only from a table that fits in memory.

    Args:
        path: ends in `.parquet`.
        scene: gives coordinates.
        grid: of the cells, which are cropped to the scene.
        blocks: each block with one row a cell, row by row; gains `geometry`.
    """
    geometry = {"encoding": "WKB", "geometry_types": ["Polygon"],
                "crs": gpd.GeoSeries(crs=scene.crs.to_wkt()).crs.to_json_dict()}  # fmt: skip
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": geometry}}
    with written_whole(path) as part:
        writer = None
        for frame in _gathered(blocks, scene, grid):
            table = pa.Table.from_pandas(frame, preserve_index=False)
            table = table.replace_schema_metadata({"geo": json.dumps(geo)})
            writer = writer or pq.ParquetWriter(part, table.schema)
            writer.write_table(table)
        writer.close()


def _gathered(
    blocks: Iterable[tuple[Block, pd.DataFrame]], scene: Scene, grid: Grid
) -> Iterator[pd.DataFrame]:
    frames, rows = [], 0
    for block, frame in blocks:
        frames.append(frame.assign(geometry=shapely.to_wkb(cell_boxes(scene, grid, block))))
        rows += len(frame)
        if rows >= ROW_GROUP:
            yield pd.concat(frames)
            frames, rows = [], 0
    if frames:
        yield pd.concat(frames)


def cell_boxes(scene: Scene, grid: Grid, block: Block) -> np.ndarray:
    """The cells of a block as shapely boxes in the scene's coordinates, row by row."""
    row, col = (i.ravel() for i in np.indices((block.rows, block.cols)))
    return _boxes(
        scene, (block.row + row) * grid.stride, (block.col + col) * grid.stride, grid.stride
    )


def window_boxes(scene: Scene, grid: Grid, row: np.ndarray, col: np.ndarray) -> np.ndarray:
    """The windows of cells (n,), (n,) as shapely boxes, without what lies beyond the scene."""
    return _boxes(scene, row * grid.stride - grid.lead, col * grid.stride - grid.lead, grid.window)


def _boxes(scene: Scene, top: np.ndarray, left: np.ndarray, side: int) -> np.ndarray:
    """Squares of pixels, cropped to the scene, in its coordinates."""
    bottom, right = np.minimum(top + side, scene.height), np.minimum(left + side, scene.width)
    west, north = scene.transform @ (np.maximum(left, 0), np.maximum(top, 0))
    east, south = scene.transform @ (right, bottom)
    return shapely.box(west, south, east, north)
