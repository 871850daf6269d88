import numpy as np
import pandas as pd
import pytest
from scipy.stats import beta
from sklearn import metrics as reference

from helpers.metrics import (
    METRICS,
    evaluate,
    mcnemar,
    metric_draws,
    over_seeds,
    paired_difference,
    reliability,
    weighted_metrics,
)


def fake_predictions(n=300, classes=2, seed=0, decimals=2):
    """Rounded probabilities, so that tied scores occur."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[targets]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    probabilities = probabilities.round(decimals)
    return targets, probabilities / probabilities.sum(1, keepdims=True)


def sklearn_metrics(targets, probabilities):
    predicted = probabilities.argmax(1)
    binary = probabilities.shape[1] == 2
    average = "binary" if binary else "macro"
    scores = probabilities[:, 1] if binary else probabilities
    ovr = {} if binary else {"multi_class": "ovr"}
    return {
        "accuracy": reference.accuracy_score(targets, predicted),
        "precision": reference.precision_score(
            targets, predicted, average=average, zero_division=0
        ),
        "recall": reference.recall_score(targets, predicted, average=average),
        "f1": reference.f1_score(targets, predicted, average=average),
        "auroc": reference.roc_auc_score(targets, scores, **ovr),
        "average_precision": reference.average_precision_score(targets, scores),
        "brier": reference.brier_score_loss(targets, scores),
    }


@pytest.mark.parametrize("classes", [2, 4])
def test_every_metric_agrees_with_scikit_learn(classes):
    targets, probabilities = fake_predictions(classes=classes)
    table = evaluate(targets, probabilities, resamples=10)
    assert tuple(table.index) == METRICS
    for name, value in sklearn_metrics(targets, probabilities).items():
        assert table.value[name] == pytest.approx(value, abs=1e-12), name


def test_a_resample_is_the_metric_of_the_drawn_images():
    targets, probabilities = fake_predictions(n=60)
    draws = metric_draws(targets, probabilities, resamples=20, seed=3)
    weights = np.random.default_rng(3).multinomial(60, np.full(60, 1 / 60), size=20)
    for i, counts in enumerate(weights, start=1):
        rows = np.repeat(np.arange(60), counts)
        for name, value in sklearn_metrics(targets[rows], probabilities[rows]).items():
            assert draws[name][i] == pytest.approx(value, abs=1e-12), name


def test_groups_are_drawn_whole():
    """Every image in a group of its own changes nothing; copies in one group add no certainty."""
    targets, probabilities = fake_predictions(n=60)
    alone = metric_draws(targets, probabilities, 20, groups=np.arange(60))
    for name, values in metric_draws(targets, probabilities, 20).items():
        np.testing.assert_array_equal(alone[name], values)
    copied = [np.repeat(part, 9, axis=0) for part in (targets, probabilities)]
    groups = np.repeat(np.arange(60).astype(str), 9)
    row = evaluate(*copied, groups=groups).loc["accuracy"]
    single = evaluate(targets, probabilities).loc["accuracy"]
    width = single.high - single.low
    assert row.group_high - row.group_low == pytest.approx(width, rel=0.15)
    assert row.high - row.low == pytest.approx(width / 3, rel=0.15)
    pd.testing.assert_frame_equal(
        evaluate(*copied), evaluate(*copied, groups=groups)[["value", "low", "high", "undefined"]]
    )


def test_draws_of_one_class_are_counted():
    """Two groups of one class each: half of the draws are of one class."""
    targets = np.repeat([0, 1], 20)
    probabilities = np.eye(2)[targets]
    table = evaluate(targets, probabilities, groups=np.repeat(["a", "b"], 20))
    assert 900 < table.undefined["auroc"] < 1100 and table.undefined["accuracy"] == 0
    assert evaluate(targets, probabilities).undefined["auroc"] == 0
    first, groups = np.full((40, 2), 0.5), np.repeat(["a", "b"], 20)
    difference = paired_difference(targets, first, probabilities, "auroc", groups=groups)
    assert difference["undefined"] == table.undefined["auroc"]


def test_a_draw_without_one_of_several_classes_is_the_mean_over_the_others():
    """A class of two images is missing from an eighth of the draws; none is dropped."""
    targets, probabilities = fake_predictions(n=40, classes=3)
    targets[targets == 2] = 0
    targets[:2] = 2
    draws = metric_draws(targets, probabilities, resamples=400, seed=3)
    weights = np.random.default_rng(3).multinomial(40, np.full(40, 1 / 40), size=400)
    missing = np.flatnonzero(weights[:, :2].sum(axis=1) == 0)
    assert len(missing) > 20
    for name in ("auroc", "recall", "average_precision", "f1", "precision"):
        assert np.isfinite(draws[name]).all()
    rows = np.repeat(np.arange(40), weights[missing[0]])
    expected = [reference.roc_auc_score(targets[rows] == c, probabilities[rows, c]) for c in (0, 1)]
    assert draws["auroc"][1 + missing[0]] == pytest.approx(np.mean(expected))


def test_calibration_error_by_hand():
    # Two bins: 0.9 confident and right 1 of 2; 0.6 confident and right 2 of 2.
    probabilities = np.array([[0.1, 0.9], [0.1, 0.9], [0.4, 0.6], [0.6, 0.4]])
    targets = np.array([1, 0, 1, 0])
    value = weighted_metrics(targets, probabilities)["calibration_error"][0]
    assert value == pytest.approx((abs(1 - 1.8) + abs(2 - 1.2)) / 4)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """95 % intervals of the accuracy of a coin that is right in 70 % of all cases."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        targets = rng.integers(0, 2, 150)
        right = rng.random(150) < 0.7
        probabilities = np.eye(2)[np.where(right, targets, 1 - targets)]
        low, high = evaluate(targets, probabilities, 200, seed).loc["accuracy", ["low", "high"]]
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_one_class_alone_has_no_auroc():
    probabilities = np.array([[0.2, 0.8], [0.6, 0.4]])
    value = weighted_metrics(np.array([1, 1]), probabilities)["auroc"][0]
    assert np.isnan(value)


