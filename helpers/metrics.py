"""Numbers from (targets, probabilities), each with a bootstrap interval.

Every metric is computed from per-image weights, so that one pass serves the estimate (all weights
one) and a whole block of bootstrap resamples (weights = how often an image was drawn). The tests
hold each metric against scikit-learn.
"""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest

METRICS = (
    "accuracy",
    "precision",
    "recall",
    "f1",
    "auroc",
    "average_precision",
    "brier",
    "calibration_error",
)
_BINS = 15  # of the calibration error, as in Guo et al. (2017)
_BLOCK = 250_000  # weights held at once, 2 MB: within reach of a core's cache


def evaluate(
    targets: np.ndarray,
    probabilities: np.ndarray,
    resamples: int = 2000,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> pd.DataFrame:
    """Test metrics with 95 % percentile-bootstrap intervals over the images.

    For two classes precision, recall, F1, AUROC, average precision and Brier score are those of
    class 1, the positive one; for more they are means over one-versus-rest classes (in a bootstrap
    draw: over the classes that were drawn), except the Brier score, which is summed over classes.
    The calibration error is the expected calibration error of the top class in 15 equal-width bins
    (Guo et al. 2017, arXiv:1706.04599).

    Args:
        targets: (N,) integer class indices.
        probabilities: (N, classes) rows that sum to one.
        resamples: number of bootstrap draws of N images with replacement.
        seed: of the draws; equal seeds draw equal images, which makes comparisons paired.
        groups: (N,) names of places or scenes, to draw whole groups as well; None or any empty
            name for no groups.

    Returns:
        Index `metric` (see METRICS), columns `value`, `low`, `high` and, with groups, `group_low`
        and `group_high`; and `undefined`: how many of the draws (of groups, where there are some)
        have no value, since only one class was drawn. They are left out of the interval.
    """

    def ends(units: np.ndarray | None) -> pd.DataFrame:
        draws = metric_draws(targets, probabilities, resamples, seed, units)
        return pd.DataFrame([interval(draws[name]) for name in METRICS], METRICS)

    table = ends(None)
    if groups is not None and (np.asarray(groups) != "").all():
        of_groups = ends(groups)
        table["group_low"], table["group_high"] = of_groups.low, of_groups.high
        table["undefined"] = of_groups.undefined
    return table[[*table.columns.drop("undefined"), "undefined"]].rename_axis("metric")


def metric_columns(
    targets: np.ndarray, probabilities: np.ndarray, names: tuple[str, ...], seed: int = 0
) -> dict[str, float]:
    """Some of `evaluate`'s metrics as one table row: `<name>`, `<name>_low`, `<name>_high`."""
    table = evaluate(targets, probabilities, seed=seed)
    return {
        name if column == "value" else f"{name}_{column}": table.loc[name, column]
        for name in names
        for column in ("value", "low", "high")
    }


def metric_draws(
    targets: np.ndarray,
    probabilities: np.ndarray,
    resamples: int = 2000,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Metric name -> (1 + resamples,): the metric, then its value in every bootstrap resample.

    With groups (N,), the name of each image's place or scene, whole groups are drawn instead of
    images (cluster bootstrap, Field and Welsh 2007): neighbouring chips are not independent, and
    what is asked is how other places would do.

    A resample of one class only has no AUROC; its entry is NaN.
    """
    rng = np.random.default_rng(seed)
    n = len(targets)
    unit = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    units = unit.max() + 1
    block = max(1, _BLOCK // n)
    parts = [weighted_metrics(targets, probabilities)]
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        counts = rng.multinomial(units, np.full(units, 1 / units), size)
        parts.append(weighted_metrics(targets, probabilities, counts[:, unit]))
    return {name: np.concatenate([part[name] for part in parts]) for name in METRICS}


def interval(draws: np.ndarray) -> dict[str, float]:
    """`value`, 95 % percentile interval `low, high`, and how many draws are `undefined` (NaN).

    `draws` (1 + resamples,) are a number and its value in every resample, as of `metric_draws`.
    """
    low, high = np.nanpercentile(draws[1:], [2.5, 97.5])
    undefined = int(np.isnan(draws[1:]).sum())
    return {"value": draws[0], "low": low, "high": high, "undefined": undefined}


def exact_interval(hits: np.ndarray | pd.Series) -> dict[str, float]:
    """Exact 95 % interval `low, high` of a share, from booleans (Clopper and Pearson 1934)."""
    found = binomtest(int(hits.sum()), len(hits)).proportion_ci()
    return {"low": found.low, "high": found.high}


def weighted_metrics(
    targets: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Metrics under several weightings of the images at once.

    Args:
        targets: (N,) class indices.
        probabilities: (N, classes).
        weights: (draws, N) weight of each image; None for one draw of all alike.

    Returns:
        Metric name -> (draws,).
    """
    targets, probabilities = np.asarray(targets), np.asarray(probabilities, dtype=np.float64)
    n_classes = probabilities.shape[1]
    weights = np.ones((1, len(targets))) if weights is None else weights.astype(np.float64)
    total = weights.sum(axis=1)
    predicted = probabilities.argmax(axis=1)
    scored = [1] if n_classes == 2 else range(n_classes)
    per_class = [
        _one_versus_rest(targets == c, predicted == c, probabilities[:, c], weights) for c in scored
    ]
    squared = (probabilities - np.eye(n_classes)[targets]) ** 2
    brier = squared[:, 1] if n_classes == 2 else squared.sum(axis=1)
    drawn = np.array([weights @ (targets == c) > 0 for c in scored])
    if n_classes > 2 and not drawn.all():
        # A small class, or one that lives in few groups, is missing from many draws.
        per_class = [
            {name: np.where(there, values, np.nan) for name, values in row.items()}
            for row, there in zip(per_class, drawn, strict=True)
        ]
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # all-NaN columns
        result = {name: np.nanmean([c[name] for c in per_class], axis=0) for name in per_class[0]}
    return result | {
        "accuracy": weights @ (predicted == targets) / total,
        "brier": weights @ brier / total,
        "calibration_error": _calibration_error(targets, probabilities, weights) / total,
    }


def _one_versus_rest(positive, predicted, score, weights) -> dict[str, np.ndarray]:
    """Metrics of one class: boolean (N,), boolean (N,), float (N,), (draws, N)."""
    hits = weights @ (positive & predicted)
    n_predicted, n_positive = weights @ predicted, weights @ positive
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.nan_to_num(hits / n_predicted)  # 0 where nothing was predicted, as sklearn
        recall = hits / n_positive
        f1 = 2 * hits / (n_predicted + n_positive)
    # Cumulated over falling scores; tied scores share one threshold, the last of their run.
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    sorted_weights = weights[:, order]
    every = np.cumsum(sorted_weights, axis=1)[:, last]
    true = np.cumsum(sorted_weights * positive[order], axis=1)[:, last]
    steps, false_steps = (np.diff(c, axis=1, prepend=0) for c in (true, every - true))
    below = true - steps / 2  # trapezoid: a tied pair counts one half
    with np.errstate(divide="ignore", invalid="ignore"):
        auroc = (false_steps * below).sum(1) / (true[:, -1] * (every - true)[:, -1])
        share = np.divide(true, every, out=np.zeros_like(true), where=every > 0)
        average_precision = (steps * share).sum(1) / true[:, -1]
    return {
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "auroc": auroc,
        "average_precision": average_precision,
    }


def _calibration_error(targets, probabilities, weights) -> np.ndarray:
    """Sum over bins of |sum of weighted (correct - confidence)|, shape (draws,)."""
    confidence = probabilities.max(axis=1)
    gap = (probabilities.argmax(axis=1) == targets) - confidence
    # Bin k holds (k / 15, (k + 1) / 15].
    bins = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    in_bin = bins[:, None] == np.arange(_BINS)
    return np.abs(weights @ (gap[:, None] * in_bin)).sum(axis=1)


def mcnemar(targets: np.ndarray, first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Exact McNemar test of two models' decisions on the same images (McNemar 1947).

    All three are class indices (N,).

    Returns:
        `only_first` and `only_second`: images that only one of them has right; `p_value` of the
        hypothesis that both are equally often right, two-sided.
    """
    only_first = int(((first == targets) & (second != targets)).sum())
    only_second = int(((first != targets) & (second == targets)).sum())
    disagreeing = only_first + only_second
    p_value = binomtest(only_first, disagreeing).pvalue if disagreeing else 1.0
    return {"only_first": only_first, "only_second": only_second, "p_value": p_value}


def paired_difference(
    targets: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    metric: str,
    resamples: int = 2000,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> dict[str, float]:
    """`interval` of the difference of a metric between two models, second - first.

    Both see the same images in every resample. Targets (N,) are class indices, `first` and `second`
    probabilities (N, classes), the others as in `metric_draws`.
    """
    one, other = (
        metric_draws(targets, p, resamples, seed, groups)[metric] for p in (first, second)
    )
    return interval(other - one)


def over_seeds(runs: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean of a number over runs that differ in their seed, with one interval for that mean.

    A resample draws images (or whole groups, the same for all runs) and runs, both with
    replacement: the interval holds for other places and for other seeds. Few runs make it narrow
    on their side, and a single run has none of the spread of seeds in it.

    Args:
        runs: one array (1 + resamples,) per seed: the number itself, then its value in every
            bootstrap draw of images, as from `metric_draws` with equal seeds.

    Returns:
        `value`, and `low` and `high` of the 95 % percentile interval.
    """
    table = np.stack(runs)
    drawn = np.random.default_rng(0).integers(len(table), size=(len(table), table.shape[1] - 1))
    means = np.take_along_axis(table[:, 1:], drawn, axis=0).mean(axis=0)
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return {"value": float(table[:, 0].mean()), "low": float(low), "high": float(high)}


def reliability(targets: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> pd.DataFrame:
    """Confidence and accuracy of the top class, in bins of equally many images by confidence.

    Returns:
        One row per bin: `confidence` and `accuracy` (means), `low` and `high` of the accuracy
        (`exact_interval`), `images`.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == targets
    rows = []
    for images in np.array_split(np.argsort(confidence, kind="stable"), min(bins, len(targets))):
        means = {"confidence": confidence[images].mean(), "accuracy": right[images].mean()}
        rows.append(means | exact_interval(right[images]) | {"images": len(images)})
    return pd.DataFrame(rows)


def with_interval(entry: Mapping[str, float] | pd.Series, digits: int = 3) -> str:
    """`value [low, high]` of an entry with these names, as tables and sentences show it."""
    value, low, high = (f"{entry[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def with_group_interval(entry: Mapping[str, float], digits: int = 3) -> str:
    """The same of a record's metric, with the interval over groups where it has one."""
    ends = {end: entry.get(f"group_{end}", entry[end]) for end in ("low", "high")}
    return with_interval({"value": entry["value"]} | ends, digits)
