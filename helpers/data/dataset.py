"""A checked data set and its chips as a torch `Dataset`.

Every file is read once to check it; what was found is one row of the manifest.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from rasterio.crs import CRS
from sklearn.preprocessing import StandardScaler
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from helpers import InputError
from helpers.config import Config
from helpers.data.chips import FORMATS, read_chip, read_chip_and_missing
from helpers.data.example import unpacked_example
from helpers.data.leakage import find_leaks, inseparable, relations
from helpers.data.manifest import (
    check_classes_in_splits,
    check_paths,
    check_pixels,
    find_chips,
    pick_classes,
    scan,
    unreadable_message,
)
from helpers.data.splits import SPLITS, make_splits


def resize(chips: torch.Tensor, size: int) -> torch.Tensor:
    """Chips (..., bands, H, W) as squares of `size` pixels (bicubic, antialiased), same dtype."""
    if chips.shape[-2:] == (size, size):
        return chips
    return F.resize(chips, [size, size], F.InterpolationMode.BICUBIC, antialias=True)


class ChipDataset(Dataset):
    """The chips of one split: (chip tensor (bands, S, S), target) of S = image_size pixels.

    A chip is uint8 when its file is, float32 otherwise; values are those of the file.
    Attributes: `targets` (LongTensor (n,)) and `paths` (list of Path).
    """

    def __init__(self, paths: list[Path], targets: Iterable[int], bands: Sequence[int], size: int):
        """Keep the paths; nothing is read until an item is asked for."""
        self.paths, self.bands, self.image_size = paths, bands, size
        self.targets = torch.as_tensor(list(targets), dtype=torch.long)

    def __len__(self) -> int:
        """Return the number of chips."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Read one chip, resized (bicubic, antialiased) where its size is another."""
        chip = torch.from_numpy(read_chip(self.paths[index], self.bands))
        return resize(chip, self.image_size), int(self.targets[index])

    def valid_pixels(self, index: int) -> np.ndarray:
        """The pixels of a chip as it is trained on, float64 (S * S, bands); NaN for nodata."""
        chip, missing = read_chip_and_missing(self.paths[index], self.bands)
        pixels = resize(torch.from_numpy(chip), self.image_size).double()
        if missing is not None:  # of a resized pixel, at least half
            share = resize(torch.from_numpy(missing.astype(np.float32)), self.image_size)
            pixels[share >= 0.5] = torch.nan
        return pixels.flatten(1).T.numpy()

    def examples(self, target: int, count: int) -> torch.Tensor:
        """Chips of one class for a look, evenly spaced over the split, (count, bands, S, S)."""
        of_class = (self.targets == target).nonzero().flatten()
        chosen = torch.linspace(0, len(of_class) - 1, min(count, len(of_class))).round().long()
        return torch.stack([self[int(i)][0] for i in of_class[chosen]])


@dataclass(frozen=True)
class ChipData:
    """A checked data set: where it lies, its manifest, its classes and the bands in use.

    `manifest` has one row a chip: img_path (posix, relative to `root`), label (final class name),
    target (index in `classes`), split, group ("" where none), height and width (pixels), n_bands,
    dtype, min and max (of all bands in the file), nodata (share of the values in use that have
    none), sha256 of the file, resolution (side of a pixel in ground units) and crs of the chips
    that carry coordinates (NaN and "" for others), and the columns that the input had besides.
    `skipped` has img_path and reason. With two classes, `classes[1]` is the positive one.
    `layout` says in words what was found and which splits were made, `leaks` what two splits
    share (empty when they share nothing).
    """

    root: Path
    manifest: pd.DataFrame
    classes: tuple[str, ...]
    bands: tuple[int, ...]
    skipped: pd.DataFrame
    layout: str
    leaks: list[str]

    @property
    def fingerprint(self) -> str:
        """Short SHA-256 of what decides pixels, labels and their order, wherever the data lie."""
        return self._digest(self.manifest)

    def split_fingerprint(self, split: str) -> str:
        """The same of one split alone: it does not change with the chips of the others."""
        return self._digest(self.manifest[self.manifest["split"] == split])

    def _digest(self, manifest: pd.DataFrame) -> str:
        rows = manifest[["sha256", "target", "split"]].to_csv(index=False)
        return hashlib.sha256(f"{rows}{self.bands}".encode()).hexdigest()[:16]

    @property
    def chip_facts(self) -> dict:
        """What a classifier keeps of its chips: the last fields of `ClassifierConfig`."""
        dtypes = self.manifest["dtype"].unique()
        return {
            "chip_size": round(self.manifest[["height", "width"]].median(axis=None)),
            "chip_bands": int(self.manifest["n_bands"].iloc[0]),
            "chip_dtype": str(dtypes[0]) if len(dtypes) == 1 else None,
            "resolution": self._metres_per_pixel(),
        }

    def _metres_per_pixel(self) -> float | None:
        """Median over the chips with coordinates in metres or feet, not in degrees."""
        rows = self.manifest[self.manifest["crs"] != ""]
        systems = {name: CRS.from_string(name) for name in rows["crs"].unique()}
        units = {n: crs.units_factor[1] for n, crs in systems.items() if not crs.is_geographic}
        factors = rows["crs"].map(units).astype(float)  # NaN for degrees
        metres = (rows["resolution"] * factors).median()
        return None if np.isnan(metres) else float(metres)

    def dataset(self, split: str, image_size: int) -> ChipDataset:
        """Return the chips of `split`, square at `image_size` pixels, in manifest order."""
        if split not in SPLITS:
            raise InputError(f"split: '{split}' is unknown. Use one of {', '.join(SPLITS)}.")
        rows = self.manifest[self.manifest["split"] == split]
        paths = [self.root / path for path in rows["img_path"]]
        return ChipDataset(paths, rows["target"], self.bands, image_size)


