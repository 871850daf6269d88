"""What a classifier answers and what its answers rest on."""

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.evaluation import baselines, inspection
from helpers.models.classifier import ClassifierConfig, create_classifier

PREDICTIONS = pd.DataFrame(
    {
        "img_path": list("abcd"),
        "label": ["x", "x", "y", "y"],
        "target": [0, 0, 1, 1],
        "predicted": [0, 1, 0, 0],
        "p_x": [0.9, 0.4, 0.7, 0.99],
        "p_y": [0.1, 0.6, 0.3, 0.01],
    }
)


def test_confident_errors_are_wrong_and_ordered():
    errors = inspection.confident_errors(PREDICTIONS, 2)
    assert errors.img_path.tolist() == ["d", "c"]
    assert errors.predicted_label.tolist() == ["x", "x"]
    assert errors.confidence.tolist() == [0.99, 0.7]


def test_a_sample_is_spread_over_the_split():
    assert inspection.sample_answers(PREDICTIONS, 2).img_path.tolist() == ["a", "d"]
    assert len(inspection.sample_answers(PREDICTIONS, 9)) == 4


class Corner(torch.nn.Module):
    """Says how bright the upper left patch is, as a classifier of two classes."""

    def __init__(self, like):
        super().__init__()
        self.backbone = like.backbone
        self.register_buffer("mean", like.mean)

    def forward(self, chips):
        bright = chips[:, :, :14, :14].mean(dim=(1, 2, 3)) / 100
        return torch.stack([torch.zeros_like(bright), bright], dim=1)


@pytest.mark.parametrize("size, side", [(28, 2), (140, 5)])  # 10 x 10 patches: squares of two
def test_an_answer_falls_where_what_it_rests_on_is_covered(size, side):
    config = ClassifierConfig("example", "random", size, (0, 1, 2), ("dark", "bright"))
    classifier = Corner(create_classifier(config))
    drops = inspection.occlusion_map(
        classifier, torch.full((3, size, size), 255, dtype=torch.uint8)
    )
    assert drops.shape == (side, side) and drops[0, 0] > 0.1
    assert np.count_nonzero(drops) == 1


def test_the_strongest_statistic_is_the_one_that_tells_the_classes_apart():
    targets = np.arange(40) % 2
    statistics = np.random.default_rng(0).normal(size=(40, 6))
    statistics[:, 2] += 5 * targets
    statistics[:, 5] = 1  # says nothing, and has no variance
    name, values = baselines.strongest_statistic(statistics, targets)
    assert name == "haze: mean dark channel" and np.array_equal(values, statistics[:, 2])
