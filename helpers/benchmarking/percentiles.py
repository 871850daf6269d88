"""Percentiles of latency, where the samples carry them."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import binom

from helpers import InputError

PERCENTILES = (50, 90, 95, 99)
CONFIDENCE = 0.95  # that the true percentile is no larger than the one shown


def samples_needed(percentile: float) -> int:
    """Samples behind a percentile such that the largest exceeds it with 95 % confidence.

    With fewer, not even the slowest query seen bounds it (Wilks 1941: 1 - q ** n >= 0.95):
    5 for the median, 29 for p90, 59 for p95, 299 for p99.
    """
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(percentile / 100))


def check_percentiles(percentiles: Sequence[float], samples: int) -> None:
    """Raise InputError if so many samples do not carry a percentile."""
    for percentile in percentiles:
        if not 0 < percentile < 100:
            raise InputError(f"percentiles: {percentile:g} is not between 0 and 100")
        if samples_needed(percentile) > samples:
            raise InputError(
                f"percentiles: p{percentile:g} needs at least {samples_needed(percentile)} samples "
                f"and there are {samples}; ask for more samples or a lower percentile"
            )


def latency_percentiles(
    seconds: np.ndarray, percentiles: Sequence[float] = PERCENTILES
) -> dict[str, float]:
    """The median, and percentiles of the tail that the true ones do not exceed, in ms.

    A percentile above 50 is the smallest order statistic that bounds the true one with 95 %
    confidence, whatever the distribution: of n samples, as many lie below the true percentile as a
    binomial(n, q) count, so it is element k of the sorted latencies (from 0) for the smallest k
    with P(count <= k) >= 0.95 (David and Nagaraja 2003, Order Statistics, 7.1). LoadGen's own,
    element floor(n * q), lies below the true p99 nearly every second time.

    Args:
        seconds: (n,) latencies.
        percentiles: in percent.

    Returns:
        `p50_ms` and so on; NaN where `samples_needed` is more than n.
    """
    ordered, n = np.sort(seconds), len(seconds)

    def value(percentile: float) -> float:
        if n < samples_needed(percentile):
            return math.nan
        quantile = percentile / 100
        rank = n * quantile if percentile <= 50 else binom.ppf(CONFIDENCE, n, quantile)
        return 1e3 * ordered[int(rank)]

    return {f"p{percentile:g}_ms": value(percentile) for percentile in percentiles}
