"""The embedded example: what is committed, and the script that cuts it."""

import csv
import hashlib
import io
import shutil
import zipfile
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from PIL import Image

from example import build_example
from helpers import InputError
from helpers.data import example

EXAMPLE = Path(__file__).parents[2] / "example"


@pytest.fixture(scope="module")
def rows():
    with open(EXAMPLE / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_chips_are_those_of_the_manifest(rows):
    with zipfile.ZipFile(EXAMPLE / "chips.zip") as archive:
        chips = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
    for row in rows:
        data = chips[row["img_path"]]
        assert hashlib.sha256(data).hexdigest() == row["sha256"], row["img_path"]
        image = Image.open(io.BytesIO(data))
        assert image.size == (98, 98) and image.mode == "RGB"
        assert Path(row["img_path"]).parent.name == row["label"]
    assert (EXAMPLE / "chips.zip").stat().st_size <= 6_000_000
    assert list(chips) == [row["img_path"] for row in rows]
    assert len({row["sha256"] for row in rows}) == len(rows)


def test_splits_keep_blocks_whole_and_hold_both_classes(rows):
    splits_of_block = {}
    for row in rows:
        splits_of_block.setdefault(row["group"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in splits_of_block.values())
    assert {(row["split"], row["label"]) for row in rows} == {
        (split, label) for split in ("train", "valid", "test") for label in ("tree", "no_tree")
    }
    assert sum(row["split"] == "test" for row in rows) >= 150


def test_card_shows_the_counts_of_the_manifest(rows):
    assert build_example.summary_table(rows) in (EXAMPLE / "CARD.md").read_text()


VOC = "<annotation>{}</annotation>"
BOX = (
    "<object><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def test_crown_mask_is_the_union_of_boxes():
    xml = VOC.format(BOX.format(1, 2, 5, 4) + BOX.format(3, 2, 9, 4)).encode()
    mask = build_example.crown_mask(
        build_example.crown_boxes(xml), 6, 8
    )  # the second box ends outside the scene
    expected = np.zeros((6, 8), dtype=bool)
    expected[2:4, 1:8] = True
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    ("covered", "label"),
    [(0, "no_tree"), (2, "no_tree"), (3, None), (24, None), (25, "tree"), (100, "tree")],
)
def test_label_follows_the_share_under_crowns(covered, label):
    crowns = np.zeros((10, 10), dtype=bool)
    crowns.flat[:covered] = True
    assert build_example.chip_label(np.full((10, 10, 3), 80, np.uint8), crowns) == label


def test_chip_on_the_black_border_is_dropped():
    pixels, crowns = np.full((10, 10, 3), 80, np.uint8), np.ones((10, 10), dtype=bool)
    pixels[0, :1] = 0
    assert build_example.chip_label(pixels, crowns) == "tree"
    pixels[0, :2] = 0
    assert build_example.chip_label(pixels, crowns) is None


def test_bands_of_a_scene_share_no_ground():
    rng = np.random.default_rng(0)
    scene = rng.integers(1, 255, (98 * 10 + 30, 98 * 9 + 5, 3), dtype=np.uint8)
    crowns = np.zeros(scene.shape[:2], dtype=bool)
    crowns[:, : 98 * 4] = True
    rows = [row for row, _ in build_example.cut_scene("S", scene, crowns)]
    assert [row["split"] for row in rows[::9]] == ["train"] * 5 + ["valid"] * 2 + ["test"] * 3
    assert sum(row["label"] == "tree" for row in rows) == 40
    # 3 blocks side by side; the bands cut the grid of 4 rows at rows 5 and 7.
    assert len({row["group"] for row in rows}) == 3 * (2 + 1 + 2)
    groups = {row["group"] for row in rows if row["img_path"].endswith("S_05_04.jpg")}
    assert groups == {"S_valid_1_1"}


def test_training_ground_is_the_training_band():
    scene = np.indices((98 * 10 + 30, 98)).transpose(1, 2, 0).astype(np.uint8)
    ground = build_example.training_ground(np.dstack([scene, scene[..., :1]]))
    assert ground.shape == (98 * 5, 98, 3)
    np.testing.assert_array_equal(ground[..., :2], scene[: 98 * 5])


@pytest.fixture
def tiny_wheel(tmp_path):
    """A wheel with four small random scenes, half of each under a crown box."""
    rng = np.random.default_rng(0)
    path = tmp_path / "deepforest-2.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("deepforest-2.1.0.dist-info/licenses/LICENSE", "MIT")
        for stem in build_example.SCENES.values():
            png = io.BytesIO()
            Image.fromarray(rng.integers(1, 255, (200, 400, 3), dtype=np.uint8)).save(png, "PNG")
            wheel.writestr(f"deepforest/data/{stem}.png", png.getvalue())
            wheel.writestr(f"deepforest/data/{stem}.xml", VOC.format(BOX.format(0, 0, 196, 200)))
    return path


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_building_twice_gives_the_same_bytes(tiny_wheel, tmp_path):
    built = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = build_example.build(tiny_wheel, tmp_path / name)
        built.append(files(tmp_path / name))
    assert len(rows) == 4 * 8 and len(built[0]) == 5
    assert built[0] == built[1]
    build_example.build(tiny_wheel, tmp_path / "a")  # over an earlier build
    assert files(tmp_path / "a") == built[0]


def test_the_scene_is_the_ground_of_the_test_chips(rows):
    """Cells of one chip, on the grid of the chips, show what the chips show."""
    read = {}
    with zipfile.ZipFile(EXAMPLE / "chips.zip") as archive, rasterio.open(example.SCENE) as scene:
        pixels = scene.read().transpose(1, 2, 0).astype(int)
        for row in rows:
            name, chip_row, col = Path(row["img_path"]).stem.rsplit("_", 2)
            if name == build_example.MAPPED and row["split"] == "test":
                chip = Image.open(io.BytesIO(archive.read(row["img_path"])))
                read[int(chip_row), int(col)] = np.asarray(chip).astype(int)
        side, first = build_example.CHIP_SIZE, min(row for row, _ in read)
        for (row, col), chip in read.items():
            top, left = (row - first) * side, col * side
            difference = np.abs(pixels[top : top + side, left : left + side] - chip).mean()
            assert difference < 8, (row, col)  # two JPEGs of one picture; of two, over 20
        crowns = gpd.read_parquet(example.CROWNS)
        assert len(read) == 130 and len(crowns) > 100
        assert scene.bounds.left <= crowns.total_bounds[0]
        assert crowns.total_bounds[3] <= scene.bounds.top + 1e-9
    assert example.SCENE.stat().st_size + example.CROWNS.stat().st_size <= 3_000_000


@pytest.fixture
def packed(tiny_wheel, tmp_path, monkeypatch):
    """A small example in place of the real one, not unpacked yet; the folder of the cache."""
    (tmp_path / "example").mkdir()
    build_example.build(tiny_wheel, tmp_path / "example")
    monkeypatch.setattr(example, "PACKED", tmp_path / "example")
    monkeypatch.setattr(example, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_the_example_is_unpacked_once(packed):
    folder = example.unpacked_example()
    rows = list(csv.DictReader((folder / "manifest.csv").read_text().splitlines()))
    for row in rows:
        assert hashlib.sha256((folder / row["img_path"]).read_bytes()).hexdigest() == row["sha256"]
    assert len(files(packed)) == len(rows) + 1
    (folder / "mark").touch()
    assert (example.unpacked_example() / "mark").exists()
    manifest = example.PACKED / "manifest.csv"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))
    assert not (example.unpacked_example() / "mark").exists()  # another example, another folder


def test_a_failed_unpacking_leaves_nothing(packed, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy", full)
    with pytest.raises(InputError, match=r"example cannot be unpacked to .* \(No space left"):
        example.unpacked_example()
    assert not files(packed)


def test_a_wheel_without_the_scenes_changes_nothing(tiny_wheel, tmp_path):
    broken = tmp_path / "broken.whl"
    with zipfile.ZipFile(tiny_wheel) as source, zipfile.ZipFile(broken, "w") as target:
        for name in source.namelist()[:-1]:
            target.writestr(name, source.read(name))
    output = tmp_path / "out"
    output.mkdir()
    with pytest.raises(KeyError, match=r"SOAP_061\.xml"):
        build_example.build(broken, output)
    assert not files(output)
