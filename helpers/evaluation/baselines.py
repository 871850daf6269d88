"""What a model must beat, and how good frozen features are: majority, colour statistics, probes."""

from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field, PositiveInt
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers.data.dataset import ChipData, ChipDataset, DataConfig
from helpers.metrics import metric_columns
from helpers.models.architectures import BACKBONE_HELP
from helpers.models.classifier import head_columns
from helpers.training.config import RunConfig
from helpers.training.features import batches
from helpers.training.methods import new_classifier, split_features


def majority_probabilities(train_targets: np.ndarray, n: int, n_classes: int) -> np.ndarray:
    """Class frequencies of the training split for each of n images, (n, classes)."""
    frequencies = np.bincount(train_targets, minlength=n_classes) / len(train_targets)
    return np.tile(frequencies, (n, 1))


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


def logistic_probe(train: np.ndarray, targets: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Class probabilities of a logistic regression on standardised features.

    Args:
        train: (N, F).
        targets: (N,).
        test: (M, F).

    Returns:
        (M, classes).
    """
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return probe.fit(train, targets).predict_proba(test)


def baselines(data: ChipData, image_size: int) -> dict[str, np.ndarray]:
    """Test probabilities (M, classes) of what a model must beat, by name."""
    train, test = (data.dataset(split, image_size) for split in ("train", "test"))
    targets = train.targets.numpy()
    return {
        "majority class": majority_probabilities(targets, len(test), len(data.classes)),
        "colour statistics": logistic_probe(
            colour_statistics(train), targets, colour_statistics(test)
        ),
    }


_TEMPERATURE = 0.07  # of DINO's kNN evaluation (arXiv:2104.14294, eval_knn.py)


_SHOWN = ("auroc", "accuracy")


class ProbeConfig(DataConfig):
    """The parameters of a probe."""

    backbone: str = Field("example", description=BACKBONE_HELP)
    weights: str = Field("pretrained", description="pretrained, random, or a file of weights")
    image_size: PositiveInt = Field(98, description="pixels, a multiple of the patch size")
    neighbours: PositiveInt = Field(20, description="of the kNN probe")
    random_init: bool = Field(False, description="also probe the backbone with random weights")
    seed: int = Field(0, ge=0, description="of random weights")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")
    cache_path: str = Field("cache", description="folder for frozen features")

    def run(self, **changes) -> RunConfig:
        """The same backbone, data and device as a training run has them."""
        return RunConfig.checked(**self.model_dump(exclude={"neighbours", "random_init"}) | changes)


def knn_probe(
    train: np.ndarray, targets: np.ndarray, test: np.ndarray, neighbours: int
) -> np.ndarray:
    """Class probabilities by the vote of the nearest training chips, weighted as in DINO.

    A neighbour of cosine similarity s votes with exp(s / 0.07).

    Args:
        train: (N, F).
        targets: (N,).
        test: (M, F).
        neighbours: at most; all N of fewer.

    Returns:
        (M, classes).
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
    """Probe frozen features and colour statistics on the test split, fitted on the training split.

    Returns:
        Columns features, probe, then value, low and high (95 % bootstrap) of AUROC and accuracy.

    Raises:
        InputError: as `create_classifier` for a wrong backbone or weights.
    """
    targets, truth = (
        data.dataset(split, config.image_size).targets.numpy() for split in ("train", "test")
    )
    runs = [config.run()] + [config.run(weights="random")] * config.random_init
    predictions = {}
    for run in runs:
        train, test = (frozen_features(run, data, split) for split in ("train", "test"))
        predictions[run.label, "logistic regression"] = logistic_probe(train, targets, test)
        predictions[run.label, f"{config.neighbours}-NN"] = knn_probe(
            train, targets, test, config.neighbours
        )
    train, test = (
        colour_statistics(data.dataset(split, config.image_size)) for split in ("train", "test")
    )
    predictions["colour statistics", "logistic regression"] = logistic_probe(train, targets, test)

    rows = []
    for (features, method), probabilities in predictions.items():
        numbers = metric_columns(truth, probabilities, _SHOWN)
        rows.append({"features": features, "probe": method} | numbers)
    return pd.DataFrame(rows)
