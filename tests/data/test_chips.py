"""One chip: every file type in, every damaged one refused with the reason."""

import struct
import zlib

import numpy as np
import pytest
import rasterio
from PIL import Image

from helpers import InputError
from helpers.data.chips import read_chip, read_chip_and_missing
from tests.fake_data import make_chip, write_chip

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.mark.parametrize(
    ("name", "dtype", "bands"),
    [
        ("a.png", "uint8", 3),
        ("a.PNG", "uint8", 1),
        ("a.png", "uint8", 4),
        ("a.png", "uint16", 3),
        ("a.png", "uint16", 1),
        ("a.tif", "uint8", 3),
        ("a.tiff", "uint16", 13),
        ("a.tif", "int16", 2),
        ("a.tif", "float32", 5),
        ("a.tif", "float64", 1),
        ("a.npy", "uint8", 3),
        ("a.npy", "uint16", 7),
        ("a.npy", "float64", 2),
    ],
)
def test_lossless_files_give_back_what_was_written(tmp_path, name, dtype, bands):
    chip = make_chip(bands=bands, dtype=dtype)
    if dtype == "uint16":
        chip = chip * 257  # values that 8 bits cannot hold
    read = read_chip(write_chip(tmp_path / name, chip))
    assert read.dtype == ("uint8" if dtype == "uint8" else "float32")
    np.testing.assert_array_equal(read, chip.astype(read.dtype))
    assert [path.name for path in tmp_path.iterdir()] == [name]  # no side-car file


def test_jpeg_and_its_grey_form(tmp_path):
    chip = np.full((3, 16, 16), 100, np.uint8)
    assert read_chip(write_chip(tmp_path / "a.jpg", chip)).shape == (3, 16, 16)
    assert read_chip(write_chip(tmp_path / "b.jpeg", chip[:1])).tolist() == chip[:1].tolist()


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_palette_becomes_colour(tmp_path, name):
    image = Image.new("P", (4, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / name)
    chip = read_chip(tmp_path / name)
    assert chip[:, 0, 0].tolist() == [10, 20, 30] and chip.shape == (3, 2, 4)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_alpha_beside_grey_is_no_band(tmp_path, dtype):
    chip = make_chip(bands=2, dtype=dtype)
    if dtype == "uint8":
        Image.fromarray(chip.transpose(1, 2, 0), "LA").save(tmp_path / "a.png")
    else:
        write_chip(tmp_path / "a.png", chip)
    np.testing.assert_array_equal(read_chip(tmp_path / "a.png"), chip[:1])


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_orientation_is_honoured(tmp_path, name):
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (0, 0, 20, 20))  # white to the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: left is top
    image.save(tmp_path / name, exif=exif)
    chip = read_chip(tmp_path / name)
    assert chip.shape == (3, 40, 20)
    assert chip[:, :18].min() > 240
    assert chip[:, 22:].max() < 15


@pytest.mark.parametrize(
    ("dtype", "nodata"), [("int16", -9999), ("float32", np.nan), ("float32", -9999), ("uint8", 0)]
)
def test_pixels_without_data_get_the_mean_of_the_others(tmp_path, dtype, nodata):
    chip = make_chip(dtype=dtype).clip(1)
    chip[0, :5], chip[2, :, 7] = nodata, nodata
    read, missing = read_chip_and_missing(
        write_chip(tmp_path / "a.tif", chip, nodata=nodata), (2, 0)
    )
    expected = np.zeros((2, 28, 28), bool)
    expected[1, :5], expected[0, :, 7] = True, True
    np.testing.assert_array_equal(missing, expected)
    for band, values, gaps in zip((2, 0), read, expected, strict=True):
        np.testing.assert_array_equal(values[~gaps], chip[band][~gaps])
        mean = chip[band][~gaps].mean(dtype=np.float64)
        np.testing.assert_allclose(values[gaps], mean if dtype == "float32" else round(mean))


def test_a_mask_inside_the_file_marks_pixels_without_data(tmp_path):
    chip = make_chip()
    profile = {"driver": "GTiff", "count": 3, "width": 28, "height": 28, "dtype": "uint8"}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(tmp_path / "a.tif", "w", **profile) as raster,
    ):
        raster.write(chip)
        raster.write_mask(np.arange(28 * 28).reshape(28, 28) >= 28)
    read, missing = read_chip_and_missing(tmp_path / "a.tif")
    assert missing[:, 0].all()
    assert not missing[:, 1:].any()
    np.testing.assert_array_equal(read[:, 1:], chip[:, 1:])


