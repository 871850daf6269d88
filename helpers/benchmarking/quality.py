"""What every variant loses against the reference on the same images, and whether it may."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch

from helpers.benchmarking.bench import Bench
from helpers.deployment.runtimes import Predict, Variant
from helpers.deployment.variants.source import REFERENCE
from helpers.metrics import metric_columns

QUALITY = ("accuracy", "precision", "recall", "f1", "auroc")
_DRAWS = 2000  # bootstrap draws behind the interval of what is lost


def measure_quality(
    bench: Bench, variants: Mapping[str, Variant], predicts: Mapping[str, Predict]
) -> pd.DataFrame:
    """Metrics of every variant on the validation split, and on the test split of what passes there.

    The gate is decided on the validation split: the upper end of the interval of the points lost
    must lie within it. So the test split says of what passed how good it is, and chooses nothing.

    Predictions are made in batches of `max_batch`, as they are served under load. Where the logits
    of a chip depend on its neighbours in the batch, chips are sent one at a time as well. Variants
    whose logits are the reference's by construction would show nothing and are left out.

    Returns:
        One row per split, variant and batch size: `split` (`valid`, then `test`), `variant,
        batch_size`; for each of QUALITY its value, `_low` and `_high`; `accuracy_loss_points` with
        `_low` and `_high` (paired bootstrap, 95 %, over whole groups where the data name them);
        `max_logit_difference, mean_logit_difference, agreement` (share of equal decisions);
        `passes_gate`. Logits that are not finite have no metrics and do not pass.
    """
    judged = {name: v for name, v in variants.items() if "only_timed" not in v.options}
    valid = _judge(bench, "valid", judged, predicts)
    passed = {name: judged[name] for name in passing(valid)}
    test = _judge(bench, "test", passed, predicts)
    return pd.concat([valid, test], ignore_index=True)


def _judge(
    bench: Bench, split: str, variants: Mapping[str, Variant], predicts: Mapping[str, Predict]
) -> pd.DataFrame:
    """The rows of one split; in that of the test any finite logits pass."""
    chips, targets = bench.split(split)
    largest = bench.config.max_batch
    reference = _predict_all(predicts[REFERENCE], chips, largest)
    right = reference.argmax(1) == targets
    weights = _draws(bench, split)
    rows = []
    for name, variant in variants.items():
        for size in (1, largest) if "depends_on_batch" in variant.options else (largest,):
            logits = reference
            if name != REFERENCE:
                logits = _predict_all(predicts[name], chips, size)
            row = {"split": split, "variant": name, "batch_size": size, "passes_gate": False}
            if np.isfinite(logits).all():
                lost = 100.0 * (right.astype(int) - (logits.argmax(1) == targets))
                low, high = np.percentile(weights @ lost, [2.5, 97.5])
                difference = np.abs(logits - reference)
                probabilities = torch.from_numpy(logits).double().softmax(dim=1).numpy()
                row |= metric_columns(targets, probabilities, QUALITY, bench.config.seed) | {
                    "accuracy_loss_points": lost.mean(),
                    "accuracy_loss_points_low": low,
                    "accuracy_loss_points_high": high,
                    "max_logit_difference": difference.max(),
                    "mean_logit_difference": difference.mean(),
                    "agreement": (logits.argmax(1) == reference.argmax(1)).mean(),
                    "passes_gate": split == "test" or high <= bench.config.gate_points + 1e-9,
                }
            rows.append(row)
    return pd.DataFrame(rows)


def passing(quality: pd.DataFrame) -> list[str]:
    """Variants that pass the gate with every batch size and on every split, in their order."""
    passes = quality.groupby("variant", sort=False).passes_gate.all()
    return list(passes.index[passes])


def worst_rows(quality: pd.DataFrame, split: str) -> pd.DataFrame:
    """One row per variant of a split: of several batch sizes the one that loses most."""
    rows = quality[quality.split == split]
    order = rows.sort_values("accuracy_loss_points", na_position="last", kind="stable")
    return order.groupby("variant").tail(1).sort_index()


def _predict_all(predict: Predict, chips: np.ndarray, batch_size: int) -> np.ndarray:
    starts = range(0, len(chips), batch_size)
    return np.concatenate([predict(chips[i : i + batch_size]) for i in starts])


def _draws(bench: Bench, split: str) -> np.ndarray:
    """Weights (draws, chips) of a bootstrap over groups, or chips where no group is named."""
    groups = bench.data.manifest.group[bench.data.manifest.split == split].to_numpy()
    named = (groups != "").all()
    unit = np.unique(groups, return_inverse=True)[1] if named else np.arange(len(groups))
    units = unit.max() + 1
    rng = np.random.default_rng(bench.config.seed)
    counts = rng.multinomial(units, np.full(units, 1 / units), size=_DRAWS)[:, unit]
    return counts / counts.sum(axis=1, keepdims=True)
