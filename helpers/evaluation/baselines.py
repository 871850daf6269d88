"""What a model must beat, and how good frozen features are: statistics of chips, probes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field, PositiveInt
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers import InputError
from helpers.config import Places, folder_field
from helpers.data.dataset import ChipData, ChipDataset, DataConfig
from helpers.metrics import metric_columns
from helpers.models.architectures import BACKBONE_HELP
from helpers.models.classifier import head_columns
from helpers.records import environment, write_json, written_whole
from helpers.training.config import RunConfig, TrainingConfig
from helpers.training.examples import batches
from helpers.training.runs import metric_entries, predictions_table
from helpers.training.setup import new_classifier, split_features


def colour_statistics(dataset: ChipDataset) -> np.ndarray:
    """Mean, standard deviation and 10/50/90 % quantiles per band of each chip, (N, 5 * bands).

    What a classifier can know without looking at any shape: the baseline that says whether a
    task is easier than it looks.
    """
    rows = []
    for chips, _ in batches(dataset, 256):
        pixels = chips.flatten(2).double().numpy()
        quantiles = np.quantile(pixels, [0.1, 0.5, 0.9], axis=2)
        rows.append(np.concatenate([pixels.mean(2), pixels.std(2), *quantiles], axis=1))
    return np.concatenate(rows)


ACQUISITION = (
    "sharpness: log variance of the Laplacian",
    "sharpness: mean gradient",
    "haze: mean dark channel",
    "haze: 10 % quantile of the dark channel",
    "brightness: mean",
    "contrast: deviation of the brightness",
)
"""What the columns of `acquisition_statistics` are."""


def acquisition_statistics(dataset: ChipDataset) -> np.ndarray:
    """How sharp, hazy and bright each chip is, (N, 6), with nothing about what it shows.

    Variance of the Laplacian and mean gradient (sharpness), mean and 10 % quantile of the dark
    channel (haze: He et al. 2009), mean and deviation of the brightness.
    """
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    rows = []
    for chips, _ in batches(dataset, 256):
        chips = chips.float()
        grey, dark = chips.mean(dim=1, keepdim=True), chips.amin(dim=1).flatten(1)
        laplacian = torch.nn.functional.conv2d(grey, kernel).flatten(1)
        gradient = sum(grey.diff(dim=d).abs().mean(dim=(1, 2, 3)) for d in (2, 3))
        grey = grey.flatten(1)
        rows.append(
            torch.stack(
                [
                    laplacian.var(dim=1).log1p(),
                    gradient,
                    dark.mean(dim=1),
                    dark.quantile(0.1, dim=1),
                    grey.mean(dim=1),
                    grey.std(dim=1),
                ],
                dim=1,
            )
        )
    return torch.cat(rows).numpy()


def strongest_statistic(statistics: np.ndarray, targets: np.ndarray) -> tuple[str, np.ndarray]:
    """The column of `acquisition_statistics` whose means differ most between classes, by name.

    Most: by the F statistic of an analysis of variance.
    """
    varying = np.flatnonzero(np.ptp(statistics, axis=0))
    best = varying[f_classif(statistics[:, varying], targets)[0].argmax()]
    return ACQUISITION[best], statistics[:, best]


def logistic_probe(train: np.ndarray, targets: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Class probabilities (M, classes) of a logistic regression on standardised features.

    Fitted on `train` (N, F) with `targets` (N,), asked for `test` (M, F).
    """
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return probe.fit(train, targets).predict_proba(test)


def statistics_probe(
    statistics: Callable[[ChipDataset], np.ndarray], train: ChipDataset, test: ChipDataset
) -> np.ndarray:
    """`logistic_probe` on statistics of chips: class probabilities of the test chips."""
    return logistic_probe(statistics(train), train.targets.numpy(), statistics(test))


def baselines(config: TrainingConfig, data: ChipData, report=print) -> dict[str, Any]:
    """What a model must beat on a data set: read where it is there, else computed and written.

    Give the data with all their training chips.

    Returns:
        The record in `history_path/baselines_<data>.json`: `test`, with the metrics of `majority
        class`, `colour statistics` and `acquisition statistics` as in the record of a run, and
        what they were computed from (`data_fingerprint`, `image_size`). Their predictions of the
        test split stand in the Parquet file of the same name, for paired differences.
    """
    source = {"data_fingerprint": data.fingerprint, "image_size": config.image_size}
    try:
        record = read_baselines(config)
        if source.items() <= record.items():
            return record
    except InputError:
        pass  # none yet, or damaged
    report("baselines: class frequencies, colour and acquisition statistics ...")
    train, test = (data.dataset(split, config.image_size) for split in ("train", "test"))
    frequencies = np.bincount(train.targets.numpy(), minlength=len(data.classes)) / len(train)
    probabilities = {
        "majority class": np.tile(frequencies, (len(test), 1)),
        "colour statistics": statistics_probe(colour_statistics, train, test),
        "acquisition statistics": statistics_probe(acquisition_statistics, train, test),
    }
    tables = {
        name: predictions_table(data, {"test": values}) for name, values in probabilities.items()
    }
    record = {
        "data": Path(config.data_path).name,
        **source,
        "test": {name: metric_entries(table) for name, table in tables.items()},
        "environment": environment(),
    }
    predictions = pd.concat([table.assign(run=name) for name, table in tables.items()])
    with written_whole(_baselines_file(config).with_suffix(".parquet")) as part:
        predictions.to_parquet(part, index=False)
    write_json(_baselines_file(config), record)
    return record


