"""Small makers of fake chips and manifests, shared by the tests.

Class k of a set is brighter than class k - 1, so that a model can learn the difference (every
fourth begins again, since pixels end at 255).
"""

from pathlib import Path

import numpy as np
import pandas as pd
import rasterio
from PIL import Image

CLASSES = ("no_tree", "tree")
COUNTS = {"train": 6, "valid": 2, "test": 2}  # chips of each class


def make_chip(seed=0, *, target=0, size=28, bands=3, dtype="uint8"):
    """Noise (bands, size, size) around a brightness by class, as 8-bit values."""
    noise = np.random.default_rng(seed).normal(60 + 60 * (target % 3), 20, (bands, size, size))
    return noise.clip(0, 255).astype(dtype)


def write_chip(path, chip, **profile):
    """Write (bands, height, width) in the format that the suffix names; return the path.

    `profile` goes to GDAL: crs and transform, nodata, compress.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower()
    if suffix == ".npy":
        np.save(path, chip)
    elif suffix in (".tif", ".tiff") or chip.dtype == np.uint16:
        driver = "PNG" if suffix == ".png" else "GTiff"
        count, height, width = chip.shape
        profile |= {"count": count, "height": height, "width": width, "dtype": chip.dtype.name}
        with rasterio.MemoryFile() as memory:
            with memory.open(driver=driver, **profile) as raster:
                raster.write(chip)
            path.write_bytes(memory.read())
    else:
        Image.fromarray(chip.transpose(1, 2, 0).squeeze()).save(path)
    return path


def class_folders(root, *, per_class=10, classes=CLASSES, suffix=".png", first_seed=0, **chip):
    """Write `root/class/000.png` and so on, all different; return root."""
    for target, name in enumerate(classes):
        for number in range(per_class):
            seed = first_seed + 10_000 * target + number
            path = Path(root, name, f"{number:03d}{suffix}")
            write_chip(path, make_chip(seed, target=target, **chip))
    return Path(root)


def split_folders(root, *, counts=COUNTS, **options):
    """Write `root/split/class/000.png` and so on, all different; return root."""
    for position, (split, per_class) in enumerate(counts.items()):
        first_seed = 1000 * position
        class_folders(Path(root, split), per_class=per_class, first_seed=first_seed, **options)
    return Path(root)


def manifest_rows(root, *, counts=COUNTS, **options):
    """Write the chips of `split_folders`; return one row each: img_path, label, split, group.

    Every two neighbouring chips of a class are one group.
    """
    split_folders(root, counts=counts, **options)
    paths = sorted(path.relative_to(root) for path in Path(root).glob("*/*/*"))
    rows = [(path.as_posix(), path.parts[1], path.parts[0]) for path in paths]
    table = pd.DataFrame(rows, columns=["img_path", "label", "split"])
    pair = table.groupby(["split", "label"]).cumcount() // 2
    return table.assign(group=table["split"] + "_" + table["label"] + "_" + pair.astype(str))


def manifest_folder(root, **options):
    """Write chips and `root/manifest.csv` with the rows of `manifest_rows`; return root."""
    manifest_rows(root, **options).to_csv(Path(root, "manifest.csv"), index=False)
    return Path(root)


def write_scene(path, values, *, crs="EPSG:32615", transform=None, **profile):
    """Write (bands, height, width) as a tiled GeoTIFF of half a metre a pixel; return the path."""
    count, height, width = values.shape
    transform = transform or rasterio.transform.from_origin(500_000, 4_000_000, 0.5, 0.5)
    profile = {"count": count, "height": height, "width": width, "dtype": values.dtype.name,
               "crs": crs, "transform": transform, "tiled": True, "blockxsize": 64,
               "blockysize": 64, "compress": "deflate", **profile}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", driver="GTiff", **profile) as raster:
        raster.write(values)
    return path
