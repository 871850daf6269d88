"""From a folder, a CSV manifest or a torchvision data set to a checked manifest and a `Dataset`.

`python -m helpers.load_data --data_path ./data/` prints the data report.

A chip is one image file: JPEG, PNG, TIFF/GeoTIFF or `.npy` of shape (bands, height, width).
Every file is read once to check it; what was found is one row of the manifest.
"""

import hashlib
import io
import os
import posixpath
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import rasterio
import torch
from PIL import Image
from pydantic import Field
from rasterio.errors import NotGeoreferencedWarning
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import EuroSAT
from torchvision.transforms.v2 import functional as F

from helpers import InputError
from helpers.config import Config
from helpers.console import progress_bar, run_command

EXAMPLE = Path(__file__).resolve().parent.parent / "example"
SPLITS = ("train", "valid", "test")
SPLIT_NAMES = {s: s for s in SPLITS} | {"val": "valid", "validation": "valid"}
FORMATS = {
    **dict.fromkeys((".jpg", ".jpeg", ".png"), "JPEG or PNG image"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF image"),
    ".npy": ".npy array of numbers (objects are never unpickled)",
}
MAX_VALUES = 200_000_000  # of one TIFF; a small file can claim any size. Pillow has its own limit
REST = "rest"  # the merged negative class of one-vs-rest

# A chip cut out of a scene often carries no coordinates, and none are needed here.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)


# --------------------------------------------------------------------------- reading one chip


def read_chip(path: str | Path, bands: Sequence[int] | None = None) -> np.ndarray:
    """Read one chip as (bands, height, width), uint8, or float32 for every other stored type.

    Values are not scaled. `bands` picks and orders zero-based bands; None keeps all of them.
    Raises InputError when the file cannot be read whole, holds NaN or infinity, or lacks a band.
    """
    try:
        chip, _ = _read(Path(path))
    except InputError as error:
        raise InputError(f"{path}: {error}. Replace or remove the file.") from error
    if bands is not None:
        _check_bands(bands, len(chip))
        chip = chip[list(bands)]
    return chip if chip.dtype == np.uint8 else chip.astype(np.float32)


def _read(path: Path) -> tuple[np.ndarray, bytes]:
    """Return the chip in the file's own dtype, and the file's bytes; InputError says why not."""
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"file type '{suffix}' is not one of {', '.join(FORMATS)}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be opened ({error.strerror})") from error
    if not data:
        raise InputError("empty file (0 bytes)")
    try:
        chip = _decode(data, suffix)
    except Image.DecompressionBombError as error:
        raise InputError(f"too large for a chip ({error})") from error
    except Exception as error:  # on damaged bytes the decoders raise errors of almost any type
        raise InputError(f"damaged, cut off, or not a {FORMATS[suffix]}") from error
    _check_values(chip)
    return chip, data


def _decode(data: bytes, suffix: str) -> np.ndarray:
    if suffix == ".npy":
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    if suffix in (".tif", ".tiff"):
        return _decode_raster(data, "GTiff")
    if data.startswith(b"\x89PNG") and data[24:25] == b"\x10":
        return _decode_raster(data, "PNG")  # Pillow would cut 16-bit colour down to 8 bits
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        if image.mode not in ("L", "LA", "RGB", "RGBA"):  # palette, 1 bit, CMYK
            image = image.convert("L" if image.mode == "1" else "RGB")
        return np.atleast_3d(np.array(image)).transpose(2, 0, 1)


def _decode_raster(data: bytes, driver: str) -> np.ndarray:
    """Read from memory with one named GDAL driver: no side-car files, no format guessing."""
    with rasterio.MemoryFile(data) as memory, memory.open(driver=driver) as raster:
        values = raster.width * raster.height * raster.count
        if values > MAX_VALUES:
            raise Image.DecompressionBombError(f"{values:,} values")
        return raster.read()


