"""Faults in chips, folders and manifests."""

import os

import numpy as np
from affine import Affine

from tests.fake_data import class_folders, make_chip, manifest_rows, split_folders, write_chip
from tests.faults.fault import Fault

LOAD = "load_data --data_path data"
GROUND = {"crs": "EPSG:32615", "transform": Affine(1, 0, 500_000, 0, -1, 3_000_000)}
UNREADABLE = "1 of 21 images cannot be read"


def chips_and(name, write):
    """Class folders in data/, and one more file that `write` makes."""

    def make(folder):
        class_folders(folder / "data")
        write(folder / "data" / name)

    return make


def manifest(change):
    """A manifest in data/ of which one cell is changed: (column, value)."""

    def make(folder):
        rows = manifest_rows(folder / "data")
        rows.loc[0, change[0]] = change[1]
        rows.to_csv(folder / "data" / "manifest.csv", index=False)

    return make


def damaged_deflate(path):
    data = bytearray(write_chip(path, make_chip(), compress="deflate", **GROUND).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20] = bytes(20)
    path.write_bytes(bytes(data))


def only_nodata(path):
    write_chip(path, np.full((3, 28, 28), 7, np.uint8), nodata=7, **GROUND)


def link_to_itself(path):
    path.symlink_to(path)


def called(*names):
    return lambda folder: class_folders(folder / "data", classes=names)


def one_image_in_two_splits(folder):
    root = split_folders(folder / "data")
    (root / "test/tree/copy.png").write_bytes((root / "train/tree/000.png").read_bytes())


def two_manifests(folder):
    rows = manifest_rows(folder / "data")
    for name in ("a.csv", "b.csv"):
        rows.to_csv(folder / "data" / name, index=False)


def pipe_as_manifest(folder):
    (folder / "data").mkdir()
    os.mkfifo(folder / "data" / "manifest.csv")


def cut_off(path):
    data = write_chip(path, make_chip()).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def bands_last(path):
    np.save(path, make_chip().transpose(1, 2, 0))


ROWS = [
    Fault("no such folder", None, LOAD, ("data does not exist. Give a folder",)),
    Fault(
        "empty folder", lambda folder: (folder / "data").mkdir(), LOAD, ("no images found. Known",)
    ),
    Fault("one class", called("tree"), LOAD, ("at least two different classes", "not just tree")),
    Fault(
        "class too small",
        lambda f: class_folders(f / "data", per_class=4),
        LOAD,
        ("class no_tree has 4 independent", "at least 5", "make the test split"),
    ),
    Fault(
        "empty chip", chips_and("tree/z.png", lambda p: p.touch()), LOAD, (UNREADABLE, "0 bytes")
    ),
    Fault("chip cut off", chips_and("tree/z.png", cut_off), LOAD, (UNREADABLE, "cut off")),
    Fault("damage in a block", chips_and("tree/z.tif", damaged_deflate), LOAD, ("z.tif: damaged",)),
    Fault("only nodata", chips_and("tree/z.tif", only_nodata), LOAD, ("band 0 has no data",)),
    Fault("bands last", chips_and("tree/z.npy", bands_last), LOAD, ("bands come first",)),
    Fault("a pipe for a chip", chips_and("tree/z.png", os.mkfifo), LOAD, ("is not a file",)),
    Fault("a pipe for a manifest", pipe_as_manifest, LOAD, ("manifest.csv: is not a file",)),
    Fault("a link to itself", chips_and("tree/z.png", link_to_itself), LOAD, ("Too many levels",)),
    Fault(
        "line break in a class",
        called("tree", "la\nke"),
        LOAD,
        (r"'la\nke/000.png': img_path holds",),
    ),
    Fault(
        "NUL in a manifest",
        manifest(("img_path", "a\0b.png")),
        LOAD,
        (r"'a\x00b.png': img_path holds",),
    ),
    Fault("path of 5,000 characters", manifest(("img_path", "a" * 5000)), LOAD, ("file type",)),
    Fault(
        "name too long in a manifest",
        manifest(("img_path", "a" * 5000 + ".png")),
        LOAD,
        ("cannot be opened (File name too long)",),
    ),
    Fault("path out of the folder", manifest(("img_path", "../a.png")), LOAD, ("leaves the data",)),
    Fault("unknown split", manifest(("split", "dev")), LOAD, ("empty (1 of 20 rows). Use one",)),
    Fault(
        "empty label", manifest(("label", "")), LOAD, (".png: label is empty (1 of 20 rows). Fill",)
    ),
    Fault("two manifests", two_manifests, LOAD, ("a.csv and b.csv", "manifest.csv")),
    Fault("unknown class", called("1", "2"), f"{LOAD} --positive_class 3", ("not one of 1, 2",)),
    Fault(
        "a class called rest",
        called("rest", "lake", "tree"),
        f"{LOAD} --positive_class rest",
        ("positive_class: 'rest'",),
    ),
    Fault(
        "numbers as classes",
        called("1", "2", "10"),
        f"{LOAD} --positive_class 10",
        ("rest, 10",),
        0,
    ),
    Fault(
        "unknown band",
        called("lake", "tree"),
        f"{LOAD} --bands 0 3",
        ("[3] out of range", "bands 0 to 2"),
    ),
    Fault(
        "leakage told", one_image_in_two_splits, LOAD, ("WARNING: 2 chips are byte-identical",), 0
    ),
    Fault(
        "leakage refused",
        one_image_in_two_splits,
        f"{LOAD} --on_leakage error",
        ("2 chips are byte-identical", "Keep each in one split"),
    ),
]
