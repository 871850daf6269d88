"""What answers of a finished run are worth: by threshold, by prevalence, by error rate."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from helpers import InputError
from helpers.evaluation.calibration import fit_rule, logits_from
from helpers.metrics import exact_interval
from helpers.training.runs import class_probabilities

THRESHOLDS = np.linspace(0.01, 0.99, 99)
ERROR_RATES = (0.01, 0.02, 0.05, 0.1, 0.2)


def threshold_table(
    predictions: pd.DataFrame, prevalence: float, thresholds: Sequence[float] = THRESHOLDS
) -> pd.DataFrame:
    """Test precision and recall of the positive class, by the probability it is answered from.

    Prevalence is the share of positive chips where the classifier will work.

    Returns:
        `threshold, recall, false_positive_rate` (which do not depend on how many are positive),
        `precision` on the test split and `precision_at_prevalence`; NaN where nothing is called
        positive. No rows for more than two classes.
    """
    test = predictions[predictions.split == "test"]
    probabilities = class_probabilities(test)
    columns = ["recall", "false_positive_rate", "precision", "precision_at_prevalence"]
    if probabilities.shape[1] != 2:
        return pd.DataFrame(columns=["threshold", *columns])
    called = probabilities[:, 1] >= np.asarray(thresholds)[:, None]
    positive = test.target.to_numpy() == 1
    recall, false = called[:, positive].mean(axis=1), called[:, ~positive].mean(axis=1)
    shares = (positive.mean(), prevalence)
    values = [recall, false, *(_precision(recall, false, share) for share in shares)]
    return pd.DataFrame({"threshold": thresholds} | dict(zip(columns, values, strict=True)))


def _precision(recall: np.ndarray, false_positive_rate: np.ndarray, share: float) -> np.ndarray:
    """Bayes: of what is called positive, the part that is, where `share` of all chips are."""
    right, wrong = share * recall, (1 - share) * false_positive_rate
    return np.divide(right, right + wrong, out=np.full_like(right, np.nan), where=right + wrong > 0)


def coverage_table(predictions: pd.DataFrame) -> pd.DataFrame:
    """Conformal answers: the rule from the validation split, what it does on the test split.

    Returns:
        One row for each of ERROR_RATES that does not need more validation chips than there are:
        `error_rate`, `coverage` (share of test chips whose class is in the conformal set) with its
        exact 95 % interval `low, high` (of chips that are exchangeable, which those of other places
        are not), `unsure` (share without an answer), `wrong` (share of wrong ones among answers).
    """
    valid, test = (predictions[predictions.split == split] for split in ("valid", "test"))
    logits = logits_from(class_probabilities(test))
    targets = test.target.to_numpy()
    rows = []
    for rate in ERROR_RATES:
        try:
            rule = fit_rule(
                valid.target.to_numpy(), logits_from(class_probabilities(valid)), error_rate=rate
            )
        except InputError:  # too few validation chips
            continue
        probabilities = rule.calibrated(logits)
        covered = 1 - probabilities[np.arange(len(targets)), targets] <= rule.quantile
        _, classes, unsure = rule(logits)
        wrong = (classes != targets)[~unsure]
        rows.append(
            {"error_rate": rate, "coverage": covered.mean(), **exact_interval(covered)}
            | {"unsure": unsure.mean(), "wrong": wrong.mean() if len(wrong) else np.nan}
        )
    columns = ["error_rate", "coverage", "low", "high", "unsure", "wrong"]
    return pd.DataFrame(rows, columns=columns)
