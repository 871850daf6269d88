"""How good are frozen features? kNN and logistic regression on them: DINOv2's own yardsticks.

`python -m helpers.probe --data_path ./data/ --backbone dinov2_vits14` prints the table.
"""

from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field, PositiveInt
from sklearn.neighbors import KNeighborsClassifier

from helpers.console import run_command
from helpers.features import colour_statistics, logistic_probe
from helpers.finetune import new_classifier, split_features
from helpers.load_data import ChipData, DataConfig
from helpers.metrics import metric_columns
from helpers.model import head_columns
from helpers.runs import RunConfig

_TEMPERATURE = 0.07  # of DINO's kNN evaluation (arXiv:2104.14294, eval_knn.py)
_SHOWN = ("auroc", "accuracy")


class ProbeConfig(DataConfig):
    """The parameters of a probe."""

    backbone: str = Field("example", description="example, dinov2_vit{s,b,l,g}14, each with _reg")
    weights: str = Field("pretrained", description="pretrained, random, or a file of weights")
    image_size: PositiveInt = Field(98, description="pixels, a multiple of 14")
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


def main() -> None:
    """Probe the frozen features of a backbone on a data set."""
    config = ProbeConfig.from_arguments(main.__doc__)
    print(probe(config, config.data()).to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    run_command(main)
