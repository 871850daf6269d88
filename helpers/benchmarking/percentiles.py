"""Percentiles of latency, where the samples carry them."""

import math
from collections.abc import Sequence

import numpy as np

from helpers import InputError

PERCENTILES = (50, 90, 95, 99)


def samples_needed(percentile: float) -> int:
    """Samples behind a percentile such that the largest exceeds it with 95 % confidence.

    With fewer, not even the slowest query seen bounds it (Wilks 1941: 1 - q ** n >= 0.95):
    5 for the median, 29 for p90, 59 for p95, 299 for p99.
    """
    return math.ceil(math.log(0.05) / math.log(percentile / 100))


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
    """Percentiles in ms as LoadGen takes them (element floor(n * q) of the sorted latencies).

    Args:
        seconds: (n,) latencies.
        percentiles: in percent.

    Returns:
        `p50_ms` and so on; NaN where `samples_needed` is more than n.
    """
    ordered = np.sort(seconds)
    n = len(ordered)
    return {
        f"p{q:g}_ms": 1e3 * ordered[int(n * q / 100)] if n >= samples_needed(q) else math.nan
        for q in percentiles
    }