def _check_values(chip: np.ndarray) -> None:
    if chip.ndim != 3 or 0 in chip.shape:
        raise InputError(f"shape {chip.shape} is not (bands, height, width)")
    if chip.dtype.kind not in "buif":
        raise InputError(f"data type {chip.dtype} is not a real number")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite and is refused
        if chip.dtype.kind == "f" and not np.isfinite(chip.astype(np.float32)).all():
            raise InputError("holds NaN or infinite values")


def _check_bands(bands: Sequence[int], n_bands: int) -> None:
    outside = [band for band in bands if band not in range(n_bands)]
    if outside:
        raise InputError(f"bands: {outside} out of range, a chip has bands 0 to {n_bands - 1}.")


# ------------------------------------------------------------------------------ what is there


def _find_chips(data_path: str | Path, group_column: str) -> tuple[Path, pd.DataFrame, str]:
    """Return (root, entries, name of the layout); entries: img_path, label, split, group, …"""
    root = _download_eurosat() if data_path == "eurosat" else Path(data_path)
    if not root.exists():
        raise InputError(f"data_path: {root} does not exist. Give a folder or a CSV manifest.")
    csv = root if root.is_file() else root / "manifest.csv"
    if csv.suffix.lower() != ".csv":
        raise InputError(f"data_path: {csv} is no CSV file. Give a folder or a CSV manifest.")
    if csv.exists():
        return csv.parent, _read_csv(csv, group_column), f"CSV manifest {csv.name}"
    per_split = {s: root / f"{s}_clean.csv" for s in SPLITS if (root / f"{s}_clean.csv").exists()}
    if per_split:
        tables = [_read_csv(csv, group_column).assign(split=s) for s, csv in per_split.items()]
        return root, pd.concat(tables, ignore_index=True), "one CSV per split"
    if group_column != "group":
        raise InputError(f"group_column: folders have no column '{group_column}'. Use a manifest.")
    entries = _read_folders(root)
    return root, entries, "split folders" if entries["split"].any() else "class folders"


def _read_csv(csv: Path, group_column: str) -> pd.DataFrame:
    """Read a manifest; every row has a label and a known (or no) split, further columns stay."""
    text = dict.fromkeys(("img_path", "label", "split", group_column), str)
    try:  # keep_default_na: a class may well be called "None" or "NA"
        entries = pd.read_csv(csv, dtype=text, keep_default_na=False, skipinitialspace=True)
    except (ValueError, OSError) as error:  # ValueError: also what pandas raises when parsing
        raise InputError(f"{csv}: not a readable CSV file ({str(error).strip()}).") from error
    if not isinstance(entries.index, pd.RangeIndex):  # pandas took a column for row names
        raise InputError(f"{csv}: rows have more cells than the header. Quote cells with commas.")
    wanted = ["img_path", "label"] + [group_column] * (group_column != "group")
    missing = [column for column in wanted if column not in entries]
    if missing:
        raise InputError(
            f"{csv}: column {', '.join(missing)} is missing, found: {', '.join(entries)}. "
            "A manifest needs img_path and label; split and group are optional."
        )
    entries["group"] = entries.get(group_column, "")
    entries["split"] = entries.get("split", "")
    for column in ("img_path", "label", "split", "group"):
        entries[column] = entries[column].str.strip()
    for column in ("img_path", "label"):
        _refuse_rows(csv, entries, entries[column] == "", f"{column} is empty", "Fill it in.")
    if (entries["split"] != "").any():
        splits = entries["split"].str.lower().map(SPLIT_NAMES)
        remedy = f"Use one of {', '.join(SPLIT_NAMES)}."
        _refuse_rows(csv, entries, splits.isna(), "split is unknown or empty", remedy)
        entries["split"] = splits
    return entries


def _refuse_rows(
    source: Path, entries: pd.DataFrame, bad: pd.Series, what: str, remedy: str
) -> None:
    if bad.any():
        first = int(bad.argmax())
        row = entries["img_path"].iloc[first] or f"row {first + 1} below the header"
        raise InputError(f"{source}: {row}: {what} ({bad.sum()} of {len(bad)} rows). {remedy}")


