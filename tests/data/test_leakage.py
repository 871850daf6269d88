"""What two splits share is found and said; splits that are made share nothing."""

import shutil

import numpy as np
import pandas as pd
import pytest
from affine import Affine
from PIL import Image
from rasterio.warp import transform

from helpers import InputError
from helpers.data.dataset import load_data
from helpers.data.example import unpacked_example
from helpers.data.report import data_report
from helpers.data.splits import SPLITS
from tests.fake_data import (
    CLASSES,
    COUNTS,
    make_chip,
    manifest_rows,
    split_folders,
    write_chip,
)


def test_identical_images_in_two_given_splits(tmp_path):
    root = split_folders(tmp_path)
    shutil.copy(root / "train/tree/000.png", root / "test/tree/000.png")
    found = (
        "2 chips are byte-identical to a chip of another split, "
        "e.g. test/tree/000.png (test) and train/tree/000.png (train)"
    )
    assert f"WARNING: {found}" in data_report(load_data(root))
    with pytest.raises(InputError, match=r"2 chips are byte-identical .*Keep each in one split"):
        load_data(root, on_leakage="error")


def test_a_group_in_two_given_splits(tmp_path):
    rows = manifest_rows(tmp_path)
    rows.loc[rows["split"] == "test", "group"] = "train_tree_0"
    rows.to_csv(tmp_path / "manifest.csv", index=False)
    report = data_report(load_data(tmp_path))
    assert (
        "WARNING: 6 chips are of the same group as a chip of another split, e.g. "
        "test/no_tree/000.png (test) and train/tree/000.png (train), both train_tree_0" in report
    )
    with pytest.raises(InputError, match="6 chips are of the same group"):
        load_data(tmp_path, on_leakage="error")


def saved_again(source, target, **options):
    """The same picture, encoded anew."""
    with Image.open(source) as image:
        image.save(target, "JPEG", **options)


def photographs(root, counts=COUNTS):
    """Chips of the embedded example in split folders: unlike noise, a JPEG changes them little."""
    for label in CLASSES:
        chips = iter(sorted((unpacked_example() / "chips" / label).iterdir())[::5])
        for split, count in counts.items():
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                shutil.copy(next(chips), folder / f"{number:03d}.jpg")
    return root


def test_a_copy_saved_again_is_found_in_another_split(tmp_path):
    root = photographs(tmp_path)
    assert load_data(root).leaks == []
    saved_again(root / "train/tree/000.jpg", root / "test/tree/copy.jpg", quality=80)
    [leak] = load_data(root).leaks
    assert leak == (
        "2 chips look like re-encoded copies of a chip of another split, "
        "e.g. test/tree/copy.jpg (test) and train/tree/000.jpg (train)"
    )
    assert f"leakage     WARNING: {leak}" in data_report(load_data(root))


def test_made_splits_keep_copies_saved_again_together(tmp_path):
    root = photographs(tmp_path, counts={"train": 20})
    for number in range(12):
        source = root / f"train/tree/{number:03d}.jpg"
        saved_again(source, source.with_name(f"copy_{number}.jpg"), quality=85)
    for seed in range(3):
        data = load_data(root, split_seed=seed, on_leakage="error")
        assert set(data.manifest["split"]) == set(SPLITS)
        split = data.manifest.set_index("img_path")["split"]
        pairs = [(f"train/tree/{n:03d}.jpg", f"train/tree/copy_{n}.jpg") for n in range(12)]
        assert all(split[one] == split[copy] for one, copy in pairs)


def test_chips_without_texture_are_no_copies(tmp_path):
    for split, level in zip(SPLITS, (10, 20, 30), strict=True):
        for target, name in enumerate(CLASSES):
            chip = np.full((3, 28, 28), level + target, np.uint8)
            write_chip(tmp_path / split / name / "a.png", chip)
    assert load_data(tmp_path).leaks == []


def georeferenced(root, places, *, split="", crs="EPSG:32615"):
    """GeoTIFF chips of 1 m pixels at (x, y) metres, one class after the other; manifest rows."""
    rows = []
    for number, (x, y) in enumerate(places):
        label = CLASSES[number % 2]
        name = f"{label}_{split}{number:03d}.tif"
        chip = make_chip(100 * [*SPLITS, ""].index(split) + number, target=number % 2)
        write_chip(root / name, chip, crs=crs, transform=Affine(1, 0, x, 0, -1, y))
        rows.append((name, label, split))
    return pd.DataFrame(rows, columns=["img_path", "label", "split"])


def test_ground_that_two_splits_share_is_leakage(tmp_path):
    apart = {
        split: georeferenced(tmp_path, [(100 * n + 10_000 * i, 500) for n in range(4)], split=split)
        for i, split in enumerate(SPLITS)
    }
    pd.concat(apart.values()).to_csv(tmp_path / "manifest.csv", index=False)
    data = load_data(tmp_path)
    assert data.leaks == []
    assert set(data.manifest["crs"]) == {"EPSG:32615"}
    assert data.manifest["resolution"].tolist() == [1.0] * 12
    assert data.chip_facts["resolution"] == 1.0
    assert "resolution  1 to 1 (EPSG:32615), ground units a pixel" in data_report(data)

    over = georeferenced(
        tmp_path, [(14, 500), (314, 500)], split="test"
    )  # half of two training chips
    beside = georeferenced(tmp_path, [(-28, 500), (-28, 528)], split="valid")  # a border in common
    pd.concat([apart["train"], over, beside]).to_csv(tmp_path / "manifest.csv", index=False)
    [leak] = load_data(tmp_path).leaks
    assert leak.startswith("4 chips show ground that is also in a chip of another split, e.g. ")


def test_ground_is_compared_across_coordinate_systems(tmp_path):
    east, north = 500_000, 3_000_000
    rows = [
        georeferenced(tmp_path, [(east + 100 * i, north + 1000 * n) for n in (0, 1)], split=split)
        for i, split in enumerate(SPLITS)
    ]
    [longitude], [latitude] = transform("EPSG:32615", "EPSG:4326", [east], [north])
    degrees = Affine(1e-5, 0, longitude, 0, -1e-5, latitude)
    write_chip(tmp_path / "tree.tif", make_chip(77, target=1), crs="EPSG:4326", transform=degrees)
    rows.append(pd.DataFrame([["tree.tif", "tree", "test"]], columns=rows[0].columns))
    pd.concat(rows).to_csv(tmp_path / "manifest.csv", index=False)
    [leak] = load_data(tmp_path).leaks
    assert leak.startswith("2 chips show ground that is also in")
    assert "tree.tif (test)" in leak


def test_made_splits_keep_overlapping_chips_together(tmp_path):
    strips = [(10_000 * strip + 14 * n, 500) for strip in range(30) for n in range(4)]
    georeferenced(tmp_path, strips).drop(columns="split").to_csv(
        tmp_path / "manifest.csv", index=False
    )
    data = load_data(tmp_path, on_leakage="error")
    strip = np.arange(120) // 4
    assert (data.manifest.groupby(strip)["split"].nunique() == 1).all()
    assert set(data.manifest["split"]) == set(SPLITS)


def test_one_mosaic_is_one_unit_and_cannot_be_split(tmp_path):
    rows = georeferenced(tmp_path, [(14 * n, 500) for n in range(20)]).drop(columns="split")
    rows.to_csv(tmp_path / "manifest.csv", index=False)
    with pytest.raises(InputError, match=r"has 1 independent .*overlapping ground count as one"):
        load_data(tmp_path)
