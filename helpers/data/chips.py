"""Read one chip: JPEG, PNG, TIFF/GeoTIFF or `.npy` of shape (bands, height, width)."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning

from helpers import InputError

FORMATS = {
    **dict.fromkeys((".jpg", ".jpeg", ".png"), "JPEG or PNG image"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF image"),
    ".npy": ".npy array of numbers (objects are never unpickled)",
}


MAX_VALUES = 200_000_000  # of one TIFF; a small file can claim any size. Pillow has its own limit


# A chip cut out of a scene often carries no coordinates, and none are needed here.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)


def read_chip(path: str | Path, bands: Sequence[int] | None = None) -> np.ndarray:
    """Read one chip as (bands, height, width), uint8, or float32 for every other stored type.

    Values are not scaled. `bands` picks and orders zero-based bands; None keeps all of them.
    Raises InputError when the file cannot be read whole, holds NaN or infinity, or lacks a band.
    """
    try:
        chip, _ = read_stored(Path(path))
    except InputError as error:
        raise InputError(f"{path}: {error}. Replace or remove the file.") from error
    if bands is not None:
        check_bands(bands, len(chip))
        chip = chip[list(bands)]
    return chip if chip.dtype == np.uint8 else chip.astype(np.float32)


def read_stored(path: Path) -> tuple[np.ndarray, bytes]:
    """Return the chip in the file's own dtype, and the file's bytes; InputError says why not."""
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"file type '{suffix}' is not one of {', '.join(FORMATS)}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be opened ({error.strerror})") from error
    if not data:
        raise InputError("empty file (0 bytes)")
    try:
        chip = _decode(data, suffix)
    except Image.DecompressionBombError as error:
        raise InputError(f"too large for a chip ({error})") from error
    except Exception as error:  # on damaged bytes the decoders raise errors of almost any type
        raise InputError(f"damaged, cut off, or not a {FORMATS[suffix]}") from error
    _check_values(chip)
    return chip, data


def _decode(data: bytes, suffix: str) -> np.ndarray:
    if suffix == ".npy":
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    if suffix in (".tif", ".tiff"):
        return _decode_raster(data, "GTiff")
    if data.startswith(b"\x89PNG") and data[24:25] == b"\x10":
        return _decode_raster(data, "PNG")  # Pillow would cut 16-bit colour down to 8 bits
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        if image.mode not in ("L", "LA", "RGB", "RGBA"):  # palette, 1 bit, CMYK
            image = image.convert("L" if image.mode == "1" else "RGB")
        return np.atleast_3d(np.array(image)).transpose(2, 0, 1)


def _decode_raster(data: bytes, driver: str) -> np.ndarray:
    """Read from memory with one named GDAL driver: no side-car files, no format guessing."""
    with rasterio.MemoryFile(data) as memory, memory.open(driver=driver) as raster:
        values = raster.width * raster.height * raster.count
        if values > MAX_VALUES:
            raise Image.DecompressionBombError(f"{values:,} values")
        return raster.read()


def _check_values(chip: np.ndarray) -> None:
    if chip.ndim != 3 or 0 in chip.shape:
        raise InputError(f"shape {chip.shape} is not (bands, height, width)")
    if chip.dtype.kind not in "buif":
        raise InputError(f"data type {chip.dtype} is not a real number")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite and is refused
        if chip.dtype.kind == "f" and not np.isfinite(chip.astype(np.float32)).all():
            raise InputError("holds NaN or infinite values")


def check_bands(bands: Sequence[int], n_bands: int) -> None:
    """Raise InputError for a zero-based band that a chip of n_bands does not have."""
    outside = [band for band in bands if band not in range(n_bands)]
    if outside:
        raise InputError(f"bands: {outside} out of range, a chip has bands 0 to {n_bands - 1}.")
