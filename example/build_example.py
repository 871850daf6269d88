"""Rebuild the embedded example from the DeepForest wheel.

    pip download --no-deps deepforest==2.1.0
    python example/build_example.py deepforest-2.1.0-py3-none-any.whl

The wheel is read as a zip archive, never installed or imported. Writes `chips.zip`, `manifest.csv`,
`scene.tif`, `crowns.parquet` and `LICENSE.deepforest` beside this script and prints the table that
stands in `CARD.md`. A folder as second argument also receives the whole ground of the training
split, one PNG a scene: what `pretrain_backbone.py` may see of these scenes.
"""

import csv
import hashlib
import io
import sys
import xml.etree.ElementTree as ET
import zipfile
from collections import Counter
from pathlib import Path

import geopandas as gpd
import numpy as np
import rasterio
import shapely
from affine import Affine
from PIL import Image
from rasterio.crs import CRS

SCENES = {  # short name: file stem inside the wheel
    "YELL_528000": "2019_YELL_2_528000_4978000_image_crop2",
    "YELL_541000": "2019_YELL_2_541000_4977000_image_crop",
    "OSBS_029": "OSBS_029",
    "SOAP_061": "SOAP_061",
}
CHIP_SIZE = 98  # pixels: 7 x 7 patches of 14
BLOCK_SIZE = 4  # chips along one side of a block
TREE_COVER = 0.25  # at least this share of the chip under crown boxes: tree
NO_TREE_COVER = 0.02  # at most this share: no_tree
MAX_BLACK = 0.01  # share of pure black pixels above which a chip lies on the scene's border
# Bands of a scene from its top: split and the share of the height at which it ends. Bands touch in
# two lines only; with blocks of the splits interleaved, colours alone solve the task (AUROC 0.96).
SPLIT_BANDS = {"train": 0.5, "valid": 0.68, "test": 1.0}
MAPPED = "YELL_528000"  # whose test band is the scene to map
METRES = 0.1  # of a pixel on the ground
# Where on Earth the crop lies is not published with it: coordinates count from its own corner.
GROUND = 'LOCAL_CS["a crop of NEON, metres from its corner",UNIT["metre",1]]'
FIELDS = ["img_path", "label", "split", "group", "sha256"]


def crown_boxes(xml: bytes) -> np.ndarray:
    """Crown boxes of a Pascal-VOC annotation: (boxes, 4) int, x0, y0, x1, y1 in pixels."""
    boxes = [
        [int(box.findtext(tag)) for tag in ("xmin", "ymin", "xmax", "ymax")]
        for box in ET.fromstring(xml).iter("bndbox")
    ]
    return np.array(boxes).reshape(-1, 4)


