"""Figures whose axes once could not be read."""

import pandas as pd

from helpers.reporting import comparison_plots


def test_an_axis_between_two_powers_of_ten_says_its_values():
    rows = pd.DataFrame({"method": ["a", "b"], "weights": [19_202, 37_634], "value": [0.9, 0.8]})
    figure = comparison_plots.against(rows.assign(low=0.7, high=1), "weights", "accuracy", "title")
    figure.canvas.draw()
    labels = figure.axes[0].get_xticklabels(which="both")
    assert [label.get_text() for label in labels] == ["19,202", "37,634"]
