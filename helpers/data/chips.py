"""Read one chip: JPEG, PNG, TIFF/GeoTIFF or `.npy` of shape (bands, height, width)."""

import io
import itertools
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG

import numpy as np
import rasterio
from affine import Affine
from PIL import Image, ImageOps
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Compression, Interleaving, MaskFlags
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window

from helpers import InputError

FORMATS = {
    **dict.fromkeys((".jpg", ".jpeg", ".png"), "JPEG or PNG image"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF image"),
    ".npy": ".npy array of numbers (objects are never unpickled)",
}
MAX_VALUES = 200_000_000  # of one TIFF; a small file can claim any size. Pillow has its own limit
_BEGINNINGS = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), ".tif"),
    b"\x93NUMPY": ".npy",
}
MOST_CHANNELS = 4  # a last axis of so few, after two of at least twice as many, holds the bands

# A chip cut out of a scene often carries no coordinates, and none are needed here.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)


class TooLargeError(InputError):
    """An image of more pixels than its reader takes."""


@dataclass(frozen=True)
class StoredChip:
    """A chip as its file has it: values (bands, height, width) in the file's own dtype.

    `missing` marks its pixels without data, a bool array of that shape, None where there are none;
    `transform` (pixels to ground) and `crs` are None unless a TIFF has both; `data` is the file.
    """

    values: np.ndarray
    data: bytes
    missing: np.ndarray | None = None
    transform: Affine | None = None
    crs: str | None = None


def read_chip(path: str | Path, bands: Sequence[int] | None = None) -> np.ndarray:
    """Read one chip as (bands, height, width), uint8, or float32 for every other stored type.

    Values are not scaled. `bands` picks and orders zero-based bands; None keeps all of them.
    A photograph is turned as its EXIF orientation says. Pixels without data (a GeoTIFF's nodata
    value or mask) get the mean of the other pixels of their band in this chip.
    Raises InputError when the file cannot be read whole, holds NaN or infinity, or lacks a band or
    all data of one.
    """
    return read_chip_and_missing(path, bands)[0]


def read_chip_and_missing(
    path: str | Path, bands: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """`read_chip`, and which values were filled in: bool of its shape, None for none of them."""
    remedy = "Replace or remove the file."
    try:
        stored = read_stored(Path(path))
        if bands is None:
            bands = range(len(stored.values))
        remedy = "Leave out the band or the file."
        chip = filled(stored, bands)
    except InputError as error:
        raise InputError(f"{path}: {error}. {remedy}") from error
    missing = None if stored.missing is None else stored.missing[list(bands)]
    return chip if chip.dtype == np.uint8 else chip.astype(np.float32), missing


def filled(stored: StoredChip, bands: Sequence[int]) -> np.ndarray:
    """The values of some bands, with missing pixels as the mean of the others of their band."""
    check_bands(bands, len(stored.values))
    chip = stored.values[list(bands)]
    if stored.missing is None:
        return chip
    for band, values, missing in zip(bands, chip, stored.missing[list(bands)], strict=True):
        if missing.all():
            raise InputError(f"band {band} has no data (all {missing.size} pixels are nodata)")
        mean = values[~missing].mean(dtype=np.float64)
        values[missing] = mean if chip.dtype.kind == "f" else np.rint(mean)
    return chip


def read_stored(path: Path) -> StoredChip:
    """Return what the file holds; InputError says why it cannot."""
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"file type '{suffix}' is not one of {', '.join(FORMATS)}")
    try:
        if not S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise InputError("is not a file")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be opened ({error.strerror})") from error
    return decode(data, suffix)


def suffix_of(data: bytes) -> str:
    """The suffix that a file of these bytes has; InputError if they begin like none we read."""
    for beginning, suffix in _BEGINNINGS.items():
        if data.startswith(beginning):
            return suffix
    if not data:
        raise InputError("empty (0 bytes)")
    raise InputError(f"is not one of {', '.join(dict.fromkeys(FORMATS.values()))}")


def decode(data: bytes, suffix: str, max_values: int | None = None) -> StoredChip:
    """Read what the bytes of a file hold, in the format of its suffix.

    Raises:
        TooLargeError: its header says more values (height x width x bands) than `max_values`, or
            than MAX_VALUES or Pillow take; nothing was decoded then.
        InputError: it cannot be read, and why.
    """
    if not data:
        raise InputError("empty file (0 bytes)")
    try:
        stored = _decode(data, suffix, max_values)
    except TooLargeError:
        raise
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"too large for a chip ({error})") from error
    except Exception as error:  # on damaged bytes the decoders raise errors of almost any type
        raise InputError(f"damaged, cut off, or not a {FORMATS[suffix]}") from error
    _check_values(stored)
    return stored


