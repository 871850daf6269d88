"""Faults in chips, folders and manifests."""

import os

from tests.fake_data import class_folders, make_chip, manifest_rows, write_chip
from tests.faults.fault import Fault

UNREADABLE = "1 of 21 images cannot be read"


def chips_and(name, write):
    """Class folders in data/, and one more file that `write` makes."""

    def make(folder):
        class_folders(folder / "data")
        write(folder / "data" / name)

    return make


def manifest(column, value):
    """A manifest in data/ of which one cell is changed."""

    def make(folder):
        rows = manifest_rows(folder / "data")
        rows.loc[0, column] = value
        rows.to_csv(folder / "data" / "manifest.csv", index=False)

    return make


def link_to_itself(path):
    path.symlink_to(path)


def called(*names):
    return lambda folder: class_folders(folder / "data", classes=names)


def pipe_as_manifest(folder):
    (folder / "data").mkdir()
    os.mkfifo(folder / "data" / "manifest.csv")


def cut_off(path):
    data = write_chip(path, make_chip()).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def load(name, make, *says, flags=""):
    return Fault(name, make, f"load_data --data_path data {flags}", says)


ROWS = [
    load("no such folder", None, "data does not exist. Give a folder"),
    load("empty folder", lambda folder: (folder / "data").mkdir(), "no images found. Known"),
    load("one class", called("tree"), "at least two different classes", "not just tree"),
    load("chip cut off", chips_and("tree/z.png", cut_off), UNREADABLE, "cut off"),
    load("a pipe for a chip", chips_and("tree/z.png", os.mkfifo), "is not a file"),
    load("a pipe for a manifest", pipe_as_manifest, "manifest.csv: is not a file"),
    load("a link to itself", chips_and("tree/z.png", link_to_itself), "Too many levels"),
    load("line break in a class", called("tree", "la\nke"), r"'la\nke/000.png': img_path holds"),
    load("NUL in a manifest", manifest("img_path", "a\0b.png"), r"'a\x00b.png': img_path holds"),
    load("path of 5,000 characters", manifest("img_path", "a" * 5000), "file type"),
    load(
        "name too long in a manifest",
        manifest("img_path", "a" * 5000 + ".png"),
        "cannot be opened (File name too long)",
    ),
    load("path out of the folder", manifest("img_path", "../a.png"), "leaves the data"),
    load("unknown split", manifest("split", "dev"), "empty (1 of 20 rows). Use one"),
    load("empty label", manifest("label", ""), ".png: label is empty (1 of 20 rows). Fill"),
    load(
        "a class called rest",
        called("rest", "lake", "tree"),
        "positive_class: 'rest'",
        flags="--positive_class rest",
    ),
    load(
        "unknown band",
        called("lake", "tree"),
        "[3] out of range",
        "bands 0 to 2",
        flags="--bands 0 3",
    ),
]
