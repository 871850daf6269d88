"""A checked data set and its chips as a torch `Dataset`.

Every file is read once to check it; what was found is one row of the manifest.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from helpers import InputError
from helpers.config import Config
from helpers.data.chips import FORMATS, read_chip
from helpers.data.manifest import (
    check_classes_in_splits,
    check_option,
    check_paths,
    check_pixels,
    find_chips,
    pick_classes,
    scan,
    unreadable_message,
)
from helpers.data.splits import SPLITS, find_leaks, make_splits
from helpers.records import ROOT

EXAMPLE = ROOT / "example"


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
    dtype, min and max (of all bands in the file), sha256 of the file, and the columns that the
    input had beside these. `skipped` has img_path and reason. With two classes, `classes[1]` is
    the positive one. `layout` says in words what was found and which splits were made, `leaks`
    what two splits share (empty when they share nothing).
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
        }

    def dataset(self, split: str, image_size: int) -> ChipDataset:
        """Return the chips of `split`, square at `image_size` pixels, in manifest order."""
        if split not in SPLITS:
            raise InputError(f"split: '{split}' is unknown. Use one of {', '.join(SPLITS)}.")
        rows = self.manifest[self.manifest["split"] == split]
        paths = [self.root / path for path in rows["img_path"]]
        return ChipDataset(paths, rows["target"], self.bands, image_size)


def load_data(
    data_path: str | Path,
    *,
    bands: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    positive_class: str | None = None,
    group_column: str = "group",
    seed: int = 0,
    on_unreadable: str = "error",
    on_leakage: str = "warn",
) -> ChipData:
    """Find, read and check every chip under `data_path`, and make the splits that are missing.

    data_path: folder with `manifest.csv`, with `train_clean.csv` and the like, with split
        folders or with class folders; a CSV manifest (img_path, label, optional split and group);
        or the word `eurosat` (torchvision, downloaded to ./data).
    bands: zero-based bands to use, in order; None takes the first three (all of fewer).
    classes: class names to keep, in the order of their targets; None keeps all, alphabetically.
    positive_class: the class with target 1; more than two classes become it against `rest`.
    group_column: manifest column naming what must stay in one split (a scene, a block).
    on_unreadable: "error", or "skip" to list unreadable files in `skipped` and go on.
    on_leakage: "warn" (in the report), or "error", when given splits share images or groups.

    Missing splits are made from train: a fifth of it each, stratified, seeded; whole groups and
    byte-identical files stay together. Memory grows with the manifest rows only, not the pixels.
    Raises InputError for everything that is wrong with the data or a parameter.
    """
    check_option("on_unreadable", on_unreadable, ("error", "skip"))
    check_option("on_leakage", on_leakage, ("warn", "error"))
    if seed not in range(2**32):
        raise InputError(f"seed: {seed} is not a whole number from 0 to 2**32 - 1.")
    root, entries, layout = find_chips(data_path, group_column)
    if entries.empty:
        raise InputError(f"{data_path}: no images found. Known: {', '.join(FORMATS)}.")
    entries = check_paths(root, entries)
    labels, names = pick_classes(entries["label"], classes, positive_class, root)
    entries = entries.assign(label=labels)[labels.notna()].reset_index(drop=True)
    manifest, skipped = scan(root, entries)
    if len(skipped) and (on_unreadable == "error" or manifest.empty):
        raise InputError(unreadable_message(root, skipped, len(entries)))
    bands = check_pixels(manifest, bands)
    manifest["target"] = manifest["label"].map(names.index)
    manifest, made = make_splits(manifest, seed)
    check_classes_in_splits(manifest, names, root)
    if made:
        layout += f"; {' and '.join(sorted(made))} made here with seed {seed}"
    leaks = find_leaks(manifest)
    if leaks and on_leakage == "error":
        raise InputError(f"{root}: {'; '.join(leaks)}. Keep each in one split.")
    return ChipData(root, manifest, names, bands, skipped, layout, leaks)


def band_statistics(data: ChipData, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each band over the training split, in chip units.

    Both float32 (bands,), over all pixels of the chips at `image_size`; computed in float64 over
    a stream of batches. A constant band has standard deviation 1, so that dividing by it is safe.
    """
    scaler = StandardScaler()
    for chips, _ in DataLoader(data.dataset("train", image_size), batch_size=64):
        scaler.partial_fit(chips.movedim(1, -1).flatten(0, -2).double().numpy())
    return scaler.mean_.astype(np.float32), scaler.scale_.astype(np.float32)


class DataConfig(Config):
    """The parameters of `load_data`, as the command line and the notebooks offer them."""

    data_path: str = Field(
        "example", description="folder, CSV manifest, `eurosat`, or `example` (embedded)"
    )
    bands: tuple[int, ...] | None = Field(
        None, description="zero-based bands, in order; the first three by default"
    )
    classes: tuple[str, ...] | None = Field(None, description="classes to keep, in order")
    positive_class: str | None = Field(
        None, description="the positive one; of more than two classes the others are merged"
    )
    group_column: str = Field("group", description="manifest column of what stays in one split")
    split_seed: int = Field(0, ge=0, lt=2**32, description="of the splits that are made")
    on_unreadable: Literal["error", "skip"] = Field("error", description="error or skip")
    on_leakage: Literal["warn", "error"] = Field(
        "warn", description="if given splits share images or groups: warn or error"
    )

    def data(self) -> ChipData:
        """Load and check the chips; raises as `load_data`."""
        options = self.model_dump(include=set(DataConfig.model_fields) - {"data_path"})
        seed = options.pop("split_seed")
        path = EXAMPLE if self.data_path == "example" else self.data_path
        return load_data(path, seed=seed, **options)
