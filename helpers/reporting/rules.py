"""How answers are decided, by threshold, prevalence and error rate: a figure and a sentence."""

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from helpers.reporting.plots import PAGE, PALETTE, bars, titled


def answer_curves(
    thresholds: pd.DataFrame, coverage: pd.DataFrame, prevalence: float, title: str
) -> Figure:
    """Precision and recall against the threshold; coverage and unsure against the error rate.

    From `operating.threshold_table` for that prevalence, without whose rows the first panel is left
    out, and `coverage_table`.
    """
    panels = 1 + (len(thresholds) > 0)
    figure, axes = plt.subplots(1, panels, figsize=(PAGE * panels / 2, 3.8), squeeze=False)
    *first, last = axes[0]
    lines = (
        ("recall", "recall"),
        ("precision", "precision, test split"),
        ("precision_at_prevalence", f"precision, {prevalence:.2%} positive"),
    )
    for axis in first:
        for (column, label), colour in zip(lines, PALETTE, strict=False):
            axis.plot(thresholds.threshold, thresholds[column], color=colour, label=label)
        axis.set(xlabel="threshold of the positive class", ylabel="test chips")
    last.errorbar(coverage.error_rate, coverage.coverage, bars(coverage, "coverage"), fmt="o-",
                  capsize=3, color=PALETTE[0], label="class in the set, 95 % interval")  # fmt: skip
    last.plot(coverage.error_rate, 1 - coverage.error_rate, ":", color="0.4", label="asked for")
    for column, colour in (("unsure", PALETTE[1]), ("wrong", PALETTE[2])):
        label = {"unsure": "unsure", "wrong": "wrong, of the answers"}[column]
        last.plot(coverage.error_rate, coverage[column], "s--", color=colour, label=label)
    last.set(xlabel="error rate asked for", ylabel="share of test chips")
    for axis in axes[0]:
        axis.set(ylim=(-0.02, 1.02))
        axis.legend(fontsize=8)
    return titled(figure, title)


def prevalence_answer(thresholds: pd.DataFrame, prevalence: float) -> str:
    """What the positive answers are worth at threshold 0.5, here and where fewer are positive."""
    if thresholds.empty:
        return "Precision at another prevalence is shown for two classes."
    row = thresholds.loc[(thresholds.threshold - 0.5).abs().idxmin()]
    return (
        f"At the threshold {row.threshold:.2f} the test split has recall {row.recall:.3f} and "
        f"calls {row.false_positive_rate:.1%} of the negative chips positive. Its precision of "
        f"{row.precision:.3f} holds for its own share of positives; where {prevalence:.2%} of the "
        f"chips are positive, that of the same answers is {row.precision_at_prevalence:.3f}."
    )
