"""Make the splits that are missing."""

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from helpers import InputError

SPLITS = ("train", "valid", "test")
SPLIT_NAMES = {s: s for s in SPLITS} | {"val": "valid", "validation": "valid"}
MOSTLY_SINGLE = 0.9  # share of units to chips above which units are single chips and few copies


def make_splits(
    manifest: pd.DataFrame, inseparable: np.ndarray, seed: int
) -> tuple[pd.DataFrame, list[str]]:
    """Carve each missing split out of train, a fifth of it: stratified, seeded.

    `inseparable` (chips,) numbers the sets of chips that stay together.
    """
    split = manifest["split"].where(manifest["split"] != "", "train")
    if "train" not in set(split):
        raise InputError("split: no image is in train. Mark the training images as train.")
    made = [name for name in ("test", "valid") if name not in set(split)]
    for n_folds, name in zip((5, 4), made, strict=False):  # the second fifth: a quarter of 4/5
        train = np.flatnonzero(split == "train")
        labels, units = manifest["label"].to_numpy()[train], inseparable[train]
        split.iloc[train[_one_fold(labels, units, n_folds, name, seed)]] = name
    return manifest.assign(split=split), made


def _one_fold(labels: np.ndarray, units: np.ndarray, n: int, name: str, seed: int) -> np.ndarray:
    """Return the positions of one of n stratified folds that keeps every unit whole."""
    independent = pd.Series(units).groupby(labels).nunique()
    if independent.min() < n:
        raise InputError(
            f"class {independent.idxmin()} has {independent.min()} independent images or groups "
            "(copies and overlapping ground count as one), "
            f"at least {n} are needed to make the {name} split. Add images, or give a split column."
        )
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    if len(first) < MOSTLY_SINGLE * len(units):
        folds = StratifiedGroupKFold(n, shuffle=True, random_state=seed)
        return next(folds.split(labels, labels, units))[1]
    # Here a unit is one image and its rare copies; for 50,000 units the line above takes 13 s,
    # this one 0.1 s, and the folds are as even.
    folds = StratifiedKFold(n, shuffle=True, random_state=seed)
    return np.flatnonzero(np.isin(unit, next(folds.split(first, labels[first]))[1]))