def _read_folders(root: Path) -> pd.DataFrame:
    """List `class/…/chip` or `split/class/…/chip`; hidden files and other file types are left."""
    files = [file.relative_to(root) for file in _walk(root) if file.suffix.lower() in FORMATS]
    tops = {file.parts[0] for file in files if len(file.parts) > 1}
    in_splits = {top for top in tops if top.lower() in SPLIT_NAMES}
    if in_splits and in_splits != tops:
        raise InputError(
            f"{root}: split folders ({', '.join(sorted(in_splits))}) beside others "
            f"({', '.join(sorted(tops - in_splits))}). Separate them, or write a manifest.csv."
        )
    depth = 1 if in_splits else 0
    loose = [file for file in files if len(file.parts) < depth + 2]
    if loose:
        raise InputError(
            f"{root / loose[0]}: lies in no class folder ({len(loose)} such images). "
            "Move it into one, or write a manifest.csv with img_path,label."
        )
    return pd.DataFrame(
        {
            "img_path": [file.as_posix() for file in files],
            "label": [file.parts[depth] for file in files],
            "split": [SPLIT_NAMES[file.parts[0].lower()] if depth else "" for file in files],
            "group": "",
        }
    )


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if Path(folder, name).is_symlink():
                raise InputError(f"{Path(folder, name)}: a linked folder. Put the images inside.")
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))


def _download_eurosat() -> Path:
    """Download EuroSAT (90 MB) unless it is there; an interrupted download leaves nothing."""
    folder = Path("data/eurosat/2750")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            try:
                EuroSAT(temporary, download=True)
            except (OSError, RuntimeError) as error:
                raise InputError(
                    f"data_path: eurosat cannot be downloaded ({error}). Download it elsewhere "
                    "and give the folder that holds its class folders as data_path."
                ) from error
            Path(temporary, "eurosat", "2750").rename(folder)
    return folder


def _check_paths(root: Path, entries: pd.DataFrame) -> pd.DataFrame:
    """Normalise img_path; refuse paths that leave the root and rows that name a file twice."""
    real_root = root.resolve()

    def leaves(path: str) -> bool:
        return posixpath.isabs(path) or not (root / path).resolve().is_relative_to(real_root)

    outside = entries["img_path"].map(leaves)
    remedy = "Use paths relative to the data folder, and put the images inside it."
    _refuse_rows(root, entries, outside, "leaves the data folder", remedy)
    entries = entries.assign(img_path=entries["img_path"].map(posixpath.normpath))
    repeated = entries["img_path"].duplicated()
    _refuse_rows(root, entries, repeated, "is listed twice", "Keep one row a chip.")
    return entries


# ------------------------------------------------------------------------- classes and splits


def _pick_classes(
    labels: pd.Series, classes: Sequence[str] | None, positive_class: str | None, root: Path
) -> tuple[pd.Series, tuple[str, ...]]:
    """Return (final labels, class names by target); rows of other classes get no label (NaN)."""
    present = sorted(labels.unique())
    names = [str(name) for name in (present if classes is None else classes)]
    absent = [name for name in names if name not in present]
    if absent:
        raise InputError(f"classes: {absent[0]} is not in {root}; it has {', '.join(present)}.")
    if len(set(names)) < max(2, len(names)):
        raise InputError(
            f"{root}: at least two different classes are needed, not just {', '.join(names)}. "
            "Give a data_path that holds one folder a class, or other `classes`."
        )
    labels = labels.where(labels.isin(names))
    if positive_class is not None:
        others = [name for name in names if name != str(positive_class)]
        if len(others) == len(names):
            raise InputError(f"positive_class: {positive_class} is not one of {', '.join(names)}.")
        negative = others[0] if len(others) == 1 else REST
        labels = labels.replace(dict.fromkeys(others, negative))
        names = [negative, str(positive_class)]
    return labels, tuple(names)


