"""How long a prediction takes: variants in turn, percentiles that the samples carry."""

import math
import time
from collections.abc import Sequence
from itertools import count

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student

from helpers.benchmarking.bench import Bench
from helpers.benchmarking.percentiles import latency_percentiles
from helpers.console import progress_bar
from helpers.deployment.runtimes import Predict
from helpers.deployment.variants.source import CONTROL, REFERENCE

_TURN = 5  # timed predictions before the next variant, at most
_LEAST_ROUNDS = 5  # of two or three the interval is narrow by luck too often
_MOST_ROUNDS = 20
_MOST_SECONDS = 10  # after which no further round of a batch size begins
_NARROW = 0.05  # width of the 95 % interval of a ratio, relative to the ratio

# A control may agree with the reference by luck. Of twelve forms and batch sizes that compute what
# the reference does, timed on two idle cores, ten had medians within this ratio of its median.
LEAST_NOISE = 1.1


def measure_latency(bench: Bench, predicts: dict[str, Predict]) -> pd.DataFrame:
    """Time every variant in turn, round after round, for every batch size.

    A turn is one prediction that is not timed and at most five that are: the first still meets the
    caches, and the waiting threads, that the variant before has left. `latency_samples` take five
    rounds or more. There are further ones until the interval of every variant's ratio to the
    reference is narrower than 5 % of it, but no more than twenty, nor any after ten seconds.

    Returns:
        One row per prediction: `variant, batch_size, round, seconds`.
    """
    parts = []
    for size, samples in zip(bench.config.batch_sizes, bench.config.latency_samples, strict=True):
        chips = np.resize(bench.chips, (size, *bench.chips.shape[1:]))
        turn = min(_TURN, math.ceil(samples / _LEAST_ROUNDS))
        least = max(_LEAST_ROUNDS, math.ceil(samples / turn))
        rows, start = [], time.perf_counter()
        rounds = range(1, max(least, _MOST_ROUNDS) + 1)
        for number in progress_bar(rounds, desc=f"timing predictions of {size}"):
            for name, predict in predicts.items():
                predict(chips)
                rows += [(name, size, number, _seconds(predict, chips)) for _ in range(turn)]
            if number >= least:
                of_size = pd.DataFrame(rows, columns=["variant", "batch_size", "round", "seconds"])
                reaches = _reaches(of_size)
                seconds = time.perf_counter() - start
                if (reaches - 1 / reaches < _NARROW).all() or seconds > _MOST_SECONDS:
                    break
        parts.append(of_size)
    return pd.concat(parts, ignore_index=True)


def _seconds(predict: Predict, chips: np.ndarray) -> float:
    start = time.perf_counter()
    predict(chips)
    return time.perf_counter() - start


def latency_table(samples: pd.DataFrame, percentiles: Sequence[float]) -> pd.DataFrame:
    """Medians, percentiles and speedups.

    Returns:
        One row per variant and batch size: `variant, batch_size, n`; percentiles in ms, see
        `latency_percentiles`; `images_per_s` at the median; `speedup`, the ratio of the
        reference's median to the variant's, with `_low` and `_high` (95 % over the rounds);
        `beyond_noise`, whether this interval lies beyond the control's.
    """
    parts = []
    for size, of_size in samples.groupby("batch_size", sort=False):
        rows = [
            {"variant": variant, "n": len(group)}
            | latency_percentiles(group.seconds.to_numpy(), percentiles)
            | {"images_per_s": size / group.seconds.median()}
            for variant, group in of_size.groupby("variant", sort=False)
        ]
        table = pd.DataFrame(rows).set_index("variant")
        table.insert(0, "batch_size", size)
        table["speedup"] = table.images_per_s / table.images_per_s[REFERENCE]
        reaches = _reaches(of_size)
        table["speedup_low"], table["speedup_high"] = (
            table.speedup / reaches,
            table.speedup * reaches,
        )
        beyond = beyond_noise(table.speedup_low, table.speedup_high)
        parts.append(table.assign(beyond_noise=beyond).reset_index())
    return pd.concat(parts, ignore_index=True)


def _reaches(samples: pd.DataFrame) -> pd.Series:
    """The factor that the interval of every variant's ratio to the reference reaches up and down.

    Of each round the ratio of the two medians, since a slow moment of the machine hits both;
    Student's 95 % interval of the mean of their logarithms.

    Args:
        samples: of `measure_latency`, at one batch size.
    """
    medians = samples.groupby(["round", "variant"]).seconds.median().unstack()
    logs = np.log(medians.rdiv(medians[REFERENCE], axis="index"))
    return np.exp(logs.sem() * student.ppf(0.975, len(logs) - 1))


def beyond_noise(low: pd.Series, high: pd.Series) -> pd.Series:
    """Whether intervals of ratios to the reference lie beyond the control's, by variant.

    The control's counts as no narrower than from 1 / `LEAST_NOISE` to `LEAST_NOISE`.

    Args:
        low: of the intervals; without the control where it was not measured.
        high: of the intervals.
    """
    ends = [LEAST_NOISE, high.get(CONTROL, 1.0), 1 / low.get(CONTROL, 1.0)]
    limit = np.nanmax(ends)
    return (low > limit) | (high < 1 / limit)


def request_parts(bench: Bench, predicts: dict[str, Predict], variant: str) -> pd.DataFrame:
    """Where one request's time goes: medians in ms of decoding a file, transfer and model."""
    dataset = bench.data.dataset("test", bench.source.classifier.config.image_size)
    numbers = count()
    preprocessing = [_seconds(lambda _: dataset[next(numbers)], None) for _ in range(len(dataset))]
    parts = {"preprocessing (read, decode, resize)": np.median(preprocessing)}
    chip = bench.chips[:1]
    if bench.device == "cuda":

        def transfer(array):
            torch.from_numpy(array).cuda()
            torch.cuda.synchronize()

        parts["transfer to the GPU"] = np.median([_seconds(transfer, chip) for _ in range(50)])
    else:
        parts["transfer (none: same memory)"] = 0.0
    model = np.median([_seconds(predicts[variant], chip) for _ in range(50)])
    parts[f"model ({variant}, batch 1)"] = model
    return pd.DataFrame({"part": parts.keys(), "ms": [1e3 * s for s in parts.values()]})
