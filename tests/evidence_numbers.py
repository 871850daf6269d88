"""A record of evidence against the predictions it was made of, without drawing intervals again."""

import numpy as np
import pytest

from helpers.metrics import weighted_metrics
from helpers.training.runs import class_probabilities


def check_numbers(found):
    """Metrics of runs from predictions, means and differences from runs."""
    values = {}
    for entry in found.record["runs"] + found.record["shapes"]:
        rows = found.predictions[found.predictions.run == entry["run"]]
        for split in ("valid", "test"):
            chips = rows[rows.split == split]
            numbers = weighted_metrics(chips.target.to_numpy(), class_probabilities(chips))
            for name, metric in entry[split].items():
                assert metric["value"] == pytest.approx(numbers[name][0], abs=2e-6), entry["run"]
        if entry["train_fraction"] == 1 and not entry["random_split"]:
            values[entry["method"], entry["seed"]] = {
                name: metric["value"] for name, metric in entry["test"].items()
            }
    summary = found.record["summary"]
    for row in summary["means"] + summary["shapes"]:
        of_method = [v[row["metric"]] for (m, _), v in values.items() if m == row["method"]]
        assert len(of_method) == row["seeds"]
        assert row["value"] == pytest.approx(np.mean(of_method), abs=5e-6)
        assert row["low"] <= row["value"] <= row["high"]
    for row in summary["gains"] + summary["shape_gains"]:
        seeds = [s for m, s in values if m == row["second"] and (row["first"], s) in values]
        gains = [
            values[row["second"], s][row["metric"]] - values[row["first"], s][row["metric"]]
            for s in seeds
        ]
        assert row["value"] == pytest.approx(np.mean(gains), abs=5e-6)
