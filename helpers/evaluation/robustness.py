"""Where a classifier is right, and what it reads: accuracy by place, and a check for shortcuts.

A shortcut (Geirhos et al. 2020, arXiv:2004.07780) is a cue that tells the classes apart in this
data set and nowhere else. In overhead imagery the usual one is the acquisition: where the classes
come from different passes, haze, sharpness and brightness can stand in for what is on the ground.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from helpers.data.dataset import ChipData, band_statistics
from helpers.evaluation.baselines import (
    acquisition_statistics,
    logistic_probe,
    statistics_probe,
)
from helpers.metrics import exact_interval, metric_columns
from helpers.models.classifier import Classifier, head_columns
from helpers.training.examples import batches
from helpers.training.features import evaluated_on

_SHOWN = ("accuracy", "auroc")
_REFITTED_ON = 2000  # training chips at most, evenly spaced
ACQUISITION_ALONE = "acquisition statistics alone"
SMALL_PLACE = 20
"""Test chips below which a place's accuracy is not called the worst: one chip is five points."""
_DEGREES = {"longitude": 180, "latitude": 90}  # columns of a manifest, and how far they reach


def accuracy_by_group(predictions: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy of a run in every group of the manifest (a place, a scene), the largest first.

    Returns:
        `group, chips, positives` (share of the last class), `accuracy` with its `exact_interval`
        `low, high`; no rows where the data have no groups.
    """
    answered = predictions.assign(right=predictions.predicted == predictions.target)
    last = predictions.columns.str.startswith("p_").sum() - 1
    rows = []
    for group, chips in answered[answered.group != ""].groupby("group"):
        rows.append(
            {
                "group": group,
                "chips": len(chips),
                "positives": (chips.target == last).mean(),
                "accuracy": chips.right.mean(),
                **exact_interval(chips.right),
            }
        )
    columns = ["group", "chips", "positives", "accuracy", "low", "high"]
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values(["chips", "group"], ascending=[False, True], ignore_index=True)


def place_coordinates(manifest: pd.DataFrame) -> pd.DataFrame:
    """Where the test places lie: `group` and the mean `longitude` and `latitude` of its chips.

    In degrees, from columns of the manifest; no rows unless every test chip has a group and both.
    """
    test = manifest[manifest["split"] == "test"]
    if (test["group"] == "").any() or not set(_DEGREES) <= set(test):
        return pd.DataFrame(columns=["group", *_DEGREES])
    degrees = test[list(_DEGREES)].apply(pd.to_numeric, errors="coerce")
    on_earth = (degrees.abs() <= pd.Series(_DEGREES)).all(axis=None)
    places = degrees.groupby(test["group"]).mean().reset_index()
    return places if on_earth else places[:0]


def degradations(data: ChipData, image_size: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Changes that take one cue of the acquisition away; each maps chips (N, bands, S, S) float.

    Blur takes sharpness; grey takes colour; giving every chip the mean and deviation of the
    training chips, band by band, takes brightness, contrast and colour cast (haze is mostly that).
    """
    mean, std = (torch.from_numpy(s)[:, None, None] for s in band_statistics(data, image_size))

    def same_statistics(chips: Tensor) -> Tensor:
        centred = chips - chips.mean(dim=(2, 3), keepdim=True)
        scaled = centred / chips.std(dim=(2, 3), keepdim=True).clamp_min(1e-6)
        return scaled * std.to(chips) + mean.to(chips)

    def blurred(chips: Tensor, sigma: float) -> Tensor:
        return gaussian_blur(chips, kernel_size=2 * int(3 * sigma) + 1, sigma=sigma)

    return {
        "as it is": lambda chips: chips,
        "blurred, sigma 1 px": lambda chips: blurred(chips, 1.0),
        "blurred, sigma 2 px": lambda chips: blurred(chips, 2.0),
        "grey": lambda chips: chips.mean(dim=1, keepdim=True).expand_as(chips),
        "equal mean and deviation": same_statistics,
        "equal mean and deviation, blurred": lambda c: blurred(same_statistics(c), 2.0),
    }


def shortcut_check(classifier: Classifier, data: ChipData, *, device: str = "cpu") -> pd.DataFrame:
    """What remains of a classifier when cues of the acquisition are taken away.

    Two questions for each degradation: does the classifier itself still work (`as trained`), and
    how much do features of equally degraded training chips still tell (`refitted`, a logistic
    regression on the frozen [CLS, mean patch] features)? And how far do the statistics of the
    acquisition come alone.

    Returns:
        `chips` (the degradation, or `acquisition statistics alone`), `head`, and value, low and
        high (95 % bootstrap) of accuracy and AUROC on the test split.
    """
    size = classifier.config.image_size
    train, test = (data.dataset(split, size) for split in ("train", "test"))
    chosen = np.linspace(0, len(train) - 1, min(_REFITTED_ON, len(train))).round().astype(int)
    train_part = torch.utils.data.Subset(train, chosen.tolist())
    targets, truth = train.targets[chosen].numpy(), test.targets.numpy()
    predictions = {}
    changes = degradations(data, size)
    with evaluated_on(classifier, device):
        of_train, of_test = (
            _degraded(classifier, part, changes, device) for part in (train_part, test)
        )
    for name in changes:
        (train_features, _), (test_features, as_trained) = of_train[name], of_test[name]
        predictions[name, "as trained"] = as_trained
        predictions[name, "refitted"] = logistic_probe(train_features, targets, test_features)
    predictions[ACQUISITION_ALONE, "refitted"] = statistics_probe(
        acquisition_statistics, train, test
    )
    rows = []
    for (chips, head), probabilities in predictions.items():
        numbers = metric_columns(truth, probabilities, _SHOWN)
        rows.append({"chips": chips, "head": head} | numbers)
    return pd.DataFrame(rows)


@torch.inference_mode()
def _degraded(
    classifier: Classifier, dataset, changes: dict[str, Callable[[Tensor], Tensor]], device: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """[CLS, mean patch] features (N, 2 * width) and probabilities (N, classes) by change.

    Every file is decoded once for all changes.
    """
    parts = {name: ([], []) for name in changes}
    for chips, _ in batches(dataset, 64):
        chips = chips.to(device).float()
        for name, (features, probabilities) in parts.items():
            values = classifier.features(changes[name](chips))
            columns = head_columns(values, classifier.config.head_input)
            probabilities.append(classifier.linear_head(columns).softmax(dim=1).cpu())
            features.append(head_columns(values, "cls+mean").cpu())
    return {
        name: (torch.cat(features).numpy(), torch.cat(probabilities).double().numpy())
        for name, (features, probabilities) in parts.items()
    }
