"""Pairs of a positive and a negative chip that the acquisition does not tell apart.

Where the classes come from different passes, a classifier may read the pass. On pairs whose
sharpness, haze and brightness are alike it cannot: what it still tells apart is on the ground.
"""

import numpy as np
import pandas as pd
from scipy.special import logit

from helpers import InputError
from helpers.evaluation.baselines import logistic_probe

CALIPER = 0.2
"""Standard deviations of the logit of the propensity score that a pair may lie apart: of those
that Austin (2011, doi 10.1002/pst.433) compares, the one that leaves the least bias."""


def matched_pairs(targets: np.ndarray, statistics: np.ndarray) -> np.ndarray:
    """Number of each chip's pair, -1 for chips without one, (N,).

    Pairs are made on the propensity score (Rosenbaum and Rubin 1983): the probability of the
    positive class from the statistics alone, fitted on these chips. The closest two are paired
    first, none twice, and none that lie further apart than the caliper.

    Args:
        targets: (N,) 0 or 1.
        statistics: (N, F), as from `baselines.acquisition_statistics`.

    Raises:
        InputError: there are not two classes.
    """
    if set(np.unique(targets)) != {0, 1}:
        raise InputError("match_acquisition: chips are matched across two classes")
    probabilities = logistic_probe(statistics, targets, statistics)[:, 1]
    scores = logit(probabilities.clip(1e-9, 1 - 1e-9))
    positive, negative = (np.flatnonzero(targets == target) for target in (1, 0))
    apart = np.abs(scores[positive][:, None] - scores[negative])
    rows, columns = np.nonzero(apart <= CALIPER * scores.std())
    pairs, numbers = np.full(len(targets), -1), iter(range(len(targets)))
    for place in np.argsort(apart[rows, columns], kind="stable"):
        two = positive[rows[place]], negative[columns[place]]
        if pairs[two[0]] < 0 and pairs[two[1]] < 0:
            pairs[list(two)] = next(numbers)
    return pairs


def imbalance(targets: np.ndarray, statistics: np.ndarray) -> float:
    """Largest difference between the classes' means of a statistic, in standard deviations.

    Below 0.1 is usually called balanced (Austin 2011).
    """
    table = pd.DataFrame(statistics)
    means, variances = table.groupby(targets).mean(), table.groupby(targets).var()
    return float((means.loc[1] - means.loc[0]).abs().div(variances.mean().pow(0.5)).max())
