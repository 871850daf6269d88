"""Where on the ground a classifier is right: a map where places have coordinates, else a list."""

import numpy as np
import pandas as pd

from helpers.evaluation import robustness
from helpers.reporting import place_plots


def accuracies(places, methods=("lora",)):
    table = pd.DataFrame(
        {
            "group": [f"block {n}" for n in range(places)],
            "chips": np.arange(places) + 10,
            "accuracy": np.linspace(0.6, 1, places),
        }
    ).assign(low=0.5, high=1)
    return pd.concat([table.assign(method=method) for method in methods])


def manifest(**columns):
    rows = pd.DataFrame({"group": ["a", "a", "b", "c"], "split": ["test"] * 3 + ["train"]})
    return rows.assign(**columns)


def test_a_place_lies_at_the_mean_of_its_test_chips():
    where = robustness.place_coordinates(
        manifest(longitude=[10.0, 12.0, 20.0, 99.0], latitude=["1", "2", "3", ""])
    )
    assert where.values.tolist() == [["a", 11.0, 1.5], ["b", 20.0, 3.0]]


def test_there_is_no_map_unless_every_test_chip_lies_on_earth():
    assert robustness.place_coordinates(manifest()).empty
    metres = manifest(longitude=[500_000.0] * 4, latitude=[4_000_000.0] * 4)
    assert robustness.place_coordinates(metres).empty
    gaps = manifest(longitude=[10.0, 12.0, "", 99.0], latitude=1.0)
    assert robustness.place_coordinates(gaps).empty
    groups = manifest(longitude=10.0, latitude=1.0).assign(group="")
    assert robustness.place_coordinates(groups).empty


def test_a_map_names_the_worst_large_places_without_overlaps():
    table = accuracies(30, ("head_only", "lora"))
    ring = np.linspace(0, 2 * np.pi, 30)
    where = pd.DataFrame(
        {"group": table.group[:30], "longitude": np.cos(ring), "latitude": 50 + np.sin(ring)}
    )
    figure = place_plots.accuracy_by_place(table, where, "title")
    for axis in figure.axes[:2]:
        texts = [text.get_text() for text in axis.texts]
        large = table[(table.method == "lora") & (table.chips >= robustness.SMALL_PLACE)]
        worst = large.nsmallest(place_plots.WORST_NAMED, "accuracy")
        assert texts == [f"{row.accuracy:.2f} ({row.chips})" for row in worst.itertuples()]
        boxes = [text.get_window_extent() for text in axis.texts]
        assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


def test_without_coordinates_the_worst_places_are_listed():
    where = robustness.place_coordinates(manifest())
    figure = place_plots.accuracy_by_place(accuracies(30), where, "title")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [f"block {n} ({n + 10})" for n in range(place_plots.WORST_ROWS)][::-1]
    assert figure.axes[0].get_ylabel() == "place (chips), the worst 20 of 30"
    assert figure.get_figheight() < 6
