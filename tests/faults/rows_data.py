"""Faults in chips, folders and manifests."""

import os

from tests.fake_data import class_folders, make_chip, manifest_rows, write_chip
from tests.faults.fault import Fault

LOAD = "load_data --data_path data"
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


ROWS = [
    Fault("no such folder", None, LOAD, ("data does not exist. Give a folder",)),
    Fault(
        "empty folder", lambda folder: (folder / "data").mkdir(), LOAD, ("no images found. Known",)
    ),
    Fault("one class", called("tree"), LOAD, ("at least two different classes", "not just tree")),
    Fault("chip cut off", chips_and("tree/z.png", cut_off), LOAD, (UNREADABLE, "cut off")),
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
    Fault(
        "a class called rest",
        called("rest", "lake", "tree"),
        f"{LOAD} --positive_class rest",
        ("positive_class: 'rest'",),
    ),
    Fault(
        "unknown band",
        called("lake", "tree"),
        f"{LOAD} --bands 0 3",
        ("[3] out of range", "bands 0 to 2"),
    ),
]
