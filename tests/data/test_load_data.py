"""Data loading: every layout and file type in, every bad input refused with one clear error."""

import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from PIL import Image
from torch.utils.data import DataLoader

from helpers import InputError
from helpers.console import run_command
from helpers.data import manifest
from helpers.data.chips import read_chip
from helpers.data.dataset import band_statistics, load_data
from helpers.data.report import data_report
from helpers.data.splits import SPLITS
from helpers.load_data import main
from tests.fake_data import (
    CLASSES,
    class_folders,
    make_chip,
    manifest_folder,
    manifest_rows,
    split_folders,
    write_chip,
)

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def split_sizes(data):
    return data.manifest["split"].value_counts().to_dict()


# ------------------------------------------------------------------------------------ layouts


def test_class_folders(tmp_path):
    data = load_data(class_folders(tmp_path))
    assert data.classes == ("no_tree", "tree")
    assert data.layout == "class folders; test and valid made here with seed 0"
    assert split_sizes(data) == {"train": 12, "valid": 4, "test": 4}
    counts = data.manifest.groupby(["split", "label"]).size()
    assert counts["valid"].tolist() == counts["test"].tolist() == [2, 2]
    row = data.manifest.iloc[0]
    assert (row["img_path"], row["label"], row["target"]) == ("no_tree/000.png", "no_tree", 0)
    assert (row["height"], row["width"], row["n_bands"], row["dtype"]) == (28, 28, 3, "uint8")


@pytest.mark.parametrize("valid", ["val", "valid", "validation", "Val"])
def test_split_folders(tmp_path, valid):
    data = load_data(split_folders(tmp_path, counts={"train": 3, valid: 2, "test": 1}))
    assert data.layout == "split folders"
    assert split_sizes(data) == {"train": 6, "valid": 4, "test": 2}


def test_manifest_keeps_its_columns(tmp_path):
    rows = manifest_rows(tmp_path)
    rows.assign(latitude=np.arange(len(rows)) / 8).to_csv(tmp_path / "manifest.csv", index=False)
    data = load_data(tmp_path)
    assert data.layout == "CSV manifest manifest.csv"
    assert data.manifest["latitude"].tolist() == [i / 8 for i in range(len(rows))]
    assert data.manifest["split"].tolist() == rows["split"].tolist()
    assert data.manifest["group"].tolist() == rows["group"].tolist()


def test_manifest_by_name_with_numbers_as_labels(tmp_path):
    rows = manifest_rows(tmp_path)
    rows["label"] = rows["label"].map({"no_tree": 0, "tree": 1})
    rows.to_csv(tmp_path / "chips.csv", index=False)
    data = load_data(tmp_path / "chips.csv")
    assert data.root == tmp_path
    assert data.classes == ("0", "1")


def test_one_csv_per_split_as_in_the_original(tmp_path):
    for split, rows in manifest_rows(tmp_path, suffix=".npy", bands=5).groupby("split"):
        rows[["img_path", "label"]].to_csv(tmp_path / f"{split}_clean.csv", index=False)
    data = load_data(tmp_path)
    assert data.layout == "one CSV per split"
    assert split_sizes(data) == {"train": 12, "valid": 4, "test": 4}
    assert data.bands == (0, 1, 2)


def test_a_class_may_be_called_none(tmp_path):
    rows = manifest_rows(tmp_path)
    rows["label"] = rows["label"].map({"no_tree": "None", "tree": "NA"})
    rows.to_csv(tmp_path / "manifest.csv", index=False)
    assert load_data(tmp_path).classes == ("NA", "None")


def test_hidden_and_other_files_are_left(tmp_path):
    class_folders(tmp_path)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "tree" / "Thumbs.db").write_text("x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.png").write_text("x")
    (tmp_path / "tree" / "._000.png").write_text("x")
    assert len(load_data(tmp_path).manifest) == 20


def test_eurosat_is_downloaded_once(tmp_path, monkeypatch):
    calls = []

    def download(root, download):
        calls.append(root)
        class_folders(Path(root, "eurosat", "2750"), classes=("Forest", "River"), suffix=".jpg")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(manifest, "EuroSAT", download)
    for _ in range(2):
        assert load_data("eurosat").classes == ("Forest", "River")
    assert len(calls) == 1
    assert [path.name for path in Path("data/eurosat").iterdir()] == ["2750"]


