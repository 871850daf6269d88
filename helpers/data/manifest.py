"""From a folder, a CSV manifest or a torchvision data set to one checked row a chip."""

import hashlib
import os
import posixpath
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from torchvision.datasets import EuroSAT

from helpers import InputError
from helpers.console import progress_bar
from helpers.data.chips import FORMATS, StoredChip, check_bands, filled, read_stored
from helpers.data.leakage import looks, thumbnail
from helpers.data.splits import SPLIT_NAMES, SPLITS

REST = "rest"  # the merged negative class of one-vs-rest
UNPRINTABLE = r"[\x00-\x1f\x7f\ud800-\udfff]"  # line breaks, NUL, bytes that are no UTF-8
NOT_NORMAL = r"(?:^|/)\.{0,2}(?:/|$)"  # an empty part, `.` or `..`


def find_chips(data_path: str, group_column: str) -> tuple[Path, pd.DataFrame, str]:
    """Return (root, entries, name of the layout); entries: img_path, label, split, group, …"""
    root = _download_eurosat() if data_path == "eurosat" else Path(data_path)
    if not root.exists():
        raise InputError(f"data_path: {root} does not exist. Give a folder or a CSV manifest.")
    if not root.is_dir():
        if root.suffix.lower() != ".csv":
            raise InputError(f"data_path: {root} is no CSV file. Give a folder or a CSV manifest.")
        return root.parent, _read_csv(root, group_column), f"CSV manifest {root.name}"
    per_split = {s: root / f"{s}_clean.csv" for s in SPLITS if (root / f"{s}_clean.csv").exists()}
    csv = root / "manifest.csv"
    if not csv.exists() and per_split:
        tables = [_read_csv(csv, group_column).assign(split=s) for s, csv in per_split.items()]
        return root, pd.concat(tables, ignore_index=True), "one CSV per split"
    if not csv.exists():
        csv = _only_manifest(root)
    if csv:
        return root, _read_csv(csv, group_column), f"CSV manifest {csv.name}"
    if group_column != "group":
        raise InputError(f"group_column: folders have no column '{group_column}'. Use a manifest.")
    entries = _read_folders(root)
    return root, entries, "split folders" if entries["split"].any() else "class folders"


def _only_manifest(root: Path) -> Path | None:
    """The CSV file in a folder whose header names img_path and label, if there is one."""
    found = []
    for csv in sorted(root.glob("*.csv")):
        if csv.is_file():
            with open(csv, encoding="utf-8-sig", errors="replace") as file:
                columns = {column.strip('" \n') for column in file.readline(10_000).split(",")}
            found += [csv] if {"img_path", "label"} <= columns else []
    if len(found) > 1:
        raise InputError(
            f"{root}: {' and '.join(csv.name for csv in found)} could each be the manifest. "
            "Call one manifest.csv, or give its path as data_path."
        )
    return found[0] if found else None


def _read_csv(csv: Path, group_column: str) -> pd.DataFrame:
    """Read a manifest; every row has a label and a known (or no) split, further columns stay."""
    if not csv.is_file():  # a pipe would be waited for
        raise InputError(f"{csv}: is not a file. Replace or remove it.")
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
    source: Path, entries: pd.DataFrame, bad: pd.Series | np.ndarray, what: str, remedy: str
) -> None:
    if bad.any():
        first = int(bad.argmax())
        row = entries["img_path"].iloc[first] or f"row {first + 1} below the header"
        row = row if row.isprintable() else ascii(row)
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
    def refuse(error: OSError) -> None:
        raise InputError(
            f"{error.filename}: cannot be listed ({error.strerror}). Make the folder readable, "
            "or move it away."
        ) from error

    for folder, folders, files in os.walk(root, onerror=refuse):
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


def check_paths(root: Path, entries: pd.DataFrame) -> pd.DataFrame:
    """Normalise img_path; refuse paths that leave the root and rows that name a file twice."""
    for column in ("img_path", "label"):
        odd = entries[column].str.contains(UNPRINTABLE)
        _refuse_rows(root, entries, odd, f"{column} holds an unprintable character", "Rename it.")
    odd = entries["img_path"].str.contains(NOT_NORMAL)  # few: strings of Python's are large
    entries.loc[odd, "img_path"] = entries.loc[odd, "img_path"].map(posixpath.normpath)
    repeated = entries["img_path"].duplicated()
    _refuse_rows(root, entries, repeated, "is listed twice", "Keep one row a chip.")
    # Only what is a link can lead elsewhere; each folder is resolved once for all its files.
    real_root = os.path.realpath(root)
    folders = set(map(os.path.dirname, entries["img_path"]))
    folders = {folder: os.path.realpath(root / folder) for folder in folders}

    def leaves(path: str) -> bool:
        full = os.path.join(root, path)
        is_link = os.path.islink(full)
        real = os.path.realpath(full) if is_link else folders[os.path.dirname(path)]
        return os.path.commonpath([real, real_root]) != real_root

    outside = np.fromiter(map(leaves, entries["img_path"]), bool, len(entries))
    remedy = "Use paths relative to the data folder, and put the images inside it."
    _refuse_rows(root, entries, outside, "leaves the data folder", remedy)
    return entries


