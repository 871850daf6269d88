"""Precision at a prevalence, and coverage of conformal answers."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax

from helpers.evaluation.operating import coverage_table, threshold_table
from helpers.reporting.rules import answer_curves, prevalence_answer
from tests.evaluation.test_calibration import make_validation


def predictions(n=2000, classes=2, seeds=(0, 1)):
    """Validation and test chips whose probabilities are overconfident by half."""
    tables = []
    for split, seed in zip(("valid", "test"), seeds, strict=True):
        targets, logits = make_validation(seed, n, sharpness=1.5, classes=classes)
        table = pd.DataFrame(softmax(logits, axis=1)).add_prefix("p_")
        tables.append(table.assign(split=split, target=targets))
    return pd.concat(tables, ignore_index=True)


def test_precision_and_recall_are_those_that_counting_gives():
    table = predictions()
    found = threshold_table(table, prevalence=0.1, thresholds=(0.3, 0.9)).set_index("threshold")
    test = table[table.split == "test"]
    for threshold, row in found.iterrows():
        called = test.p_1 >= threshold
        assert row.recall == pytest.approx(called[test.target == 1].mean())
        assert row.precision == pytest.approx((test.target == 1)[called].mean())


@pytest.mark.parametrize("prevalence", [0.02, 0.5])
def test_precision_at_a_prevalence_is_that_of_a_split_that_has_it(prevalence):
    """Negatives repeated until the positives are as rare as asked for."""
    table = predictions()
    test = table[table.split == "test"]
    positive, negative = test[test.target == 1], test[test.target == 0]
    n = round(len(positive) * (1 - prevalence) / prevalence)
    rare = pd.concat([positive, negative.iloc[np.resize(np.arange(len(negative)), n)]])
    row = threshold_table(table, prevalence, thresholds=(0.5,)).iloc[0]
    counted = (rare.target == 1)[rare.p_1 >= 0.5].mean()
    assert row.precision_at_prevalence == pytest.approx(counted, abs=0.005)


def test_coverage_is_what_was_asked_for_and_answers_err_no_more_than_that_of_all():
    found = coverage_table(predictions())
    assert len(found) == 5
    assert (
        (found.low - 0.02 <= 1 - found.error_rate) & (1 - found.error_rate <= found.high + 0.02)
    ).all()
    assert found.unsure.is_monotonic_decreasing and found.unsure.iloc[0] > 0.2
    assert (found.wrong * (1 - found.unsure) <= found.error_rate + 0.02).all()


def test_rates_that_need_more_validation_chips_have_no_row():
    assert coverage_table(predictions(n=12)).error_rate.tolist() == [0.1, 0.2]


def test_more_classes_have_no_threshold_and_the_figure_leaves_it_out():
    table = predictions(n=60, classes=3)
    thresholds, coverage = threshold_table(table, 0.1), coverage_table(table)
    assert thresholds.empty and len(coverage) == 4
    assert len(answer_curves(thresholds, coverage, 0.1, "three").axes) == 1
    assert "two classes" in prevalence_answer(thresholds, 0.1)
    two = threshold_table(predictions(n=60), 0.1)
    assert len(answer_curves(two, coverage, 0.1, "two").axes) == 2
    assert "10.00% of the chips" in prevalence_answer(two, 0.1)