def _make_splits(manifest: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, list[str]]:
    """Carve each missing split out of train, a fifth of it: stratified, seeded, groups whole."""
    split = manifest["split"].where(manifest["split"] != "", "train")
    if "train" not in set(split):
        raise InputError("split: no image is in train. Mark the training images as train.")
    made = [name for name in ("test", "valid") if name not in set(split)]
    inseparable = _inseparable(manifest)
    grouped = (manifest["group"] != "").any()
    for n_folds, name in zip((5, 4), made, strict=False):  # the second fifth: a quarter of 4/5
        train = np.flatnonzero(split == "train")
        labels, units = manifest["label"].to_numpy()[train], inseparable[train]
        split.iloc[train[_one_fold(labels, units, grouped, n_folds, name, seed)]] = name
    return manifest.assign(split=split), made


def _inseparable(manifest: pd.DataFrame) -> np.ndarray:
    """Number the sets of chips that must share a split: one group, or byte-identical files."""
    group = pd.factorize(manifest["group"].where(manifest["group"] != "", manifest["img_path"]))[0]
    image = pd.factorize(manifest["sha256"])[0] + len(manifest)
    edges = coo_array((np.ones(len(manifest)), (group, image)), shape=(2 * len(manifest),) * 2)
    return connected_components(edges, directed=False)[1][group]


def _one_fold(
    labels: np.ndarray, units: np.ndarray, grouped: bool, n: int, name: str, seed: int
) -> np.ndarray:
    """Return the positions of one of n stratified folds that keeps every unit whole."""
    independent = pd.Series(units).groupby(labels).nunique()
    if independent.min() < n:
        raise InputError(
            f"class {independent.idxmin()} has {independent.min()} independent images or groups, "
            f"at least {n} are needed to make the {name} split. Add images, or give a split column."
        )
    if grouped:
        folds = StratifiedGroupKFold(n, shuffle=True, random_state=seed)
        return next(folds.split(labels, labels, units))[1]
    # Without groups a unit is one image and its rare copies; for 50,000 units the line above
    # takes 13 s, this one 0.1 s, and the folds are as even.
    folds = StratifiedKFold(n, shuffle=True, random_state=seed)
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    return np.flatnonzero(np.isin(unit, next(folds.split(first, labels[first]))[1]))