def pick_classes(
    labels: pd.Series, classes: Sequence[str] | None, positive_class: str | None, root: Path
) -> tuple[pd.Series, tuple[str, ...]]:
    """Return (final labels, class names by target); rows of other classes get no label (NaN)."""
    present = sorted(labels.unique())
    if all(re.fullmatch(r"-?\d+(\.\d+)?", name) for name in present):
        present.sort(key=float)
    names = list(present if classes is None else classes)
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
        others = [name for name in names if name != positive_class]
        if len(others) == len(names):
            raise InputError(f"positive_class: {positive_class} is not one of {', '.join(names)}.")
        negative = others[0] if len(others) == 1 else REST
        if negative == positive_class:
            raise InputError(
                f"positive_class: '{REST}' is what the other classes are merged into. "
                "Rename the class, or give two `classes`."
            )
        labels = labels.replace(dict.fromkeys(others, negative))
        names = [negative, positive_class]
    return labels, tuple(names)


def _facts(stored: StoredChip, bands: Sequence[int] | None) -> dict:
    """What a manifest and the search for leaks need of one chip."""
    n_bands, height, width = stored.values.shape
    used = default_bands(n_bands) if bands is None else bands
    used = [band for band in used if band in range(n_bands)] or [0]  # `check_pixels` refuses others
    missing, ground = stored.missing, stored.transform
    valid = stored.values if missing is None else stored.values[~missing]
    facts = {
        "n_bands": n_bands,
        "height": height,
        "width": width,
        "dtype": str(stored.values.dtype),
        "thumbnail": thumbnail(filled(stored, used)),
        "min": valid.min().item(),
        "max": valid.max().item(),
        "nodata": 0.0 if missing is None else missing[used].mean(),
        "sha256": hashlib.sha256(stored.data).hexdigest(),
        "resolution": np.nan,
        "crs": "",
        "corners": None,
    }
    if ground is None:
        return facts
    corners = [ground @ corner for corner in ((0, 0), (width, 0), (width, height), (0, height))]
    resolution = abs(ground.determinant) ** 0.5
    return facts | {"resolution": resolution, "crs": stored.crs, "corners": sum(corners, ())}


def scan(
    root: Path, entries: pd.DataFrame, bands: Sequence[int] | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read every file once, in threads (the decoders release the GIL); keep the facts only.

    Returns the manifest, with `look` and `corners` for `leakage.relations`, and what was skipped.
    """

    def inspect(img_path: str) -> dict:
        try:
            return _facts(read_stored(root / img_path), bands)
        except InputError as error:
            return {"img_path": img_path, "reason": str(error)}

    paths, tables, skipped = entries["img_path"], [], []
    bar = progress_bar(total=len(paths), desc="reading chips", unit="chip")
    with bar, ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), 1024):  # in portions, so that the queue stays short
            read = []
            for facts in pool.map(inspect, paths[start : start + 1024]):
                (skipped if "reason" in facts else read).append(facts)
                bar.update()
            hashes = looks([facts.pop("thumbnail") for facts in read])
            # A table a portion: a dict a chip takes several kB.
            tables.append(pd.DataFrame(read).assign(look=list(hashes)))
    unread = pd.DataFrame(skipped, columns=["img_path", "reason"])
    manifest = entries[~entries["img_path"].isin(unread["img_path"])].reset_index(drop=True)
    return manifest.assign(**pd.concat(tables, ignore_index=True)), unread


def unreadable_message(root: Path, skipped: pd.DataFrame, total: int) -> str:
    """What an error says of files that cannot be read."""
    shown = "; ".join(f"{row.img_path}: {row.reason}" for row in skipped.head(5).itertuples())
    more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    return (
        f"{root}: {len(skipped)} of {total} images cannot be read: {shown}{more}. "
        'Replace or remove them, or leave them out with on_unreadable="skip".'
    )


def check_pixels(manifest: pd.DataFrame, bands: Sequence[int] | None) -> tuple[int, ...]:
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
        return default_bands(n_bands)
    if not len(bands):
        raise InputError("bands: the list is empty. Name at least one band, or leave it out.")
    check_bands(bands, n_bands)
    return tuple(bands)


def default_bands(n_bands: int) -> tuple[int, ...]:
    """The bands in use where none are named: the first three, or all of fewer."""
    return tuple(range(min(3, n_bands)))


def check_classes_in_splits(manifest: pd.DataFrame, classes: tuple[str, ...], root: Path) -> None:
    """Raise InputError if a class has no image in a split."""
    counts = class_counts(manifest, classes).stack()
    if counts.min() == 0:
        name, split = counts.idxmin()
        raise InputError(
            f"{root}: class {name} has no image in the {split} split. Add some; "
            "where the split is made from groups, smaller groups or another seed."
        )


def class_counts(manifest: pd.DataFrame, classes: tuple[str, ...]) -> pd.DataFrame:
    """Images by class (rows) and split (columns)."""
    counts = pd.crosstab(manifest["label"], manifest["split"])
    return counts.reindex(index=list(classes), columns=list(SPLITS), fill_value=0)
