"""Rules from logits to answers, whose error is known from a validation split."""

import numpy as np
import pytest
from scipy.special import softmax

from helpers import InputError
from helpers.evaluation.calibration import AnswerRule, check_threshold, fit_rule


def make_validation(seed=0, n=2000, sharpness=1.0, classes=2):
    """Targets drawn with the probabilities that the logits divided by `sharpness` say."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(0, 2, (n, classes))
    chances = softmax(honest, axis=1).cumsum(axis=1)
    targets = (rng.random(n)[:, None] > chances[:, :-1]).sum(axis=1)
    return targets, honest * sharpness


def test_the_default_is_the_most_probable_class():
    logits = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    probabilities, classes, unsure = AnswerRule()(logits)
    np.testing.assert_allclose(probabilities, softmax(logits, axis=1), rtol=1e-6)
    assert (classes == logits.argmax(axis=1)).all() and not unsure.any()


@pytest.mark.parametrize("sharpness", [0.5, 1, 3])
def test_the_temperature_undoes_overconfidence(sharpness):
    rule = fit_rule(*make_validation(sharpness=sharpness))
    assert rule.temperature == pytest.approx(sharpness, rel=0.1)


def test_a_split_without_errors_does_not_make_anything_certain():
    targets = np.arange(40) % 2
    logits = np.where(np.eye(2)[targets] == 1, 1.0, -1.0)
    assert fit_rule(targets, logits).temperature > 0.24


@pytest.mark.parametrize("recall", [0.8, 0.95])
def test_a_recall_is_reached_with_the_highest_threshold(recall):
    targets, logits = make_validation()
    rule = fit_rule(targets, logits, temperature=1, threshold=f"recall={recall}")
    positive = np.sort(softmax(logits, axis=1)[targets == 1, 1])
    assert (positive >= rule.threshold).mean() >= recall
    assert (positive > rule.threshold).mean() < recall


def test_f1_is_the_best_of_all_thresholds():
    targets, logits = make_validation()
    rule = fit_rule(targets, logits, temperature=1, threshold="f1")
    scores = softmax(logits, axis=1)[:, 1]

    def f1(threshold):
        said = scores >= threshold
        return 2 * (said & (targets == 1)).sum() / (said.sum() + (targets == 1).sum())

    assert f1(rule.threshold) == pytest.approx(max(map(f1, scores)))
    _, classes, _ = rule(logits)
    assert (classes == (scores >= rule.threshold)).all()


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("error_rate", [0.05, 0.2])
def test_sets_miss_the_class_as_rarely_as_asked(classes, error_rate):
    """Over many draws of both splits: the promise is on average over them."""
    missed, sure_and_wrong = [], []
    for seed in range(60):
        targets, logits = make_validation(2 * seed, n=300, classes=classes)
        rule = fit_rule(targets, logits, error_rate=error_rate)
        targets, logits = make_validation(2 * seed + 1, n=300, classes=classes)
        probabilities, said, unsure = rule(logits)
        true = probabilities[np.arange(300), targets]
        missed.append((1 - true > rule.quantile + 1e-7).mean())
        sure_and_wrong.append((~unsure & (said != targets)).mean())
    # 60 splits of 300: the mean has a standard error below 0.004.
    assert error_rate - 0.012 < np.mean(missed) < error_rate + 0.012
    assert np.mean(sure_and_wrong) < error_rate + 0.012


def test_an_answer_against_its_set_is_unsure():
    rule = AnswerRule(threshold=0.9, quantile=0.4)
    logits = np.log([[0.95, 0.05], [0.2, 0.8], [0.05, 0.95], [0.45, 0.55]])
    _, classes, unsure = rule(logits)
    assert classes.tolist() == [0, 0, 1, 0]
    assert unsure.tolist() == [False, True, False, True]


def test_an_error_rate_below_what_the_split_can_show():
    with pytest.raises(InputError, match="at least 999 validation chips, the run has 100"):
        fit_rule(*make_validation(n=100), error_rate=0.001)


@pytest.mark.parametrize("threshold", ["", "x", "0", "1", "1.5", "nan", "f1=3", "recall=0", "=0.5"])
def test_thresholds_of_no_known_form(threshold):
    with pytest.raises(InputError, match="threshold: "):
        check_threshold(threshold, 2)


def test_thresholds_are_for_two_classes():
    assert [check_threshold(t, 2) for t in ("0.5", "0.3", "f1", "recall=0.9")] == [
        False, False, True, True
    ]  # fmt: skip
    assert check_threshold("0.5", 3) is False
    for threshold in ("0.3", "f1", "recall=0.9"):
        with pytest.raises(InputError, match="two classes, the model has 3"):
            check_threshold(threshold, 3)
