"""Words follow numbers, and the interval that draws places decides."""

import numpy as np
import pandas as pd
import pytest

from helpers.reporting import answers


def gain(value, low, high, better=2, worse=0):
    numbers = {"value": value, "low": low, "high": high, "better": better, "worse": worse}
    return pd.Series({"first": "head_only", "second": "lora", "seeds": 2, **numbers})


@pytest.mark.parametrize(
    ("row", "word"),
    [
        (gain(0.02, 0.01, 0.03), "Yes"),
        (gain(0.02, 0.01, 0.03, better=1), "Not clearly"),  # half of the seeds are not most
        (gain(0.02, -0.001, 0.03), "Not clearly"),
        (gain(-0.02, -0.03, -0.01, worse=2), "No, it is worse"),
        (gain(0.0002, 0.0001, 0.0003), "No, the difference is too small to matter"),
        (gain(0.0002, 0.0001, 0.0103, better=0), "Not clearly"),
    ],
)
def test_an_answer_in_a_word_weighs_certainty_and_size(row, word):
    assert answers.in_a_word(row) == word


def test_a_head_must_beat_the_strongest_baseline():
    rows = [("accuracy", 0.9, 0.85, 0.95), ("auroc", 0.95, 0.93, 0.97)]
    means = pd.DataFrame(rows, columns=["metric", "value", "low", "high"])
    means = means.assign(method="head_only", seeds=3, unit="places")

    def said(low, high):
        ahead = {"value": 0.05, "low": low, "high": high}
        return answers.head_answer(means, "acquisition statistics", 0.9, ahead)

    clear = said(0.01, 0.09)
    assert clear.startswith("Yes: accuracy 0.900 [0.850, 0.950], AUROC 0.950 [0.930, 0.970]")
    assert "95 % over places and 3 seeds" in clear
    assert "acquisition statistics, reaches an AUROC of 0.900" in clear
    assert clear.endswith("ahead by +0.050 [+0.010, +0.090].")
    assert said(-0.01, 0.09).startswith("Not clearly")
    assert said(-0.09, -0.01).startswith("No, it is worse")


def test_a_gain_is_that_of_the_pair_and_says_how_many_seeds_are_clear():
    row = gain(0.0019, -0.0003, 0.004, better=1)
    row["unit"], row["only_first"], row["only_second"] = "places", 29, 52
    gains = row.to_frame().T
    said = answers.gain_answer(gains, "head_only", "lora")
    assert said.startswith("Not clearly: AUROC +0.0019 [-0.0003, +0.0040]")
    assert "above zero with 1 of 2 seeds alone" in said and "lora alone is right on 52" in said
    assert "does not compare dora" in answers.gain_answer(gains, "lora", "dora")


def test_a_bad_place_is_not_hidden_by_good_ones():
    groups = np.repeat(["a", "b", "c"], [60, 30, 10])
    target = np.tile([0, 1], 50)
    wrong = (groups == "b") & (np.arange(100) % 3 == 0)
    predicted = np.where(wrong, 1 - target, target)
    predictions = pd.DataFrame({"group": groups, "target": target, "predicted": predicted})
    predictions = predictions.assign(p_x=1.0 - predicted, p_y=1.0 * predicted)
    said = answers.place_answer(predictions)
    assert "two largest hold 90% of the chips" in said
    assert "worst 0.667 (b, 30 chips)" in said
    assert "name no groups" in answers.place_answer(predictions.assign(group=""))


def shortcuts(alone_low):
    rows = [
        ("as it is", "as trained", 0.95),
        ("grey", "as trained", 0.76),
        ("as it is", "refitted", 0.99),
        ("grey", "refitted", 0.96),
        ("acquisition statistics alone", "refitted", alone_low + 0.01),
    ]
    table = pd.DataFrame(rows, columns=["chips", "head", "auroc"])
    return table.assign(auroc_low=table.auroc - 0.01, auroc_high=table.auroc + 0.01)


def test_the_shortcut_answer_quotes_the_trained_head_too():
    said = answers.shortcut_answer(shortcuts(0.92))
    assert "gives much of the answer away" in said
    assert "keeps 0.960 [0.950, 0.970], more than the acquisition alone" in said
    assert "as trained falls to 0.760 [0.750, 0.770] (grey)" in said
    said = answers.shortcut_answer(shortcuts(0.6))
    assert "gives little of the answer away" in said
