"""Figures of chips are large enough to look at."""

import numpy as np
import pandas as pd
import torch

from helpers.reporting import chip_plots, plots

CHIPS = [(torch.full((3, 28, 28), 200, dtype=torch.uint8), 0)] * 6


def answers(numbers):
    return pd.DataFrame(
        {"label": "field", "predicted_label": "forest", "confidence": 0.9}, index=numbers
    )


def test_chips_are_at_least_120_pixels_wide():
    figure = chip_plots.answers(CHIPS, answers(range(5)), answers(range(5)), [np.eye(2)] * 5)
    figure.draw_without_rendering()
    assert min(axis.images[0].get_window_extent().width for axis in figure.axes) >= 120
    assert figure.axes[0].get_title() == "is field\nsays forest 0.90"
    assert figure.axes[10].get_title() == "falls by up to 1.00"


def test_a_chip_is_lit_where_the_answer_rests_on_it():
    figure = chip_plots.answers(
        CHIPS, answers([0]), answers([1]), [np.array([[0.4, 0.2], [0.0, -0.3]])]
    )
    lit = figure.axes[2].images[0].get_array()[::14, ::14, 0] / (200 / 255)
    np.testing.assert_allclose(lit, [[1, 0.6], [0.2, 0.2]], atol=1e-6)


def test_a_classifier_without_errors_has_a_sample_only():
    figure = chip_plots.answers(CHIPS, answers(range(2)), answers([]), [])
    assert len(figure.axes) == 2


def test_features_are_drawn_by_class_and_by_acquisition():
    labels, values = pd.Series(["a", "b"] * 10), np.arange(20.0)
    components = np.random.default_rng(0).normal(size=(20, 2))
    figure = plots.features_by_acquisition(
        components, np.array([0.5, 0.2]), labels, ("haze", values), "title"
    )
    left, right = figure.axes[:2]
    markers = [points.get_paths()[0].vertices.shape for points in left.collections]
    assert len(left.collections) == 2 and markers[0] != markers[1]
    assert right.get_title() == "by haze" and "50%" in right.get_xlabel()
