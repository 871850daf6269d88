"""Windows of a raster of any size.

A scene is divided into square cells of `stride` pixels from its upper left corner, so that every
pixel lies in exactly one. A cell is spoken for by a window of `window` pixels around its middle;
where a window reaches beyond the scene, the scene is mirrored there. Windows are read a block of
cells at a time, so that memory does not grow with the scene.
"""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from numpy.lib.stride_tricks import sliding_window_view
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.windows import Window

from helpers import InputError
from helpers.data.chips import check_deflate

SUFFIXES = (".tif", ".tiff", ".vrt")
CACHE_BYTES = 128 * 2**20  # of GDAL: two rows of 512-pixel tiles, 40,000 pixels wide, 8-bit RGB
BLOCK_BYTES = 32 * 2**20  # of pixels that are cut into windows at once
BLOCK_CELLS = 512  # a killed run loses the work on one block: seconds to minutes


@dataclass(frozen=True)
class Scene:
    """A georeferenced raster, north up; nothing but its header has been read."""

    path: Path  # GeoTIFF, COG or VRT
    height: int  # pixels
    width: int
    bands: int  # how many, without an alpha band
    alpha: bool  # whether there is one besides
    dtype: str  # of all bands
    crs: CRS
    transform: Affine  # from (column, row) to coordinates

    @property
    def metres_per_pixel(self) -> float | None:
        """Width of a pixel on the ground; None where coordinates are angles."""
        if self.crs.is_geographic:
            return None
        return self.transform.a * self.crs.units_factor[1]


def open_raster(path: str | Path) -> rasterio.DatasetReader:
    """Open a GeoTIFF, COG or VRT; InputError says why not."""
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file. Give a GeoTIFF, COG or VRT.")
        if not path.stat().st_size:
            raise InputError(f"{path}: empty file (0 bytes). Replace it.")
        return rasterio.open(path, driver="VRT" if path.suffix.lower() == ".vrt" else "GTiff")
    except (RasterioError, OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: damaged, or not a GeoTIFF, COG or VRT ({error}). Replace it."
        ) from error


def open_scene(path: str | Path) -> Scene:
    """Read the header of a scene.

    Raises:
        InputError: it cannot be opened, has no coordinates, is rotated or south-up, or its bands
            are of several or of unusable types.
    """
    with open_raster(path) as raster:
        problem = None
        if raster.crs is None or raster.transform.is_identity:
            problem = "has no coordinate system; assign it with gdal_edit.py -a_srs and -a_ullr"
        elif raster.transform.b or raster.transform.d:
            problem = "is rotated; straighten it with gdalwarp"
        elif raster.transform.e >= 0 or raster.transform.a <= 0:
            problem = "is not north up; turn it with gdalwarp"
        elif len(set(raster.dtypes)) > 1 or np.dtype(raster.dtypes[0]).kind not in "buif":
            problem = f"has bands of type {', '.join(sorted(set(raster.dtypes)))}; convert them"
        if problem:
            raise InputError(f"{path}: {problem}.")
        alpha = raster.colorinterp[-1] == ColorInterp.alpha
        return Scene(
            Path(path),
            raster.height,
            raster.width,
            raster.count - alpha,
            alpha,
            raster.dtypes[0],
            raster.crs,
            raster.transform,
        )


@dataclass(frozen=True)
class Block:
    """Cells that are read and answered together: first row and column, and how many of each."""

    row: int
    col: int
    rows: int
    cols: int

    @property
    def cells(self) -> int:
        """How many."""
        return self.rows * self.cols