def test_an_unused_band_may_be_without_data(tmp_path):
    chip = make_chip(bands=4, dtype="int16")
    chip[3] = -1
    path = write_chip(tmp_path / "a.tif", chip, nodata=-1)
    np.testing.assert_array_equal(read_chip(path, (0, 1)), chip[:2])
    with pytest.raises(InputError, match=r"a.tif: band 3 has no data \(all 784 pixels"):
        read_chip(path)


@pytest.mark.parametrize("layout", [{}, {"interleave": "band"}, {"tiled": True, "blockxsize": 16}])
def test_damage_inside_a_deflate_block_is_seen(tmp_path, layout):
    if "tiled" in layout:
        layout = layout | {"blockysize": 16}
    chip = make_chip(size=40)
    path = write_chip(tmp_path / "a.tif", chip, compress="deflate", **layout)
    np.testing.assert_array_equal(read_chip(path), chip)
    data = bytearray(path.read_bytes())
    damaged = 0
    for start in range(len(data) // 2, len(data) - 200, 101):
        path.write_bytes(bytes(data[:start]) + bytes(20) + bytes(data[start + 20 :]))
        with pytest.raises(InputError, match=r"a.tif: damaged, cut off"):
            read_chip(path)
        damaged += 1
    assert damaged > 5


def test_bands_are_picked_in_order(tmp_path):
    chip = make_chip(bands=6)
    path = write_chip(tmp_path / "a.npy", chip)
    np.testing.assert_array_equal(read_chip(path, (4, 0)), chip[[4, 0]])


def cut(suffix, keep, dtype="uint8"):
    """A real file of that type of which only a share is kept."""

    def write(path):
        whole = write_chip(path, make_chip(dtype=dtype)).read_bytes()
        path.write_bytes(whole[: int(len(whole) * keep)])

    return pytest.param(f"bad{suffix}", write, "damaged, cut off", id=f"{suffix} {dtype} {keep}")


def content(name, data, message):
    return pytest.param(name, lambda path: path.write_bytes(data), message, id=message)


def array(chip, message):
    return pytest.param("bad.npy", lambda path: np.save(path, chip), message, id=message)


def with_value(value, name):
    def write(path):
        chip = make_chip(dtype="float64")
        chip[1, 2, 3] = value
        write_chip(path, chip)

    return pytest.param(name, write, "holds NaN or infinite values", id=f"{value} {name}")


def png_claiming(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT"]
    sizes = [struct.pack(">I", len(chunk) - 4) for chunk in chunks]
    sums = [struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    parts = zip(sizes, chunks, sums, strict=True)
    return b"\x89PNG\r\n\x1a\n" + b"".join(b"".join(part) for part in parts)


def huge_tiff(path):
    profile = {"driver": "GTiff", "count": 1, "width": 20_000, "height": 20_000, "dtype": "uint8"}
    with rasterio.open(path, "w", sparse_ok=True, **profile):
        pass


UNREADABLE = [
    *(
        cut(suffix, keep)
        for suffix in (".jpg", ".png", ".tif", ".npy")
        for keep in (0.05, 0.5, 0.9)
    ),
    cut(".png", 0.5, "uint16"),
    content("bad.png", b"", "empty file"),
    content("bad.png", b"no picture", "damaged, cut off, or not a JPEG or PNG image"),
    content("bad.tif", b"no picture", "damaged, cut off, or not a TIFF image"),
    content("bad.npy", b"\x93NUMPY\x01\x00\x10\x00((((((((((((((\n\n", "not a .npy array"),
    content("bad.jpg", png_claiming(20_000, 20_000), "too large for a chip"),
    pytest.param("bad.tif", huge_tiff, "too large for a chip", id="huge TIFF"),
    array(np.array([[[{"a": 1}]]], dtype=object), r"not a .npy array .*never unpickled"),
    array(np.zeros((28, 28)), r"shape \(28, 28\) is not \(bands, height, width\)"),
    array(np.zeros((1, 3, 28, 28)), r"shape \(1, 3, 28, 28\) is not"),
    array(np.zeros((32, 32, 3)), r"\(32, 32, 3\) looks like \(height, width, bands\); bands come"),
    array(np.zeros((3, 0, 28)), r"shape \(3, 0, 28\) is not"),
    array(np.zeros((3, 28, 28), complex), "data type complex128 is not a real number"),
    with_value(np.nan, "bad.npy"),
    with_value(np.inf, "bad.npy"),
    with_value(1e300, "bad.npy"),
    with_value(np.nan, "bad.tif"),
]


@pytest.mark.parametrize(("name", "write", "message"), UNREADABLE)
def test_unreadable_files(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name}: .*{message}.*Replace or remove the file"):
        read_chip(tmp_path / name)