def crown_mask(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Union of crown boxes (boxes, 4), as a (height, width) bool array."""
    mask = np.zeros((height, width), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def chip_label(pixels: np.ndarray, crowns: np.ndarray) -> str | None:
    """Class of one chip, or None for a chip to drop.

    `pixels` is (H, W, 3) uint8, `crowns` the matching (H, W) bool crown mask.
    """
    if (pixels == 0).all(axis=2).mean() > MAX_BLACK:
        return None
    cover = crowns.mean()
    if cover >= TREE_COVER:
        return "tree"
    return "no_tree" if cover <= NO_TREE_COVER else None


def row_split(row: int, rows: int) -> str:
    """Split of one of the `rows` rows of chips of a scene."""
    return next(split for split, end in SPLIT_BANDS.items() if row + 0.5 < end * rows)


def encode(pixels: np.ndarray) -> bytes:
    """JPEG of an (H, W, 3) uint8 chip, at full chroma resolution."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92, subsampling="4:4:4")
    return buffer.getvalue()


def cut_scene(name: str, pixels: np.ndarray, crowns: np.ndarray) -> list[tuple[dict, bytes]]:
    """Chips of one scene on a grid without overlap, as (manifest row, JPEG bytes)."""
    chips = []
    rows = pixels.shape[0] // CHIP_SIZE
    for row in range(rows):
        for column in range(pixels.shape[1] // CHIP_SIZE):
            y, x = row * CHIP_SIZE, column * CHIP_SIZE
            window = np.s_[y : y + CHIP_SIZE, x : x + CHIP_SIZE]
            label = chip_label(pixels[window], crowns[window])
            if label is None:
                continue
            split = row_split(row, rows)
            jpeg = encode(pixels[window])
            values = (
                f"chips/{label}/{name}_{row:02d}_{column:02d}.jpg",
                label,
                split,
                f"{name}_{split}_{row // BLOCK_SIZE}_{column // BLOCK_SIZE}",
                hashlib.sha256(jpeg).hexdigest(),
            )
            chips.append((dict(zip(FIELDS, values, strict=True)), jpeg))
    return chips


def training_ground(pixels: np.ndarray) -> np.ndarray:
    """The training band of a scene, dropped chips included."""
    rows = pixels.shape[0] // CHIP_SIZE
    n_train = sum(row_split(row, rows) == "train" for row in range(rows))
    return pixels[: n_train * CHIP_SIZE]


def write_scene(pixels: np.ndarray, boxes: np.ndarray, output: Path) -> None:
    """Write the test band of a scene (H, W, 3) as `scene.tif`, and its boxes as `crowns.parquet`.

    Boxes (n, 4) are of the whole scene; those that reach into the band are cut at its edge.
    """
    rows = pixels.shape[0] // CHIP_SIZE
    top = CHIP_SIZE * next(row for row in range(rows) if row_split(row, rows) == "test")
    band = pixels[top:]
    height, width = band.shape[:2]
    to_metres = Affine(METRES, 0, 0, 0, -METRES, height * METRES)
    crs = CRS.from_wkt(GROUND)
    with rasterio.open(
        output / "scene.tif", "w", driver="GTiff", height=height, width=width, count=3,
        dtype="uint8", crs=crs, transform=to_metres, tiled=True, blockxsize=256, blockysize=256,
        compress="jpeg", photometric="rgb", jpeg_quality=85,  # every colour at full resolution
    ) as raster:  # fmt: skip
        raster.write(band.transpose(2, 0, 1))
    x0, y0, x1, y1 = np.clip(boxes - [0, top, 0, top], 0, [width, height, width, height]).T
    inside = (x0 < x1) & (y0 < y1)
    west, north = to_metres @ (x0[inside], y0[inside])
    east, south = to_metres @ (x1[inside], y1[inside])
    crowns = gpd.GeoDataFrame(geometry=shapely.box(west, south, east, north), crs=crs.to_wkt())
    crowns.to_parquet(output / "crowns.parquet")


def summary_table(rows: list[dict]) -> str:
    """Markdown table of chip counts, class x scene x split, from manifest rows."""
    splits, labels = ("train", "valid", "test"), ("tree", "no_tree")
    counts = Counter((r["group"].rsplit("_", 3)[0], r["split"], r["label"]) for r in rows)
    lines = [
        "| scene | "
        + " | ".join(f"{split} {label}" for split in splits for label in labels)
        + " |",
        "|---|" + "---:|" * 6,
    ]
    for scene in SCENES:
        cells = [counts[scene, split, label] for split in splits for label in labels]
        lines.append(f"| {scene} | " + " | ".join(map(str, cells)) + " |")
    totals = [sum(counts[s, split, label] for s in SCENES) for split in splits for label in labels]
    return "\n".join([*lines, "| all | " + " | ".join(map(str, totals)) + " |"])


def read_scenes(wheel: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Scene name -> pixels (H, W, 3) uint8 and crown boxes (boxes, 4).

    Raises zipfile.BadZipFile for a file that is no archive, KeyError for one without the scenes.
    """
    scenes = {}
    with zipfile.ZipFile(wheel) as archive:
        for name, stem in SCENES.items():
            image = Image.open(io.BytesIO(archive.read(f"deepforest/data/{stem}.png")))
            pixels = np.asarray(image.convert("RGB"))
            xml = archive.read(f"deepforest/data/{stem}.xml")
            scenes[name] = pixels, crown_boxes(xml)
    return scenes


def pack(chips: list[tuple[str, bytes]], path: Path) -> None:
    """Write (name, JPEG) pairs as a zip file, not compressed again: the same bytes every time."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, jpeg in chips:
            entry = zipfile.ZipInfo(name)  # of 1980, by nobody
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, jpeg)


def build(wheel: Path, output: Path) -> list[dict]:
    """Write chips, manifest, scene and licence under `output`; returns the manifest's rows.

    Everything is cut before anything is written, so a wheel that `read_scenes` refuses changes
    nothing on disk.
    """
    scenes = read_scenes(wheel)
    chips = [
        chip
        for name, (pixels, boxes) in scenes.items()
        for chip in cut_scene(name, pixels, crown_mask(boxes, *pixels.shape[:2]))
    ]
    with zipfile.ZipFile(wheel) as archive:
        licence = archive.read("deepforest-2.1.0.dist-info/licenses/LICENSE")

    write_scene(*scenes[MAPPED], output)
    pack([(row["img_path"], jpeg) for row, jpeg in chips], output / "chips.zip")
    rows = [row for row, _ in chips]
    with open(output / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (output / "LICENSE.deepforest").write_bytes(licence)
    return rows


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not zipfile.is_zipfile(sys.argv[1]):
        sys.exit(
            "usage: python example/build_example.py deepforest-2.1.0-py3-none-any.whl [FOLDER]"
        )
    print(summary_table(build(Path(sys.argv[1]), Path(__file__).parent)))
    if len(sys.argv) == 3:
        folder = Path(sys.argv[2])
        folder.mkdir(parents=True, exist_ok=True)
        for scene, (scene_pixels, _) in read_scenes(Path(sys.argv[1])).items():
            Image.fromarray(training_ground(scene_pixels)).save(folder / f"{scene}.png")
