"""The probes, and what the embedded backbone must be able to do."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from helpers.evaluation.baselines import ProbeConfig, knn_probe, probe
from helpers.models.backbones import EXAMPLE_WEIGHTS, build_backbone
from helpers.training.features import extract_features
from helpers.training.setup import new_classifier


def test_neighbours_vote_with_the_exponential_of_their_similarity():
    train = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    targets = np.array([0, 1, 1])
    probabilities = knn_probe(train, targets, np.array([[3.0, 0.0]]), neighbours=2)
    votes = np.exp(np.array([1.0, 0.8]) / 0.07)
    np.testing.assert_allclose(probabilities[0], votes / votes.sum(), rtol=1e-9)


def test_fewer_training_chips_than_neighbours_all_vote():
    probabilities = knn_probe(np.eye(2), np.array([0, 1]), np.ones((1, 2)), neighbours=20)
    np.testing.assert_allclose(probabilities, [[0.5, 0.5]])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return ProbeConfig(random_init=True, cache_path=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def data(config):
    return config.data()


@pytest.fixture(scope="module")
def table(config, data):
    return probe(config, data).set_index(["features", "probe"])


def test_every_probe_has_its_interval(table):
    assert list(table.index) == [
        ("example (ViT-Ti/14, distilled)", "logistic regression"),
        ("example (ViT-Ti/14, distilled)", "20-NN"),
        ("ViT-Ti/14, random weights", "logistic regression"),
        ("ViT-Ti/14, random weights", "20-NN"),
        ("colour statistics", "logistic regression"),
    ]
    for metric in ("auroc", "accuracy"):
        assert (table[f"{metric}_low"] <= table[metric]).all()
        assert (table[metric] <= table[f"{metric}_high"]).all()


def test_example_backbone_beats_random_weights_and_colours(table):
    ours = table.loc[("example (ViT-Ti/14, distilled)", "logistic regression")]
    others = table[table.index.get_level_values("features") != "example (ViT-Ti/14, distilled)"]
    # On 104 validation chips the intervals of the best two touch (0.988 and 0.989), so the value
    # is compared. It is 0.996; a backbone whose weights did not arrive reaches 0.92.
    assert ours["auroc"] > others["auroc_high"].max()


def test_example_backbone_is_a_small_half_precision_file():
    assert EXAMPLE_WEIGHTS.stat().st_size <= 12_000_000
    expected = build_backbone("example").state_dict()
    with safe_open(EXAMPLE_WEIGHTS, framework="pt") as file:
        assert file.metadata()["name"] == "example (ViT-Ti/14, distilled)"
        assert set(file.keys()) == set(expected)
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(key)
            assert tensor.dtype == torch.float16 and tensor.shape == expected[key].shape
            assert tensor.isfinite().all()


def test_example_features_have_the_same_bits_on_every_load(config, data):
    chips = data.dataset("test", 98)
    chips.paths, chips.targets = chips.paths[:20], chips.targets[:20]
    first, second = (
        extract_features(new_classifier(config.run(), data), chips).values for _ in range(2)
    )
    assert first.dtype == torch.float32
    assert torch.equal(first, second)
