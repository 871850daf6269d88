"""Faults in what shall be classified or mapped, in the model, and in where results go."""

from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from affine import Affine

from helpers.models.classifier import ClassifierConfig, create_classifier
from helpers.models.files import save_classifier
from tests.fake_data import class_folders, make_chip, write_scene
from tests.faults.fault import Fault

NORTH_UP = Affine(0.5, 0, 500_000, 0, -0.5, 4_000_000)


@cache
def model_bytes():
    torch.manual_seed(0)
    config = ClassifierConfig(
        "timm:test_vit", "random", 32, (0, 1, 2), ("no_tree", "tree"),
        chip_size=28, chip_bands=3, chip_dtype="uint8", resolution=0.5,
    )  # fmt: skip
    path = Path(mkdtemp()) / "model.safetensors"
    provenance = {"run": "fake", "backbone": "random", "config": {}}
    return save_classifier(create_classifier(config), path, provenance).read_bytes()


def model(folder):
    (folder / "model.safetensors").write_bytes(model_bytes())


def chips(folder, break_one=None, **options):
    model(folder)
    class_folders(folder / "chips", per_class=2, **options)
    if break_one is not None:
        (folder / "chips" / "tree" / "000.png").write_bytes(break_one)


def scene(folder, values=None, size=90, cut=None, **options):
    model(folder)
    values = make_chip(size=size) if values is None else values
    path = write_scene(folder / "scene.tif", values, **options)
    if cut:
        path.write_bytes(path.read_bytes()[:cut])


def scene_and(folder, name):
    scene(folder)
    (folder / name).write_text("mine")


def scene_and_blocks(folder):
    """As a map that was killed on the way."""
    scene(folder)
    (folder / ".map.blocks").mkdir()
    (folder / ".map.blocks" / "000000_000000.npy").write_text("hours of work")


def vrt_without_source(folder):
    from rasterio.shutil import copy

    scene(folder)
    copy(folder / "scene.tif", folder / "scene.vrt", driver="VRT")
    (folder / "scene.tif").unlink()


def scenes_of_one_name(folder):
    scene(folder)
    for suffix in (".tif", ".tiff"):
        write_scene(folder / "several" / f"a{suffix}", make_chip(size=90))


def text(name, content):
    def make(folder):
        chips(folder)
        (folder / name).write_text(content)

    return make


def empty_file(folder):
    model(folder)
    (folder / "scene.tif").touch()


CHIPS = "predict --model_path model.safetensors --input chips --output out"
SCENE = "predict --model_path model.safetensors --input scene.tif --output map"
SHIP = "ship --model_path model.safetensors --output"
GAPS = np.zeros((3, 90, 90), np.uint8)


def of_chips(name, says, flags="", **made):
    return Fault(name, partial(chips, **made), f"{CHIPS} {flags}", says)


def of_scene(name, says, flags="", **made):
    return Fault(name, partial(scene, **made), f"{SCENE} {flags}", says)


def of_list(name, content, says):
    return Fault(name, text("list.csv", content), CHIPS.replace("chips", "list.csv"), says)