def _decode(data: bytes, suffix: str, max_values: int | None) -> StoredChip:
    if suffix == ".npy":
        # No larger than its bytes: a header that claims more is an error.
        return StoredChip(np.lib.format.read_array(io.BytesIO(data), allow_pickle=False), data)
    if suffix in (".tif", ".tiff"):
        return _decode_raster(data, "GTiff", max_values)
    if data.startswith(b"\x89PNG") and data[24:25] == b"\x10":
        # Pillow would cut 16-bit colour down to 8 bits
        return _decode_raster(data, "PNG", max_values)
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        _check_size(image.width * image.height * len(image.getbands()), max_values)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode not in ("L", "RGB", "RGBA"):  # grey with alpha, palette, 1 bit, CMYK
            image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
        return StoredChip(np.atleast_3d(np.array(image)).transpose(2, 0, 1), data)


def _check_size(values: int, max_values: int | None) -> None:
    if max_values is not None and values > max_values:
        raise TooLargeError(f"too large for a chip ({values:,} values)")


def _decode_raster(data: bytes, driver: str, max_values: int | None) -> StoredChip:
    """Read from memory with one named GDAL driver: no side-car files, no format guessing."""
    with rasterio.MemoryFile(data) as memory, memory.open(driver=driver) as raster:
        size = raster.width * raster.height * raster.count
        _check_size(size, MAX_VALUES if max_values is None else min(max_values, MAX_VALUES))
        area = Window(0, 0, raster.width, raster.height)
        check_deflate(raster, area, lambda n, offset: data[offset : offset + n])
        values, missing = raster.read(), None
        if any({MaskFlags.nodata, MaskFlags.per_dataset} & set(f) for f in raster.mask_flag_enums):
            missing = raster.read_masks() == 0
        if raster.colorinterp == (ColorInterp.gray, ColorInterp.alpha):
            values, missing = values[:1], None if missing is None else missing[:1]
        if raster.colorinterp == (ColorInterp.palette,):
            colours = np.zeros((1 << 16, 3), np.uint8)
            for index, colour in raster.colormap(1).items():
                colours[index] = colour[:3]
            values = colours[values[0]].transpose(2, 0, 1)
            missing = None if missing is None else np.repeat(missing, 3, axis=0)
        if missing is not None and not missing.any():
            missing = None
        if raster.crs is None or raster.transform.is_identity:
            return StoredChip(values, data, missing)
        return StoredChip(values, data, missing, raster.transform, _crs_name(raster.crs.wkt))


def check_deflate(
    raster: rasterio.DatasetReader, area: Window, read: Callable[[int, int], bytes]
) -> None:
    """Raise zlib.error if a stored block under `area` is damaged.

    GDAL stops reading a block before its checksum, and answers with what it has. `read` returns
    so many bytes of the file from an offset on. Files of another compression are not looked at.
    """
    if raster.compression != Compression.deflate:
        return
    bands = raster.indexes if raster.interleaving == Interleaving.band else (1,)
    (top, bottom), (left, right) = area.toranges()
    height, width = raster.block_shapes[0]
    rows = range(int(top) // height, -(-int(bottom) // height))
    columns = range(int(left) // width, -(-int(right) // width))
    for band, row, column in itertools.product(bands, rows, columns):
        offset, size = (
            raster.get_tag_item(f"BLOCK_{what}_{column}_{row}", "TIFF", band)
            for what in ("OFFSET", "SIZE")
        )
        if offset is not None:  # a block that was never written has none
            zlib.decompress(read(int(size), int(offset)))


@lru_cache
def _crs_name(wkt: str) -> str:
    """Short name of a coordinate system, as EPSG:32615, where it has one."""
    return CRS.from_wkt(wkt).to_string()


def _check_values(stored: StoredChip) -> None:
    chip = stored.values
    if chip.ndim != 3 or 0 in chip.shape:
        raise InputError(f"shape {chip.shape} is not (bands, height, width)")
    if chip.shape[2] <= MOST_CHANNELS and min(chip.shape[:2]) >= 2 * MOST_CHANNELS:
        raise InputError(f"shape {chip.shape} looks like (height, width, bands); bands come first")
    if chip.dtype.kind not in "buif":
        raise InputError(f"data type {chip.dtype} is not a real number")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite and is refused
        valid = chip if stored.missing is None else chip[~stored.missing]
        if chip.dtype.kind == "f" and not np.isfinite(valid.astype(np.float32)).all():
            raise InputError("holds NaN or infinite values")


def check_bands(bands: Sequence[int], n_bands: int) -> None:
    """Raise InputError for a zero-based band that a chip of n_bands does not have."""
    outside = [band for band in bands if band not in range(n_bands)]
    if outside:
        raise InputError(f"bands: {outside} out of range, a chip has bands 0 to {n_bands - 1}")
