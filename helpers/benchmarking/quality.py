"""Test metrics of every variant, and what it loses against the reference on the same images."""

import numpy as np
import pandas as pd
import torch

from helpers.benchmarking.bench import Bench
from helpers.deployment.runtimes import Predict
from helpers.deployment.variants.source import REFERENCE
from helpers.metrics import bootstrap_metrics, metric_columns

QUALITY = ("accuracy", "precision", "recall", "f1", "auroc")


def measure_quality(bench: Bench, predicts: dict[str, Predict]) -> pd.DataFrame:
    """Test metrics of every variant, and its difference to the reference on the same images.

    Returns:
        One row per variant: `variant`; for each of QUALITY its value, `_low` and `_high`;
        `accuracy_loss_points` with `_low` and `_high` (paired bootstrap over images, 95 %);
        `max_logit_difference, mean_logit_difference, agreement` (share of equal decisions);
        `passes_gate`.
    """
    logits = {name: _predict_all(predict, bench.chips) for name, predict in predicts.items()}
    reference = logits[REFERENCE]
    draws = {name: _accuracy_draws(bench, each) for name, each in logits.items()}
    rows = []
    for name, each in logits.items():
        row = metric_columns(bench.targets, _softmax(each), QUALITY, bench.config.seed)
        loss = 100 * (_accuracy(bench, reference) - _accuracy(bench, each))
        low, high = np.percentile(100 * (draws[REFERENCE] - draws[name]), [2.5, 97.5])
        difference = np.abs(each - reference)
        rows.append(
            {"variant": name}
            | row
            | {
                "accuracy_loss_points": loss,
                "accuracy_loss_points_low": low,
                "accuracy_loss_points_high": high,
                "max_logit_difference": difference.max(),
                "mean_logit_difference": difference.mean(),
                "agreement": (each.argmax(1) == reference.argmax(1)).mean(),
                "passes_gate": bool(loss <= bench.config.gate_points + 1e-9),
            }
        )
    return pd.DataFrame(rows)


def _predict_all(predict: Predict, chips: np.ndarray, batch_size: int = 32) -> np.ndarray:
    starts = range(0, len(chips), batch_size)
    return np.concatenate([predict(chips[i : i + batch_size]) for i in starts])


def _softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).double().softmax(dim=1).numpy()


def _accuracy(bench: Bench, logits: np.ndarray) -> float:
    return float((logits.argmax(axis=1) == bench.targets).mean())


def _accuracy_draws(bench: Bench, logits: np.ndarray) -> np.ndarray:
    """Accuracy in bootstrap draws; equal seeds draw equal images, so differences are paired."""
    return bootstrap_metrics(bench.targets, _softmax(logits), seed=bench.config.seed)["accuracy"]
