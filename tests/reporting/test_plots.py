"""Figures whose axes or names once could not be read, and what the table of all forms says."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.text import Text

from helpers.reporting import benchmark_plots, comparison_plots, plots


def test_an_axis_between_two_powers_of_ten_says_its_values():
    rows = pd.DataFrame({"method": ["a", "b"], "weights": [19_202, 37_634], "value": [0.9, 0.8]})
    figure = comparison_plots.against(rows.assign(low=0.7, high=1), "weights", "accuracy", "title")
    figure.canvas.draw()
    labels = figure.axes[0].get_xticklabels(which="both")
    assert [label.get_text() for label in labels] == ["19,202", "37,634"]


def test_methods_differ_in_grey():
    styles = plots.method_styles(["head_only", "lora", "dora", "full", "lora_last6", "random_lora"])
    looks = [(style["marker"], style["linestyle"]) for style in styles.values()]
    assert len(set(looks)) == len({marker for marker, _ in looks}) == 6
    assert plots.method_styles(["full"])["full"] == styles["full"]  # whatever it stands beside


def test_names_of_points_do_not_overlap():
    figure, axis = plt.subplots()
    x, y = np.tile([1, 1.01, 1.02], 2), np.repeat([5, 5.02], 3)
    axis.plot(x, y, "o")
    figure.draw_without_rendering()
    plots.label_points(axis, x, y, ["first", "", "third", "fourth", "", "last"], 3)
    assert [text.get_text() for text in axis.texts] == ["first", "third", "fourth", "last"]
    assert not any_overlap(axis)


def any_overlap(axis):
    """Whether a name lies over another, over the legend or outside of the axes."""
    boxes = [Text.get_window_extent(text) for text in axis.texts]  # without lines to their points
    inside = [axis.bbox.x0 <= b.x0 and b.x1 <= axis.bbox.x1 for b in boxes]
    inside += [axis.bbox.y0 <= b.y0 and b.y1 <= axis.bbox.y1 for b in boxes]
    boxes += [axis.get_legend().get_window_extent()] if axis.get_legend() else []
    return not all(inside) or any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


def test_so_many_names_at_one_place_lie_around_it_inside_of_the_axes():
    figure, axis = plt.subplots()
    axis.plot([0, 1], [0, 1], "o", label="points")
    axis.legend(loc="upper right")
    figure.draw_without_rendering()
    plots.label_points(axis, [1] * 12, [1] * 12, [f"variant {n}" for n in range(12)], 3)
    assert len(axis.texts) == 12 and not any_overlap(axis)


def test_a_confusion_matrix_says_shares_of_the_true_class():
    figure = plots.confusion([[9, 1], [0, 0]], ["a", "b"], "title")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["9\n90%", "1\n10%", "0\n0%", "0\n0%"]


def test_operating_curves_show_the_corner_where_they_bend():
    corner = pd.DataFrame({"method": "lora", "x": [0, 0.02, 1], "y": [0, 0.98, 1]})
    pr = corner.assign(curve="pr", x=[0, 0.96, 1], y=[1, 0.98, 0.5])
    figure = comparison_plots.operating_curves(pd.concat([corner.assign(curve="roc"), pr]), "title")
    assert figure.axes[0].get_xlim()[1] == pytest.approx(0.12)
    assert figure.axes[1].get_xlim()[0] == pytest.approx(0.88)


def test_runtimes_differ_in_grey_and_are_named():
    samples = pd.DataFrame(
        {"variant": ["bf16", "onnx_fp32", "pruned_50"] * 5, "batch_size": 1,
         "seconds": np.linspace(0.01, 0.02, 15)}
    )  # fmt: skip
    axis = benchmark_plots.latency_distributions(samples, "title").axes[0]
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert set(names) == {"PyTorch", "ONNX Runtime", "PyTorch, pruned"}
    assert len({box.get_hatch() for box in axis.patches}) == 3


# --- The ladder of forms --------------------------------------------------------------------------


@pytest.fixture
def summary():
    """A reference, its control, a form that is faster and passes, one that does not run."""
    table = pd.DataFrame(
        {
            "variant": ["eager_fp32", "eager_fp32_again", "structured_40_int8", "sparse_2_4"],
            "passes_gate": [True, False, True, False],
            "valid_accuracy_loss_points": [0.0, np.nan, 0.1, np.nan],
            "p50_ms": [10.0, 12.0, 8.5, np.nan],
            "p50_ms_low": [10.0, 11.8, 8.0, np.nan],
            "p50_ms_high": [10.0, 12.2, 9.0, np.nan],
            "images_per_s": [100.0, 98.0, 500.0, np.nan],
            "images_per_s_low": [100.0, 97.0, 480.0, np.nan],
            "images_per_s_high": [100.0, 99.0, 520.0, np.nan],
            "batches": [None, None, "THROUGHPUT", None],
            "mebibytes_on_disk": [20.0, 20.0, 3.0, np.nan],
            "peak_mib": [700.0, 701.0, 150.0, np.nan],
        }
    )
    for end, apart in (("_low", -0.2), ("_high", 0.3)):
        table[f"valid_accuracy_loss_points{end}"] = table.valid_accuracy_loss_points + apart
    return table


def test_the_ladder_calls_nothing_faster_that_its_control_could_be_too(summary):
    view = benchmark_plots.ladder_view(summary).set_index("form")
    assert list(view.index) == list(summary.variant[:3])
    form = view.loc["structured_40_int8"]
    assert form["points lost"] == "+0.10 [-0.10, +0.40]" and form.passes == "yes"
    said = form["one chip, ms"]
    assert said == "8.5 (\u2248 1.18x [1.11, 1.25])", "the control was 1.2 times as slow"
    assert form["images/s"] == "500 (5.00x [4.80, 5.20])" and form.batches == "THROUGHPUT"
    assert view.passes["eager_fp32_again"] == "only timed"


def test_latency_against_throughput_names_the_reference_and_what_nothing_beats(summary):
    slower = summary.iloc[[2]].assign(variant="slower", p50_ms=9.0, images_per_s=400.0)
    failing = slower.assign(variant="failing", p50_ms=1.0, passes_gate=False)
    table = pd.concat([summary, slower, failing], ignore_index=True)
    axis = benchmark_plots.latency_against_throughput(table, "title").axes[0]
    assert [text.get_text() for text in axis.texts] == ["eager_fp32", "structured_40_int8"]
    hollow = [line.get_markerfacecolor() == "none" for line in axis.lines if len(line.get_xdata())]
    assert hollow == [False, True, False, False, True]


def test_accuracy_against_cost_says_how_sure_both_are(summary):
    far = summary.iloc[[2]].assign(variant="far", valid_accuracy_loss_points=9.0, passes_gate=False)
    wide = summary.iloc[[2]].assign(variant="wide", valid_accuracy_loss_points_high=9.9, p50_ms=5)
    table = pd.concat([summary, far, wide.assign(passes_gate=False)], ignore_index=True)
    latency, memory = benchmark_plots.pareto(table, 0.5, "title").axes
    bottom, top = latency.get_ylim()
    assert bottom == 8 and top < 0, "what is best is up, and no bar makes the rest one line"
    assert sorted(text.get_text() for text in latency.texts) == ["eager_fp32", "wide"]
    assert not any_overlap(latency) and not any_overlap(memory)
    assert "below this panel: far 9.0" in [text.get_text() for text in memory.texts]
    across, up = (bars.get_segments() for bars in latency.containers[1].lines[2])
    np.testing.assert_allclose(across[0][:, 0], [8, 9])
    np.testing.assert_allclose(up[0][:, 1], [-0.1, 0.4])


def test_every_line_of_the_roofline_is_named():
    names = [
        f"{start}_{n}" for start in ("openvino_int8", "structured_40", "bf16") for n in range(6)
    ]
    rows = [
        {"variant": name, "batch_size": size, "intensity": 50 * size, "flops_per_s": (40 + n) * 1e9}
        for n, name in enumerate(names)
        for size in (1, 32)
    ]
    limits = {"fp32": 2e11, "bf16": 4e11, "int8": 6e11, "bytes_per_s": 2e10}
    axis = benchmark_plots.roofline(pd.DataFrame(rows), limits, "title").axes[0]
    assert sorted(text.get_text() for text in axis.texts) == sorted(names)
    assert not any_overlap(axis)
    assert "1000" in [label.get_text() for label in axis.get_xticklabels()]
