"""How long a prediction takes: variants in turn, percentiles that the samples carry."""

import time
from collections.abc import Sequence
from itertools import count

import numpy as np
import pandas as pd
import torch

from helpers.benchmarking.bench import Bench
from helpers.benchmarking.percentiles import latency_percentiles
from helpers.deployment.runtimes import Predict
from helpers.deployment.variants.source import REFERENCE

_TURN = 5  # timed predictions before the next variant


def measure_latency(bench: Bench, predicts: dict[str, Predict], progress=print) -> pd.DataFrame:
    """Time every variant in turn, round after round, for every batch size.

    A turn is one prediction that is not timed and up to five that are: the first still meets the
    caches, and the waiting threads, that the variant before has left.

    Returns:
        One row per prediction: `variant, batch_size, seconds`.
    """
    rows = []
    for size, samples in zip(bench.config.batch_sizes, bench.config.latency_samples, strict=True):
        chips = np.resize(bench.chips, (size, *bench.chips.shape[1:]))
        for predict in predicts.values():
            predict(chips)
        for done in range(0, samples, _TURN):
            for name, predict in predicts.items():
                predict(chips)
                turn = min(_TURN, samples - done)
                rows += [(name, size, _seconds(predict, chips)) for _ in range(turn)]
        progress(f"batch {size}: {samples} predictions of each of {len(predicts)} variants")
    return pd.DataFrame(rows, columns=["variant", "batch_size", "seconds"])


def _seconds(predict: Predict, chips: np.ndarray) -> float:
    start = time.perf_counter()
    predict(chips)
    return time.perf_counter() - start


def latency_table(samples: pd.DataFrame, percentiles: Sequence[float]) -> pd.DataFrame:
    """`variant, batch_size, n`, percentiles in ms (NaN where n does not carry them), images_per_s
    at the median, and speedup, the ratio of the reference's median to the variant's.
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
    return table.assign(speedup=table.images_per_s / table.batch_size.map(reference))


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
