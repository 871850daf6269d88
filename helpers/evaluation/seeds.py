"""Runs that differ in their seed alone as one number with one interval."""

import itertools

import numpy as np
import pandas as pd

from helpers.metrics import metric_draws, over_seeds, with_interval
from helpers.training.runs import Run, class_probabilities

Draws = dict[str, np.ndarray]
"""What `metrics.metric_draws` returns."""


def test_draws(predictions: pd.DataFrame) -> Draws:
    """Test metrics of one run and their bootstrap draws, of places where every chip has a group.

    Equal draws for all runs on the same test split, so that differences are paired.
    """
    targets, probabilities = predictions.target.to_numpy(), class_probabilities(predictions)
    groups = predictions.group.to_numpy() if unit(predictions) == "places" else None
    return metric_draws(targets, probabilities, groups=groups)


def draws_of(runs: dict[tuple[str, int], Run]) -> dict[tuple[str, int], Draws]:
    """`test_draws` of runs by method and seed."""
    return {pair: test_draws(run.test_predictions) for pair, run in runs.items()}


def unit(predictions: pd.DataFrame) -> str:
    """What an interval draws: `places` where every chip has a group, else `chips`."""
    return "places" if (predictions.group != "").all() else "chips"


def method_means(
    runs: dict[tuple[str, int], Run], draws: dict[tuple[str, int], Draws], metrics: tuple[str, ...]
) -> pd.DataFrame:
    """Test metrics of every method: mean over its seeds.

    From runs by method and seed and their `draws_of`.

    Returns:
        `method`, `metric`, `seeds` (their number), `value` (mean over seeds), `low` and `high`
        (95 % interval of that mean, see `metrics.over_seeds`), `unit` (what was drawn beside
        seeds), `least` and `most` (of single seeds).
    """
    rows = []
    for method, metric in itertools.product(dict.fromkeys(m for m, _ in runs), metrics):
        tables = [draws[pair][metric] for pair in runs if pair[0] == method]
        values = [table[0] for table in tables]
        rows.append(
            {"method": method, "metric": metric, "seeds": len(tables), **over_seeds(tables)}
            | {"unit": unit(next(iter(runs.values())).test_predictions)}
            | {"least": min(values), "most": max(values)}
        )
    return pd.DataFrame(rows)


def means_view(means: pd.DataFrame) -> pd.DataFrame:
    """`method_means` as text, `value [low, high], seeds least to most`: methods by metrics."""

    def line(row) -> str:
        digits = 4 if row.high - row.low < 0.01 else 3  # what the interval can carry
        seeds = f", seeds {row.least:.{digits}f} to {row.most:.{digits}f}" if row.seeds > 1 else ""
        return with_interval(row._asdict(), digits) + seeds

    cells = {(row.method, row.metric): line(row) for row in means.itertuples()}
    return pd.Series(cells).unstack().loc[means.method.unique(), means.metric.unique()]


def method_gains(
    runs: dict[tuple[str, int], Run], draws: dict[tuple[str, int], Draws], metric: str = "auroc"
) -> pd.DataFrame:
    """Every pair of methods on the same test images: mean difference over the seeds of both.

    From runs by method and seed and their `draws_of`.

    Returns:
        `first`, `second`, `seeds`, `value` (second - first), `low` and `high` (95 % interval,
        paired by image and seed), `unit` as in `method_means`; `better` and `worse`: with how many
        seeds the interval of that seed alone lies above and below zero; `only_first`,
        `only_second`: images that only one of them has right, means over seeds.
    """
    rows = []
    for first, second in itertools.combinations(dict.fromkeys(method for method, _ in runs), 2):
        seeds = [seed for method, seed in runs if method == first and (second, seed) in runs]
        if not seeds:
            continue
        differences = [draws[second, s][metric] - draws[first, s][metric] for s in seeds]
        alone = [over_seeds([difference]) for difference in differences]
        tables = [[runs[m, s].test_predictions for s in seeds] for m in (first, second)]
        right = [np.stack([t.predicted == t.target for t in of_method]) for of_method in tables]
        rows.append(
            {"first": first, "second": second, "seeds": len(seeds), **over_seeds(differences)}
            | {
                "unit": unit(tables[0][0]),
                "better": sum(entry["low"] > 0 for entry in alone),
                "worse": sum(entry["high"] < 0 for entry in alone),
                "only_first": (right[0] & ~right[1]).sum(axis=1).mean(),
                "only_second": (right[1] & ~right[0]).sum(axis=1).mean(),
            }
        )
    return pd.DataFrame(rows)


def gain_over(baseline: Draws, draws: list[Draws]) -> dict[str, float]:
    """AUROC of a method over that of a baseline, mean over its seeds: `value, low, high`."""
    return over_seeds([of_seed["auroc"] - baseline["auroc"] for of_seed in draws])