def test_eurosat_out_of_reach(tmp_path, monkeypatch):
    def download(root, download):
        Path(root, "half.zip").write_text("x")
        raise OSError("Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(manifest, "EuroSAT", download)
    with pytest.raises(InputError, match=r"eurosat cannot be downloaded .*Download it elsewhere"):
        load_data("eurosat")
    assert list(Path("data/eurosat").iterdir()) == []


# ----------------------------------------------------------------------------------- decoding


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


def test_palette_becomes_colour(tmp_path):
    image = Image.new("P", (4, 2))
    image.putpalette([10, 20, 30])
    image.save(tmp_path / "a.png")
    assert read_chip(tmp_path / "a.png")[:, 0, 0].tolist() == [10, 20, 30]
    assert read_chip(tmp_path / "a.png").shape == (3, 2, 4)


def test_bands_are_picked_in_order(tmp_path):
    chip = make_chip(bands=6)
    path = write_chip(tmp_path / "a.npy", chip)
    np.testing.assert_array_equal(read_chip(path, (4, 0)), chip[[4, 0]])


# ------------------------------------------------------------------------------------ data set


def test_dataset(tmp_path):
    data = load_data(manifest_folder(tmp_path))
    chips = data.dataset("valid", 28)
    assert chips.targets.tolist() == [0, 0, 1, 1]
    assert chips.targets.dtype == torch.int64
    assert chips.paths[0] == tmp_path / "valid/no_tree/000.png"
    chip, target = chips[3]
    assert (chip.dtype, tuple(chip.shape), target) == (torch.uint8, (3, 28, 28), 1)
    np.testing.assert_array_equal(chip, make_chip(11_001, target=1))  # valid is the third folder


def test_dataset_resizes_and_batches(tmp_path):
    data = load_data(manifest_folder(tmp_path, suffix=".tif", dtype="float32", bands=2))
    chips, targets = next(iter(DataLoader(data.dataset("train", 14), batch_size=12)))
    assert (chips.dtype, tuple(chips.shape)) == (torch.float32, (12, 2, 14, 14))
    assert targets.tolist() == [0] * 6 + [1] * 6


def test_resized_uint8_stays_uint8_and_keeps_a_constant(tmp_path):
    for path in (tmp_path / name / f"{i}.png" for name in CLASSES for i in range(5)):
        write_chip(path, np.full((3, 20, 30), 77, np.uint8))
        write_chip(path, np.full((3, 20, 30), 77 + int(path.stem), np.uint8))
    chip, _ = load_data(tmp_path).dataset("train", 14)[0]
    assert chip.dtype == torch.uint8
    assert chip.shape == (3, 14, 14)
    assert chip.unique().numel() == 1


def test_band_statistics(tmp_path):
    data = load_data(manifest_folder(tmp_path, suffix=".npy", bands=4, dtype="uint16"))
    train = [read_chip(path, data.bands) for path in data.dataset("train", 28).paths]
    pixels = np.concatenate([chip.reshape(3, -1) for chip in train], axis=1).astype(np.float64)
    mean, std = band_statistics(data, 28)
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean, pixels.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(std, pixels.std(axis=1), rtol=1e-6)


def test_band_statistics_of_a_constant_band(tmp_path):
    for i, row in manifest_rows(tmp_path, suffix=".npy").iterrows():
        chip = np.stack([make_chip(i)[0], np.full((28, 28), 9, np.uint8)])
        write_chip(tmp_path / row["img_path"], chip)
    mean, std = band_statistics(load_data(tmp_path), 28)
    assert (mean[1], std[1]) == (9, 1)


# --------------------------------------------------------------------------- classes and splits

MANY = ("crop", "forest", "river", "urban")


@pytest.mark.parametrize(
    ("options", "classes", "images"),
    [
        ({}, MANY, 20),
        ({"classes": ["urban", "crop"]}, ("urban", "crop"), 10),
        ({"classes": ["urban", "crop"], "positive_class": "urban"}, ("crop", "urban"), 10),
        ({"classes": ["urban", "crop", "river"]}, ("urban", "crop", "river"), 15),
        ({"positive_class": "forest"}, ("rest", "forest"), 20),
    ],
)
def test_picked_classes(tmp_path, options, classes, images):
    data = load_data(class_folders(tmp_path, classes=MANY, per_class=5), **options)
    assert data.classes == classes
    assert len(data.manifest) == images
    folder = data.manifest["img_path"].str.split("/").str[0]
    expected = [name if name in classes else "rest" for name in folder]
    assert data.manifest["label"].tolist() == expected
    assert data.manifest["target"].tolist() == [classes.index(name) for name in expected]


def test_splits_depend_on_the_seed_alone(tmp_path):
    root = class_folders(tmp_path, per_class=20)
    splits = [load_data(root, split_seed=seed).manifest["split"].tolist() for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


@pytest.mark.parametrize("given", [["train"], ["train", "test"], ["train", "valid"]])
def test_each_missing_split_is_a_fifth_of_train(tmp_path, given):
    data = load_data(split_folders(tmp_path, counts=dict.fromkeys(given, 10)))
    made = {split: 4 for split in SPLITS if split not in given}
    expected = dict.fromkeys(given, 20) | made | {"train": 20 - 4 * len(made)}
    assert split_sizes(data) == expected


def test_made_splits_keep_groups_and_copies_together(tmp_path):
    rows = manifest_rows(tmp_path, counts={"train": 60}).drop(columns="split")
    rows.loc[rows.index % 3 == 0, "group"] = ""
    copies = rows.sample(12, random_state=0)
    for path in copies["img_path"]:
        shutil.copy(tmp_path / path, tmp_path / f"copy_{path.replace('/', '_')}")
    copies = copies.assign(img_path="copy_" + copies["img_path"].str.replace("/", "_"), group="")
    pd.concat([rows, copies]).to_csv(tmp_path / "manifest.csv", index=False)
    data = load_data(tmp_path, on_leakage="error")
    assert set(data.manifest["split"]) == set(SPLITS)
    for column in ("group", "sha256"):
        named = data.manifest[data.manifest[column] != ""]
        assert named[column].duplicated().any()
        assert (named.groupby(column)["split"].nunique() == 1).all()


def test_copies_stay_together_without_groups(tmp_path):
    class_folders(tmp_path, per_class=20)
    for number in range(8):
        shutil.copy(tmp_path / f"tree/{number:03d}.png", tmp_path / f"tree/copy_{number}.png")
    data = load_data(tmp_path, on_leakage="error")
    assert data.manifest["sha256"].duplicated().sum() == 8


def test_another_group_column(tmp_path):
    rows = manifest_rows(tmp_path, counts={"train": 20}).drop(columns="split")
    rows.rename(columns={"group": "block"}).to_csv(tmp_path / "manifest.csv", index=False)
    data = load_data(tmp_path, group_column="block")
    assert (data.manifest.groupby("block")["split"].nunique() == 1).all()
    assert data.manifest["group"].tolist() == rows["group"].tolist()


def test_fingerprint(tmp_path):
    root = manifest_folder(tmp_path / "a")
    data = load_data(root)
    copy = load_data(shutil.copytree(root, tmp_path / "b"))
    assert data.fingerprint == copy.fingerprint
    assert load_data(root, bands=(2, 1, 0)).fingerprint != data.fingerprint
    assert load_data(root, classes=CLASSES[::-1]).fingerprint != data.fingerprint
    write_chip(root / "test/tree/001.png", make_chip(99))
    changed = load_data(root)
    assert changed.fingerprint != data.fingerprint
    same = [changed.split_fingerprint(s) == data.split_fingerprint(s) for s in SPLITS]
    assert same == [True, True, False]


# --------------------------------------------------------------------------------- bad parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bands": [0, 3]}, r"bands: \[3\] out of range, a chip has bands 0 to 2"),
        ({"bands": [-1]}, r"bands: \[-1\] out of range"),
        ({"bands": []}, "bands: the list is empty"),
        ({"classes": ["tree", "lake"]}, "classes: lake is not in .*; it has no_tree, tree"),
        ({"classes": ["tree"]}, "at least two"),
        ({"classes": ["tree", "tree"]}, "at least two"),
        ({"positive_class": "lake"}, "positive_class: lake is not one of no_tree, tree"),
        ({"split_seed": -1}, "split_seed: .* greater than or equal to 0"),
        ({"bands": ["red"]}, r"bands: .* valid integer.* \(got 'red'\)"),
        ({"on_unreadable": "ignore"}, "on_unreadable: .* 'error' or 'skip'"),
        ({"on_leakage": "no"}, "on_leakage: .* 'warn' or 'error'"),
        ({"group_column": "block"}, "group_column: folders have no column 'block'"),
    ],
)
def test_bad_parameters(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        load_data(class_folders(tmp_path, per_class=5), **options)


def test_positive_class_outside_the_picked_classes(tmp_path):
    root = class_folders(tmp_path, classes=MANY, per_class=5)
    with pytest.raises(InputError, match="positive_class: river is not one of crop, urban"):
        load_data(root, classes=["crop", "urban"], positive_class="river")


def test_unknown_split_of_a_dataset(tmp_path):
    with pytest.raises(InputError, match=r"split: 'val' is unknown. Use one of train, valid, test"):
        load_data(manifest_folder(tmp_path)).dataset("val", 28)


# ------------------------------------------------------------------------------- bad data folders


def no_folder(root):
    return root / "nowhere"


def not_a_csv(root):
    (root / "notes.txt").write_text("x")
    return root / "notes.txt"


def no_images(root):
    (root / "tree").mkdir()
    (root / "tree" / "notes.txt").write_text("x")


def one_class(root):
    class_folders(root, classes=("tree",))


def loose_images(root):
    write_chip(root / "a.png", make_chip())


def linked_folder(root):
    class_folders(root / "real")
    (root / "data").mkdir()
    (root / "data" / "tree").symlink_to(root / "real" / "tree")
    return root / "data"


def splits_beside_classes(root):
    split_folders(root)
    write_chip(root / "lake" / "a.png", make_chip())


def class_absent_from_a_split(root):
    split_folders(root)
    shutil.rmtree(root / "test" / "tree")


def no_train(root):
    split_folders(root, counts={"valid": 5, "test": 5})


def class_too_small(root):
    class_folders(root, per_class=4)


def groups_too_few(root):
    rows = manifest_rows(root, counts={"train": 8}).drop(columns="split")
    rows.to_csv(root / "manifest.csv", index=False)


def different_band_counts(root):
    class_folders(root)
    write_chip(root / "tree" / "odd.png", make_chip(bands=4))


def different_types(root):
    class_folders(root)
    write_chip(root / "tree" / "odd.npy", make_chip(dtype="float32"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_folder, "data_path: .*nowhere does not exist. Give a folder or a CSV manifest"),
        (not_a_csv, "data_path: .*notes.txt is no CSV file"),
        (no_images, "no images found. Known: .jpg"),
        (one_class, "at least two different classes are needed, not just tree. Give a data_path"),
        (loose_images, r"a.png: lies in no class folder .*Move it into one"),
        (linked_folder, "data/tree: a linked folder. Put the images inside"),
        (splits_beside_classes, r"split folders \(test, train, valid\) beside others \(lake\)"),
        (class_absent_from_a_split, "class tree has no image in the test split. Add some"),
        (no_train, "split: no image is in train"),
        (class_too_small, "class no_tree has 4 independent .* at least 5 .* make the test split"),
        (groups_too_few, "class no_tree has 4 independent .* at least 5"),
        (different_band_counts, r"different band counts: 3 \(no_tree/000.png\), 4 \(tree/odd.png"),
        (different_types, r"different data types: not uint8 \(tree/odd.npy\), uint8 \(no_tree"),
    ],
)
def test_bad_folders(tmp_path, make, message):
    with pytest.raises(InputError, match=message):
        load_data(make(tmp_path) or tmp_path)