@dataclass(frozen=True)
class Grid:
    """The cells of a scene and the windows that speak for them, all in pixels.

    Raises:
        InputError: a window below one pixel, or a stride that is not from 1 to the window.
    """

    height: int
    width: int
    window: int
    stride: int

    def __post_init__(self):
        """Refuse windows and strides that would leave pixels unseen."""
        if self.window < 1:
            raise InputError(f"window: {self.window} is below 1 pixel")
        if self.stride not in range(1, self.window + 1):
            raise InputError(
                f"stride: {self.stride} is not from 1 to the window of {self.window} pixels; "
                "a larger stride would leave ground unseen"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of cells; the last ones may reach beyond the scene."""
        return -(-self.height // self.stride), -(-self.width // self.stride)

    @property
    def lead(self) -> int:
        """By how much a window begins before its cell."""
        return (self.window - self.stride) // 2

    def blocks(self, pixel_bytes: int) -> list[Block]:
        """All cells in blocks of whole rows, or of parts of one, from the upper left."""
        rows, cols = self.shape
        wide = self._fitting(BLOCK_BYTES // (pixel_bytes * self.window), min(cols, BLOCK_CELLS))
        extent = (wide - 1) * self.stride + self.window
        most = BLOCK_CELLS // wide if wide == cols else 1
        high = self._fitting(BLOCK_BYTES // (pixel_bytes * extent), min(rows, most))
        return [
            Block(row, col, min(high, rows - row), min(wide, cols - col))
            for row in range(0, rows, high)
            for col in range(0, cols, wide)
        ]

    def _fitting(self, pixels: int, most: int) -> int:
        """How many windows beside each other fit into so many pixels: at least one."""
        return min(max(1, (pixels - self.window) // self.stride + 1), most)


@dataclass(frozen=True)
class Windows:
    """The windows of a block's cells.

    Args:
        values: (rows, cols, bands, window, window) in the scene's dtype, a view.
        missing: which of them have no data, bool of that shape, a view; None for none of them.
        share: (rows, cols) float32, the share of each cell and of its window that has data: the
            smaller of the two, counting pixels with data in every band.
    """

    values: np.ndarray
    missing: np.ndarray | None
    share: np.ndarray

    def chips(self, cells: np.ndarray) -> np.ndarray:
        """Some windows as chips are read: uint8 or float32, pixels without data filled in.

        They get the mean of the others of their band in this window. `cells` (n, 2) are rows and
        columns in the block, each with a share above zero; returns (n, bands, window, window).
        """
        chips = self.values[cells[:, 0], cells[:, 1]]
        if self.missing is not None:
            gaps = self.missing[cells[:, 0], cells[:, 1]]
            where = {"axis": (2, 3), "keepdims": True, "where": ~gaps, "dtype": np.float64}
            means = chips.mean(**where)
            if chips.dtype.kind != "f":
                means = np.rint(means)
            chips = np.where(gaps, means.astype(chips.dtype), chips)
        return chips if chips.dtype == np.uint8 else chips.astype(np.float32)


def read_windows(
    raster: rasterio.DatasetReader, grid: Grid, block: Block, bands: Sequence[int]
) -> Windows:
    """Read the windows of a block's cells: `bands` are zero-based, in order.

    Raises:
        InputError: the file is damaged there.
    """
    rows = _mirrored(block.row, block.rows, grid, grid.height)
    cols = _mirrored(block.col, block.cols, grid, grid.width)
    indexes = [band + 1 for band in bands]
    top, left = rows.min(), cols.min()
    area = Window.from_slices((top, rows.max() + 1), (left, cols.max() + 1))
    try:
        if raster.driver == "GTiff":
            with open(raster.name, "rb") as file:
                check_deflate(raster, area, partial(os.pread, file.fileno()))
        pixels = raster.read(indexes, window=area)
        missing = raster.read_masks(indexes, window=area) == 0
    except (RasterioError, zlib.error) as error:
        raise InputError(
            f"{raster.name}: damaged or cut off in rows {top} to {rows.max()} ({error}). "
            "Replace it."
        ) from error
    if pixels.dtype.kind == "f":
        missing |= ~np.isfinite(pixels)
    around = (slice(None), *np.ix_(rows - top, cols - left))
    values = _cut(pixels[around], grid)
    if not missing.any():
        return Windows(values, None, np.ones((block.rows, block.cols), np.float32))
    gaps = _cut(missing[around], grid)
    seen = ~gaps.any(axis=2)
    cell = slice(grid.lead, grid.lead + grid.stride)
    share = np.minimum(seen.mean((2, 3)), seen[..., cell, cell].mean((2, 3)))
    return Windows(values, gaps, share.astype(np.float32))


def _cut(pixels: np.ndarray, grid: Grid) -> np.ndarray:
    """Windows of pixels (bands, H, W), one every stride: (rows, cols, bands, window, window)."""
    windows = sliding_window_view(pixels, (grid.window, grid.window), axis=(1, 2))
    return windows[:, :: grid.stride, :: grid.stride].transpose(1, 2, 0, 3, 4)


def _mirrored(first: int, count: int, grid: Grid, size: int) -> np.ndarray:
    """The rows (or columns) that the windows of `count` cells see, mirrored at the scene's edges.

    From the scene and not from what was read of it, so that no answer depends on the blocks.
    """
    start = first * grid.stride - grid.lead
    wanted = np.arange(start, start + (count - 1) * grid.stride + grid.window)
    period = max(1, 2 * (size - 1))
    return np.minimum(wanted % period, period - wanted % period)