# ------------------------------------------------------------------------------ the whole set


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
        size = [self.image_size, self.image_size]
        if list(chip.shape[1:]) != size:
            chip = F.resize(chip, size, F.InterpolationMode.BICUBIC, antialias=True)
        return chip, int(self.targets[index])

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
    the positive one. `layout` says in words what was found and which splits were made.
    """

    root: Path
    manifest: pd.DataFrame
    classes: tuple[str, ...]
    bands: tuple[int, ...]
    skipped: pd.DataFrame
    layout: str

    @property
    def fingerprint(self) -> str:
        """Short SHA-256 of what decides pixels, labels and their order, wherever the data lie."""
        rows = self.manifest[["sha256", "target", "split"]].to_csv(index=False)
        return hashlib.sha256(f"{rows}{self.bands}".encode()).hexdigest()[:16]

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
    _check_choice("on_unreadable", on_unreadable, ("error", "skip"))
    _check_choice("on_leakage", on_leakage, ("warn", "error"))
    if seed not in range(2**32):
        raise InputError(f"seed: {seed} is not a whole number from 0 to 2**32 - 1.")
    root, entries, layout = _find_chips(data_path, group_column)
    if entries.empty:
        raise InputError(f"{data_path}: no images found. Known: {', '.join(FORMATS)}.")
    entries = _check_paths(root, entries)
    labels, names = _pick_classes(entries["label"], classes, positive_class, root)
    entries = entries.assign(label=labels)[labels.notna()].reset_index(drop=True)
    manifest, skipped = _scan(root, entries)
    if len(skipped) and (on_unreadable == "error" or manifest.empty):
        raise InputError(_unreadable_message(root, skipped, len(entries)))
    bands = _check_pixels(manifest, bands)
    manifest["target"] = manifest["label"].map(names.index)
    manifest, made = _make_splits(manifest, seed)
    _check_classes_in_splits(manifest, names, root)
    if made:
        layout += f"; {' and '.join(sorted(made))} made here with seed {seed}"
    data = ChipData(root, manifest, names, bands, skipped, layout)
    leaks = _leaks(data)
    if leaks and on_leakage == "error":
        raise InputError(f"{root}: {'; '.join(leaks)}. Keep each in one split.")
    return data


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name}: '{value}' is unknown. Use {' or '.join(choices)}.")


def _scan(root: Path, entries: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read every file once, in threads (the decoders release the GIL); keep the facts only."""

    def inspect(img_path: str) -> dict:
        try:
            chip, data = _read(root / img_path)
        except InputError as error:
            return {"img_path": img_path, "reason": str(error)}
        return {
            **dict(zip(("n_bands", "height", "width"), chip.shape, strict=True)),
            "dtype": str(chip.dtype),
            "min": chip.min().item(),
            "max": chip.max().item(),
            "sha256": hashlib.sha256(data).hexdigest(),
        }

    paths, found = entries["img_path"].tolist(), []
    bar = progress_bar(total=len(paths), desc="reading chips", unit="chip")
    with bar, ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), 1024):  # in portions, so that the queue stays short
            for facts in pool.map(inspect, paths[start : start + 1024]):
                found.append(facts)
                bar.update()
    readable = np.array(["sha256" in facts for facts in found])
    manifest = entries[readable].reset_index(drop=True)
    manifest = manifest.assign(**pd.DataFrame([facts for facts in found if "sha256" in facts]))
    skipped = [facts for facts in found if "reason" in facts]
    return manifest, pd.DataFrame(skipped, columns=["img_path", "reason"])


def _unreadable_message(root: Path, skipped: pd.DataFrame, total: int) -> str:
    shown = "; ".join(f"{row.img_path}: {row.reason}" for row in skipped.head(5).itertuples())
    more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    return (
        f"{root}: {len(skipped)} of {total} images cannot be read: {shown}{more}. "
        'Replace or remove them, or leave them out with on_unreadable="skip".'
    )


def _check_pixels(manifest: pd.DataFrame, bands: Sequence[int] | None) -> tuple[int, ...]:
    """Refuse chips that cannot share a batch; return the bands in use."""
    kinds = {
        "band counts": manifest["n_bands"].astype(str),
        "data types": manifest["dtype"].where(manifest["dtype"] == "uint8", "not uint8"),
    }
    for what, kind in kinds.items():
        examples = manifest.groupby(kind)["img_path"].first()
        if len(examples) > 1:
            shown = ", ".join(f"{value} ({path})" for value, path in examples.items())
            raise InputError(f"chips have different {what}: {shown}. Convert them to one kind.")
    n_bands = int(manifest["n_bands"].iloc[0])
    if bands is None:
        return tuple(range(min(3, n_bands)))
    if not len(bands):
        raise InputError("bands: the list is empty. Name at least one band, or leave it out.")
    _check_bands(bands, n_bands)
    return tuple(int(band) for band in bands)


def _check_classes_in_splits(manifest: pd.DataFrame, classes: tuple[str, ...], root: Path) -> None:
    counts = _counts(manifest, classes).stack()
    if counts.min() == 0:
        name, split = counts.idxmin()
        raise InputError(
            f"{root}: class {name} has no image in the {split} split. Add some; "
            "where the split is made from groups, smaller groups or another seed."
        )


def _counts(manifest: pd.DataFrame, classes: tuple[str, ...]) -> pd.DataFrame:
    counts = pd.crosstab(manifest["label"], manifest["split"])
    return counts.reindex(index=list(classes), columns=list(SPLITS), fill_value=0)