def band_statistics(data: ChipData, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each band over the training split, in chip units.

    Both float32 (bands,), over all pixels of the chips at `image_size` that have data; computed in
    float64 over a stream of batches. A constant band has standard deviation 1, so that dividing
    by it is safe.
    """
    scaler, chips = StandardScaler(), data.dataset("train", image_size)
    for batch in np.array_split(np.arange(len(chips)), range(64, len(chips), 64)):
        scaler.partial_fit(np.concatenate([chips.valid_pixels(index) for index in batch]))
    return scaler.mean_.astype(np.float32), scaler.scale_.astype(np.float32)


# A class may be called 1: a notebook's `positive_class = 1` means the class "1".
ClassName = Annotated[str, Field(coerce_numbers_to_str=True)]


class DataConfig(Config):
    """What `load_data` takes, as the command line and the notebooks offer it."""

    data_path: str = Field(
        "example", description="folder, CSV manifest, `eurosat`, or `example` (embedded)"
    )
    bands: tuple[int, ...] | None = Field(
        None, description="zero-based bands, in order; the first three by default"
    )
    classes: tuple[ClassName, ...] | None = Field(None, description="classes to keep, in order")
    positive_class: ClassName | None = Field(
        None, description="the positive one; of more than two classes the others are merged"
    )
    group_column: str = Field("group", description="manifest column of what stays in one split")
    split_seed: int = Field(0, ge=0, lt=2**32, description="of the splits that are made")
    on_unreadable: Literal["error", "skip"] = Field("error", description="error or skip")
    on_leakage: Literal["warn", "error"] = Field(
        "warn", description="if given splits share images, groups or ground: warn or error"
    )

    def data(self) -> ChipData:
        """Find, read and check all chips and make the splits that are missing: `load_data`."""
        path = str(unpacked_example()) if self.data_path == "example" else self.data_path
        root, entries, layout = find_chips(path, self.group_column)
        if entries.empty:
            raise InputError(f"{path}: no images found. Known: {', '.join(FORMATS)}.")
        entries = check_paths(root, entries)
        labels, names = pick_classes(entries["label"], self.classes, self.positive_class, root)
        entries = entries.assign(label=labels)[labels.notna()].reset_index(drop=True)
        manifest, skipped = scan(root, entries, self.bands)
        if len(skipped) and (self.on_unreadable == "error" or manifest.empty):
            raise InputError(unreadable_message(root, skipped, len(entries)))
        bands = check_pixels(manifest, self.bands)
        manifest["target"] = manifest["label"].map(names.index)
        shared = relations(manifest)
        manifest = manifest.drop(columns=["look", "corners"])
        manifest, made = make_splits(manifest, inseparable(shared.values()), self.split_seed)
        check_classes_in_splits(manifest, names, root)
        if made:
            layout += f"; {' and '.join(sorted(made))} made here with seed {self.split_seed}"
        leaks = find_leaks(manifest, shared)
        if leaks and self.on_leakage == "error":
            raise InputError(f"{root}: {'; '.join(leaks)}. Keep each in one split.")
        return ChipData(root, manifest, names, bands, skipped, layout, leaks)


def load_data(data_path: str | Path, **parameters) -> ChipData:
    """Find, read and check every chip under `data_path`, and make the splits that are missing.

    Missing splits are made from train: a fifth of it each, stratified, seeded; whole groups,
    copies (byte-identical or re-encoded) and chips whose ground overlaps (GeoTIFFs) stay together.
    Pixels without data are filled as `read_chip` says. Memory grows with the manifest rows only,
    not the pixels.

    Args:
        data_path: folder with a CSV manifest, with `train_clean.csv` and the like, with split
            folders or with class folders; a CSV manifest (img_path, label, optional split and
            group); or `eurosat` (torchvision, downloaded to ./data) or `example` (embedded).
        parameters: the other fields of `DataConfig`. Classes are sorted by name, or by value where
            all are numbers; unreadable files that are skipped are listed in `skipped`.

    Raises:
        InputError: for everything that is wrong with the data or a parameter.
    """
    return DataConfig.checked(data_path=str(data_path), **parameters).data()