# ---------------------------------------------------------------------------------- bad manifests


def cell(row, column, value):
    def change(rows, root):
        rows.loc[row, column] = value
        return rows

    return change


def without(column):
    return lambda rows, root: rows.drop(columns=column)


def repeated_row(rows, root):
    rows.loc[1, "img_path"] = "./" + rows.loc[0, "img_path"]
    return rows


def link_out_of_the_folder(rows, root):
    outside = write_chip(root.parent / f"{root.name}_outside.png", make_chip())
    (root / "link.png").symlink_to(outside)
    rows.loc[0, "img_path"] = "link.png"
    return rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("label"), "manifest.csv: column label is missing, found: img_path, split, group"),
        (without("img_path"), "manifest.csv: column img_path is missing"),
        (
            cell(3, "label", ""),
            "manifest.csv: test/tree/001.png: label is empty .1 of 20 rows.. Fill it in",
        ),
        (cell(3, "img_path", " "), "manifest.csv: row 4 below the header: img_path is empty"),
        (
            cell(0, "split", "dev"),
            "split is unknown or empty .1 of 20 rows.. Use one of train, valid",
        ),
        (cell(0, "split", ""), "split is unknown or empty"),
        (cell(0, "img_path", "x.png"), "1 of 20 images cannot be read: x.png: cannot be opened"),
        (cell(0, "img_path", "a.gif"), "a.gif: file type '.gif' is not one of .jpg"),
        (cell(0, "img_path", "../x.png"), ": ../x.png: leaves the data folder"),
        (cell(0, "img_path", "/etc/x.png"), ": /etc/x.png: leaves the data folder"),
        (link_out_of_the_folder, ": link.png: leaves the data folder .* Use paths relative"),
        (repeated_row, "test/no_tree/000.png: is listed twice .* Keep one row a chip"),
        (lambda rows, root: rows[:0], "no images found"),
    ],
)
def test_bad_manifests(tmp_path, change, message):
    rows = manifest_rows(tmp_path)
    change(rows, tmp_path).to_csv(tmp_path / "manifest.csv", index=False)
    with pytest.raises(InputError, match=message):
        load_data(tmp_path)