def read_baselines(config: TrainingConfig) -> dict[str, Any]:
    """The record that `baselines` wrote.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = _baselines_file(config)
    try:
        record = json.loads(path.read_text())
        return record | {"test": dict(record["test"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no baselines ({error}); any training writes them") from error


def read_baseline_predictions(config: TrainingConfig) -> dict[str, pd.DataFrame]:
    """The predictions of the test split by every baseline, by name, as in `Run.predictions`."""
    table = pd.read_parquet(_baselines_file(config).with_suffix(".parquet"))
    return {
        name: rows.drop(columns="run").reset_index(drop=True)
        for name, rows in table.groupby("run", sort=False)
    }


def strongest_baseline(entries: dict[str, dict]) -> tuple[str, dict[str, dict[str, float]]]:
    """The baseline with the highest AUROC, of a record's `test`: its name and metrics."""
    return max(entries.items(), key=lambda entry: entry[1]["auroc"]["value"])


def _baselines_file(config: TrainingConfig) -> Path:
    return Path(config.history_path) / f"baselines_{config.data_name}.json"


_TEMPERATURE = 0.07  # of DINO's kNN evaluation (arXiv:2104.14294, eval_knn.py)
_SHOWN = ("auroc", "accuracy")


class ProbeConfig(Places, DataConfig):
    """The parameters of a probe."""

    backbone: str = Field("example", description=BACKBONE_HELP)
    weights: str = Field("pretrained", description="pretrained, random, or a file of weights")
    image_size: int = Field(98, gt=0, le=4096, description="pixels, a multiple of the patch size")
    neighbours: PositiveInt = Field(20, description="of the kNN probe")
    random_init: bool = Field(False, description="also probe the backbone with random weights")
    seed: int = Field(0, ge=0, description="of random weights")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")
    cache_path: str | None = folder_field("cache_path", "frozen features")

    def run(self, **changes) -> RunConfig:
        """The same backbone, data and device as a training run has them."""
        return RunConfig.checked(**self.model_dump(exclude={"neighbours", "random_init"}) | changes)


def knn_probe(
    train: np.ndarray, targets: np.ndarray, test: np.ndarray, neighbours: int
) -> np.ndarray:
    """Class probabilities (M, classes) by the vote of the nearest training chips, as in DINO.

    A neighbour of cosine similarity s votes with exp(s / 0.07); of fewer chips than `neighbours`
    all vote. Arrays as of `logistic_probe`.
    """
    knn = KNeighborsClassifier(
        min(neighbours, len(train)),
        metric="cosine",
        weights=lambda distances: np.exp(-distances / _TEMPERATURE),
    )
    return knn.fit(train, targets).predict_proba(test)


def frozen_features(config: RunConfig, data: ChipData, split: str) -> np.ndarray:
    """[CLS, mean patch token] of the last block of every chip of a split, (N, 2 * width)."""
    features = split_features(config, data, new_classifier(config, data), split)
    return head_columns(features.values[0], "cls+mean").numpy()


def probe(config: ProbeConfig, data: ChipData) -> pd.DataFrame:
    """Probe frozen features and colour statistics, fitted on the training split.

    They are judged on the validation split: nothing is chosen by the test split before training.

    Returns:
        Columns features, probe, then value, low and high (95 % bootstrap) of AUROC and accuracy.

    Raises:
        InputError: as `create_classifier` for a wrong backbone or weights.
    """
    train, valid = (data.dataset(split, config.image_size) for split in ("train", "valid"))
    targets, truth = train.targets.numpy(), valid.targets.numpy()
    runs = [config.run()] + [config.run(weights="random")] * config.random_init
    predictions = {}
    for run in runs:
        fitted, judged = (frozen_features(run, data, split) for split in ("train", "valid"))
        predictions[run.label, "logistic regression"] = logistic_probe(fitted, targets, judged)
        votes = knn_probe(fitted, targets, judged, config.neighbours)
        predictions[run.label, f"{config.neighbours}-NN"] = votes
    predictions["colour statistics", "logistic regression"] = statistics_probe(
        colour_statistics, train, valid
    )
    return pd.DataFrame(
        {"features": features, "probe": method} | metric_columns(truth, probabilities, _SHOWN)
        for (features, method), probabilities in predictions.items()
    )