def test_mcnemar_counts_and_its_exact_p_value():
    targets = np.zeros(10, dtype=int)
    first = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])  # right six times
    second = np.array([0, 0, 1, 1, 1, 1, 0, 1, 1, 1])  # loses four of them, gains one
    test = mcnemar(targets, first, second)
    assert (test["only_first"], test["only_second"]) == (4, 1)
    assert test["p_value"] == pytest.approx(2 * (1 + 5) / 2**5)  # two-sided binomial, by hand
    assert mcnemar(targets, first, first)["p_value"] == 1.0


def test_paired_difference_is_narrower_than_unpaired_and_zero_for_itself():
    targets, first = fake_predictions(n=400, seed=1, decimals=6)
    second = 0.98 * first + 0.01
    same = paired_difference(targets, first, first, "auroc", resamples=50)
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0, "undefined": 0}
    shifted = paired_difference(targets, first, second, "brier", resamples=400)
    own = evaluate(targets, first, resamples=400).loc["brier"]
    assert shifted["low"] <= shifted["value"] <= shifted["high"]
    assert shifted["high"] - shifted["low"] < 0.2 * (own.high - own.low)


def test_reliability_bins_hold_equally_many_images_and_an_exact_interval():
    targets, probabilities = fake_predictions(n=500)
    table = reliability(targets, probabilities, bins=8)
    assert table.images.sum() == 500 and np.ptp(table.images) <= 1
    assert table.confidence.is_monotonic_increasing
    mean = np.average(table.accuracy, weights=table.images)
    assert mean == pytest.approx((probabilities.argmax(axis=1) == targets).mean())
    first = table.iloc[0]
    right = round(first.accuracy * first.images)
    assert first.low == pytest.approx(beta.ppf(0.025, right, first.images - right + 1))
    assert len(reliability(targets[:3], probabilities[:3])) == 3


def test_a_mean_over_seeds_has_one_interval_for_draws_and_seeds():
    rng = np.random.default_rng(0)
    draws = np.concatenate([[0.9], rng.normal(0.9, 0.01, 4000)])
    alone = over_seeds([draws])
    assert alone["value"] == 0.9
    assert alone == pytest.approx(
        {"value": 0.9, "low": 0.9 - 0.0196, "high": 0.9 + 0.0196}, abs=1e-3
    )
    # Equal draws: the mean of two equal runs is as uncertain as one. Apart: the seeds count too.
    assert over_seeds([draws, draws]) == pytest.approx(alone)
    apart = over_seeds([draws - 0.05, draws + 0.05])
    assert apart["value"] == pytest.approx(0.9)
    assert apart["high"] - apart["low"] > 2 * (alone["high"] - alone["low"])