@pytest.mark.parametrize("content", [b"", b"img_path,label\na,b\nc,d,e,f\n", b"\xff\xfe\x00x"])
def test_unreadable_csv(tmp_path, content):
    (tmp_path / "manifest.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"manifest.csv: not a readable CSV file"):
        load_data(tmp_path)


def test_csv_with_an_unquoted_comma(tmp_path):
    (tmp_path / "manifest.csv").write_text("img_path,label\na.png,tree, dense\n")
    with pytest.raises(InputError, match=r"manifest.csv: rows have more cells than the header"):
        load_data(tmp_path)


def test_a_named_group_column_must_be_there(tmp_path):
    with pytest.raises(InputError, match=r"manifest.csv: column block is missing"):
        load_data(manifest_folder(tmp_path), group_column="block")


# ------------------------------------------------------------------------------ unreadable files


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


def test_unreadable_files_stop_the_load_or_are_skipped(tmp_path):
    root = class_folders(tmp_path)
    for number in range(12):
        (root / "tree" / f"bad_{number:02d}.png").write_bytes(b"")
    with pytest.raises(InputError) as error:
        load_data(root)
    assert "12 of 32 images cannot be read: tree/bad_00.png: empty file (0 bytes); tree" in str(
        error.value
    )
    assert 'and 7 more. Replace or remove them, or leave them out with on_unreadable="skip"' in str(
        error.value
    )
    data = load_data(root, on_unreadable="skip")
    assert len(data.manifest) == 20
    assert data.skipped["img_path"].tolist() == [f"tree/bad_{i:02d}.png" for i in range(12)]
    report = data_report(data)
    assert "12 skipped" in report
    assert "tree/bad_09.png: empty file (0 bytes)" in report
    assert "bad_10" not in report
    assert "and 2 more" in report


def test_nothing_readable_is_an_error_even_when_skipping(tmp_path):
    rows = manifest_rows(tmp_path)
    for path in rows["img_path"]:
        (tmp_path / path).write_bytes(b"")
    with pytest.raises(InputError, match="20 of 20 images cannot be read"):
        load_data(tmp_path, on_unreadable="skip")


def test_the_error_of_read_chip_names_the_band(tmp_path):
    with pytest.raises(InputError, match=r"bands: \[7\] out of range"):
        read_chip(write_chip(tmp_path / "a.png", make_chip()), (7,))


# ------------------------------------------------------------------------------ leakage, report


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


def test_report(tmp_path):
    report = data_report(load_data(manifest_folder(tmp_path / "scene", bands=3)))
    assert str(tmp_path) not in report
    assert report.splitlines()[0] == "data        scene (CSV manifest manifest.csv)"
    assert "classes     no_tree, tree (positive: tree)" in report
    assert ["all", "12", "4", "4", "20"] in [line.split() for line in report.splitlines()]
    for line in (
        "size (px)   28x28 (20)",
        "bands       3 in a file, in use: 0, 1, 2",
        "data type   uint8 (20)",
        "unreadable  none",
        "identical   0 images have a byte-identical twin, 0 under two labels",
        "groups      10",
        "leakage     none: no image, copy, group or ground in two splits",
    ):
        assert line in report.splitlines()


def test_command_line_is_quiet_beside_the_report(tmp_path):
    root = class_folders(tmp_path / "scene", suffix=".tif", bands=4)
    command = [sys.executable, "-m", "helpers.load_data", "--data_path", root, "--bands", "3", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""  # no georeferencing warning, no progress bar into a file
    assert "4 in a file, in use: 3, 0" in done.stdout


def test_command_line_names_the_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["load_data", "--data_path", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: data_path: ")
