"""Every layout of a data folder in, every faulty one refused with one clear error."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers import InputError
from helpers.data import manifest
from helpers.data.chips import read_chip
from helpers.data.dataset import load_data
from helpers.data.report import data_report
from tests.fake_data import (
    class_folders,
    make_chip,
    manifest_folder,
    manifest_rows,
    split_folders,
    write_chip,
)


def split_sizes(data):
    return data.manifest["split"].value_counts().to_dict()


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


def not_a_csv(root):
    (root / "notes.txt").write_text("x")
    return root / "notes.txt"


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
        (not_a_csv, "data_path: .*notes.txt is no CSV file"),
        (loose_images, r"a.png: lies in no class folder .*Move it into one"),
        (linked_folder, "data/tree: a linked folder. Put the images inside"),
        (splits_beside_classes, r"split folders \(test, train, valid\) beside others \(lake\)"),
        (class_absent_from_a_split, "class tree has no image in the test split. Add some"),
        (no_train, "split: no image is in train"),
        (groups_too_few, "class no_tree has 4 independent .* at least 5"),
        (different_band_counts, r"different band counts: 3 \(no_tree/000.png\), 4 \(tree/odd.png"),
        (different_types, r"different data types: not uint8 \(tree/odd.npy\), uint8 \(no_tree"),
    ],
)
def test_bad_folders(tmp_path, make, message):
    with pytest.raises(InputError, match=message):
        load_data(make(tmp_path) or tmp_path)


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
        (cell(3, "img_path", " "), "manifest.csv: row 4 below the header: img_path is empty"),
        (cell(0, "split", ""), "split is unknown or empty"),
        (cell(0, "img_path", "x.png"), "1 of 20 images cannot be read: x.png: cannot be opened"),
        (cell(0, "img_path", "a.gif"), "a.gif: file type '.gif' is not one of .jpg"),
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


def test_an_unreadable_folder_is_refused_by_name(tmp_path, monkeypatch):
    root = class_folders(tmp_path, classes=("crop", "lake", "tree"))
    listed = os.scandir

    def refuse(folder):
        if Path(folder).name == "lake":
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"/lake: cannot be listed \(Permission denied\). Make"):
        load_data(root)


def test_the_only_csv_with_the_right_columns_is_the_manifest(tmp_path):
    rows = manifest_rows(tmp_path)
    rows.to_csv(tmp_path / "tiles.csv", index=False)
    (tmp_path / "notes.csv").write_text("name,value\nimg_path,label\n")
    data = load_data(tmp_path)
    assert data.layout == "CSV manifest tiles.csv"
    assert data.manifest["group"].tolist() == rows["group"].tolist()
    rows.to_csv(tmp_path / "tiles2.csv", index=False)
    with pytest.raises(InputError, match=r"tiles.csv and tiles2.csv could each .* manifest.csv"):
        load_data(tmp_path)
    rows.to_csv(tmp_path / "manifest.csv", index=False)
    assert load_data(tmp_path).layout == "CSV manifest manifest.csv"


def test_a_long_manifest_is_refused_within_seconds(tmp_path):
    number = pd.Series(range(200_000)).astype(str)
    rows = pd.DataFrame({"img_path": "some/folder/" + number + ".png", "label": "tree"})
    rows.loc[199_999, "img_path"] = "some/folder/0.png"
    rows.to_csv(tmp_path / "manifest.csv", index=False)
    start = time.process_time()
    with pytest.raises(InputError, match=r"some/folder/0.png: is listed twice"):
        load_data(tmp_path)
    assert time.process_time() - start < 8  # 27 s when every path was resolved; now about 1 s