def band_statistics(data: ChipData, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each band over the training split, in chip units.

    Both float32 (bands,), over all pixels of the chips at `image_size`; computed in float64 over
    a stream of batches. A constant band has standard deviation 1, so that dividing by it is safe.
    """
    scaler = StandardScaler()
    for chips, _ in DataLoader(data.dataset("train", image_size), batch_size=64):
        scaler.partial_fit(chips.movedim(1, -1).flatten(0, -2).double().numpy())
    return scaler.mean_.astype(np.float32), scaler.scale_.astype(np.float32)


# --------------------------------------------------------------------------------- the report


def _shared(manifest: pd.DataFrame, column: str) -> pd.Series:
    """Rows that share a value of `column` across splits: value -> "path (split), …"."""
    rows = manifest[manifest[column] != ""]
    rows = rows[rows.groupby(column)["split"].transform("nunique") > 1]
    rows = rows.drop_duplicates([column, "split"])
    return (rows["img_path"] + " (" + rows["split"] + ")").groupby(rows[column]).agg(", ".join)


def _leaks(data: ChipData) -> list[str]:
    """Say in words what two splits share; empty when they share nothing."""
    leaks = []
    images, groups = _shared(data.manifest, "sha256"), _shared(data.manifest, "group")
    if len(images):
        leaks.append(f"{len(images)} byte-identical image(s) in two splits, e.g. {images.iloc[0]}")
    if len(groups):
        leaks.append(
            f"{len(groups)} group(s) in two splits, e.g. {groups.index[0]}: {groups.iloc[0]}"
        )
    return leaks


def data_report(data: ChipData) -> str:
    """Describe the data in plain text: counts, sizes, bands, values, skipped, repeated, leakage."""
    manifest = data.manifest
    counts = _counts(manifest, data.classes)
    counts = pd.concat([counts, counts.sum().to_frame("all").T])
    counts["all"] = counts.sum(axis=1)
    sizes = (manifest["width"].astype(str) + "x" + manifest["height"].astype(str)).value_counts()
    shown = ", ".join(f"{size} ({n})" for size, n in sizes.head(5).items())
    bands = ", ".join(map(str, data.bands))
    types = ", ".join(f"{kind} ({n})" for kind, n in manifest["dtype"].value_counts().items())
    copies = manifest["sha256"].duplicated(keep=False).sum()
    two_labels = (manifest.groupby("sha256")["label"].nunique() > 1).sum()
    groups = manifest.loc[manifest["group"] != "", "group"].nunique()
    facts = {
        "data": f"{data.root.resolve().name} ({data.layout})",
        "classes": ", ".join(data.classes)
        + (f" (positive: {data.classes[1]})" if len(data.classes) == 2 else ""),
        "size (px)": shown + (f" and {len(sizes) - 5} more sizes" if len(sizes) > 5 else ""),
        "bands": f"{manifest['n_bands'].iloc[0]} in a file, in use: {bands}",
        "data type": types,
        "values": f"{manifest['min'].min():g} to {manifest['max'].max():g}",
        "unreadable": f"{len(data.skipped)} skipped" if len(data.skipped) else "none",
        "identical": f"{copies} images have a byte-identical twin, {two_labels} under two labels",
        "groups": groups or "none given",
        "leakage": "no image and no group in two splits",
    }
    leaks = _leaks(data)
    if leaks:
        facts["leakage"] = "WARNING: " + "; ".join(leaks)
    lines = [f"{name:<12}{value}" for name, value in facts.items()]
    lines += [f"  {row.img_path}: {row.reason}" for row in data.skipped.head(10).itertuples()]
    if len(data.skipped) > 10:
        lines.append(f"  and {len(data.skipped) - 10} more")
    return "\n".join([*lines[:2], "", counts.to_string(), "", *lines[2:]])


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


def main() -> None:
    """Print the report on a data set."""
    print(data_report(DataConfig.from_arguments(main.__doc__).data()))


if __name__ == "__main__":
    run_command(main)
