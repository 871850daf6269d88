"""Classes that are picked, splits that are made, their groups kept whole."""

import shutil

import pandas as pd
import pytest

from helpers import InputError
from helpers.data.dataset import load_data
from helpers.data.splits import SPLITS
from tests.fake_data import class_folders, manifest_rows, split_folders


def split_sizes(data):
    return data.manifest["split"].value_counts().to_dict()


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


def test_positive_class_outside_the_picked_classes(tmp_path):
    root = class_folders(tmp_path, classes=MANY, per_class=5)
    with pytest.raises(InputError, match="positive_class: river is not one of crop, urban"):
        load_data(root, classes=["crop", "urban"], positive_class="river")


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


def test_numbers_as_labels_are_sorted_and_named_as_numbers(tmp_path):
    root = class_folders(tmp_path, classes=("1", "2", "10"), per_class=5)
    assert load_data(root).classes == ("1", "2", "10")
    assert load_data(root, positive_class=10).classes == ("rest", "10")
    assert load_data(root, classes=[10, 1]).classes == ("10", "1")


def test_a_class_called_rest_can_be_one_of_the_rest_only(tmp_path):
    root = class_folders(tmp_path, classes=("lake", "rest", "tree"), per_class=5)
    data = load_data(root, positive_class="tree")
    assert data.manifest["target"].tolist() == [0] * 10 + [1] * 5
