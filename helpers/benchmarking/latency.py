"""How long a prediction takes: variants in turn, percentiles that the samples carry."""

import time
from collections.abc import Sequence
from itertools import count

import numpy as np
import pandas as pd
import torch

from helpers.benchmarking.bench import Bench
from helpers.benchmarking.percentiles import latency_percentiles
from helpers.console import progress_bar
from helpers.deployment.runtimes import Predict
from helpers.deployment.variants.source import CONTROL, REFERENCE

_TURN = 5  # timed predictions before the next variant

# A control may agree with the reference by luck. Of twelve forms and batch sizes that compute what
# the reference does, timed on two idle cores, ten had medians within this ratio of its median.
LEAST_NOISE = 1.1


def measure_latency(bench: Bench, predicts: dict[str, Predict]) -> pd.DataFrame:
    """Time every variant in turn, round after round, for every batch size.

    A turn is one prediction that is not timed and up to five that are: the first still meets the
    caches, and the waiting threads, that the variant before has left.

    Returns:
        One row per prediction: `variant, batch_size, seconds`.
    """
    rows = []
    for size, samples in zip(bench.config.batch_sizes, bench.config.latency_samples, strict=True):
        chips = np.resize(bench.chips, (size, *bench.chips.shape[1:]))
        rounds = range(0, samples, _TURN)
        for done in progress_bar(rounds, desc=f"timing predictions of {size}"):
            for name, predict in predicts.items():
                predict(chips)
                turn = min(_TURN, samples - done)
                rows += [(name, size, _seconds(predict, chips)) for _ in range(turn)]
    return pd.DataFrame(rows, columns=["variant", "batch_size", "seconds"])


def _seconds(predict: Predict, chips: np.ndarray) -> float:
    start = time.perf_counter()
    predict(chips)
    return time.perf_counter() - start


def latency_table(samples: pd.DataFrame, percentiles: Sequence[float]) -> pd.DataFrame:
    """Medians, percentiles and speedups.

    Returns:
        One row per variant and batch size: `variant, batch_size, n`; percentiles in ms, see
        `latency_percentiles`; `images_per_s` at the median; `speedup`, the ratio of the
        reference's median to the variant's; `beyond_noise`, whether that ratio lies outside the
        `noise` of the control's.
    """
    rows = []
    for (variant, size), group in samples.groupby(["variant", "batch_size"], sort=False):
        median = group.seconds.median()
        rows.append(
            {"variant": variant, "batch_size": size, "n": len(group)}
            | latency_percentiles(group.seconds.to_numpy(), percentiles)
            | {"images_per_s": size / median}
        )
    table = pd.DataFrame(rows)
    reference = table[table.variant == REFERENCE].set_index("batch_size").images_per_s
    table["speedup"] = table.images_per_s / table.batch_size.map(reference)
    control = table[table.variant == CONTROL].set_index("batch_size").speedup
    limits = table.batch_size.map({size: noise(control.get(size, 1.0)) for size in reference.index})
    return table.assign(beyond_noise=np.abs(np.log(table.speedup)) > np.log(limits))


def noise(control: float) -> float:
    """Ratio of two measurements, 1 or more, up to which they count as equal.

    Args:
        control: the ratio of two measurements of the same thing.
    """
    return max(control, 1 / control, LEAST_NOISE)


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