ROWS = [
    Fault(
        "ship what needs torch",
        model,
        f"{SHIP} deploy",
        ("model_path: model.safetensors needs this project to run", "openvino_int8.json"),
    ),
    Fault("ship over a folder", chips, f"{SHIP} chips", ("output: chips is there already",)),
    # Models and inputs
    Fault("predict without parameters", None, "predict", ("model_path", "input", "output")),
    Fault("model not there", None, CHIPS, ("model.safetensors",)),
    Fault(
        "model is no model", text("model.safetensors", "no model"), CHIPS, ("model.safetensors",)
    ),
    Fault(
        "variant's JSON is another",
        text("v.json", '{"name": "x"}'),
        CHIPS.replace("model.safetensors", "v.json"),
        ("v.json", "variant"),
    ),
    Fault("input not there", model, CHIPS, ("input: chips names no image",)),
    of_list("CSV without img_path", "path\na.png\n", ("list.csv", "img_path")),
    of_list("CSV without rows", "img_path\n", ("list.csv", "row")),
    Fault("picture called a TIFF", text("scene.tif", "GIF89a"), SCENE, ("scene.tif",)),
    # Chips
    of_chips("chips of another band count", ("4 bands", "of 3"), bands=4),
    of_chips(
        "chips of another type", ("uint16", "trained on uint8"), suffix=".npy", dtype="uint16"
    ),
    Fault(
        "no chip can be read",
        partial(chips, break_one=b"PNG"),
        CHIPS.replace("chips", "chips/tree/000.png"),
        ("none of 1 chips can be read",),
    ),
    Fault("predictions below a file", text("taken", ""), f"{CHIPS[:-3]}taken/out", ("taken",)),
    of_chips("unknown threshold", ("threshold: ", "'best'"), "--threshold best"),
    of_chips("threshold of one", ("threshold: ",), "--threshold 1.0"),
    of_chips("error rate of one", ("error_rate: ",), "--error_rate 1"),
    of_chips("chips on ray", ("engine: ray maps scenes",), "--engine ray"),
    # Scenes
    Fault("scene of no bytes", empty_file, f"{SCENE} --kind scene", ("scene.tif", "empty file")),
    of_scene("scene without coordinates", ("coordinate system",), crs=None),
    of_scene("rotated scene", ("rotated", "gdalwarp"), transform=NORTH_UP @ Affine.rotation(20)),
    of_scene(
        "south-up scene",
        ("north up", "gdalwarp"),
        transform=Affine(0.5, 0, 500_000, 0, 0.5, 4_000_000),
    ),
    of_scene("scene that lacks a band", ("2 bands", "of 3"), values=GAPS[:2] + 1),
    of_scene(
        "scene of another type", ("float32", "trained on uint8"), values=GAPS.astype("float32")
    ),
    of_scene("scene of complex numbers", ("complex64",), values=GAPS.astype("complex64")),
    of_scene("scene cut off", ("scene.tif", "cut off"), size=300, cut=60_000),
    of_scene("scene cut off in its header", ("scene.tif", "damaged"), "--kind scene", cut=100),
    Fault(
        "VRT without its source",
        vrt_without_source,
        SCENE.replace("scene.tif", "scene.vrt"),
        ("scene.vrt",),
    ),
    Fault(
        "scene smaller than a cell is one cell",
        partial(scene, size=9),
        f"{SCENE} --kind scene",
        ("wrote map.tif",),
        code=0,
    ),
    of_scene("stride of nothing", ("stride: ",), "--stride 0"),
    of_scene("stride above the window", ("stride: 29", "28"), "--stride 29"),
    of_scene("window of nothing", ("window: ",), "--window 0"),
    of_scene("no data asked for", ("min_data: ",), "--min_data 0"),
    # Maps
    Fault(
        "map below a file", partial(scene_and, name="taken"), f"{SCENE[:-3]}taken/map", ("taken",)
    ),
    Fault(
        "map in the place of its scene",
        scene,
        f"{SCENE[:-3]}scene --overwrite",
        ("would replace the scene",),
    ),
    Fault(
        "map among the scenes",
        scene,
        "predict --model_path model.safetensors --input . --kind scene --output maps",
        ("lies among the scenes",),
    ),
    Fault(
        "two scenes of one name",
        scenes_of_one_name,
        SCENE.replace("scene.tif", "several"),
        ("two scenes of one name",),
    ),
    of_scene("an engine that is none", ("engine: ", "dask"), "--engine dask"),
    Fault(
        "ray that is not installed loses no block",
        scene_and_blocks,
        f"{SCENE} --engine ray",
        ("engine: ray is not installed", "requirements-ray.txt"),
        patch=("helpers.cluster.find_spec", lambda name: None),
    ),
]
