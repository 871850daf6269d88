"""Make the splits that are missing, and find what two splits share."""

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from helpers import InputError

SPLITS = ("train", "valid", "test")


SPLIT_NAMES = {s: s for s in SPLITS} | {"val": "valid", "validation": "valid"}


def make_splits(manifest: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, list[str]]:
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


def _shared(manifest: pd.DataFrame, column: str) -> pd.Series:
    """Rows that share a value of `column` across splits: value -> "path (split), …"."""
    rows = manifest[manifest[column] != ""]
    rows = rows[rows.groupby(column)["split"].transform("nunique") > 1]
    rows = rows.drop_duplicates([column, "split"])
    return (rows["img_path"] + " (" + rows["split"] + ")").groupby(rows[column]).agg(", ".join)


def find_leaks(manifest: pd.DataFrame) -> list[str]:
    """Say in words what two splits share; empty when they share nothing."""
    leaks = []
    images, groups = _shared(manifest, "sha256"), _shared(manifest, "group")
    if len(images):
        leaks.append(f"{len(images)} byte-identical image(s) in two splits, e.g. {images.iloc[0]}")
    if len(groups):
        leaks.append(
            f"{len(groups)} group(s) in two splits, e.g. {groups.index[0]}: {groups.iloc[0]}"
        )
    return leaks
