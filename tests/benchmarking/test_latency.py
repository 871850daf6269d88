"""Percentiles that samples carry, timed rounds, and what is faster beyond noise."""

import types

import numpy as np
import pandas as pd
import pytest

from helpers.benchmarking import latency, percentiles


@pytest.mark.parametrize(("percentile", "n"), [(50, 5), (90, 29), (95, 59), (99, 299)])
def test_samples_needed_is_the_first_count_that_bounds_the_percentile(percentile, n):
    assert percentiles.samples_needed(percentile) == n
    assert 1 - (percentile / 100) ** n >= 0.95 > 1 - (percentile / 100) ** (n - 1)


def test_percentiles_without_the_samples_are_left_out():
    seconds = np.arange(100, 0, -1) / 1000
    found = percentiles.latency_percentiles(seconds)
    # P(binomial(100, 0.9) <= 95) is the first above 0.95, P(binomial(100, 0.95) <= 98) too.
    assert (found["p50_ms"], found["p90_ms"], found["p95_ms"]) == (51, 96, 99)
    assert np.isnan(found["p99_ms"])


@pytest.mark.parametrize(("percentile", "n"), [(90, 29), (90, 200), (95, 80), (99, 299), (99, 900)])
def test_a_percentile_shown_is_no_smaller_than_the_true_one_in_95_of_100_runs(percentile, n):
    seconds = np.random.default_rng(0).exponential(size=(2000, n))
    shown = [percentiles.latency_percentiles(run, [percentile]).popitem()[1] for run in seconds]
    true = -1e3 * np.log(1 - percentile / 100)
    assert np.mean(np.array(shown) >= true) > 0.94


def test_no_more_than_the_noise_of_the_control_is_faster():
    rows = [("eager_fp32", 1, 0.10), ("eager_fp32_again", 1, 0.08), ("onnx_fp32", 1, 0.085),
            ("openvino_int8", 1, 0.05), ("eager_fp32", 8, 0.10), ("eager_fp32_again", 8, 0.10),
            ("onnx_fp32", 8, 0.095), ("openvino_int8", 8, 0.12)]  # fmt: skip
    samples = pd.DataFrame(rows * 6, columns=["variant", "batch_size", "seconds"])
    samples["round"] = np.repeat(range(6), len(rows))
    table = latency.latency_table(samples, (50,)).set_index(["variant", "batch_size"])
    assert table.beyond_noise.to_dict() == {
        (name, size): name == "openvino_int8" for name, size, _ in rows
    }


def test_a_speedup_whose_interval_reaches_into_the_noise_is_not_beyond_it():
    samples = pd.DataFrame(
        {
            "variant": ["eager_fp32", "sure", "unsure"] * 6,
            "batch_size": 1,
            "round": np.repeat(range(6), 3),
            "seconds": np.array([[0.13, 0.10, second] for second in [0.07, 0.13] * 3]).ravel(),
        }
    )
    table = latency.latency_table(samples, (50,)).set_index("variant")
    assert table.speedup.to_list() == pytest.approx([1, 1.3, 1.3])
    assert table.beyond_noise.to_dict() == {"eager_fp32": False, "sure": True, "unsure": False}
    assert table.speedup_low["unsure"] < 1.1 < table.speedup_low["sure"]


def timed(seconds, samples=25):
    """What `measure_latency` gives of functions that return the seconds they take."""
    config = types.SimpleNamespace(batch_sizes=(1,), latency_samples=(samples,))
    bench = types.SimpleNamespace(config=config, chips=np.zeros((1, 3, 2, 2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "_seconds", lambda predict, chips: predict(chips))
        return latency.measure_latency(bench, seconds)


def test_rounds_go_on_until_every_ratio_is_certain_or_their_limit():
    """A moment that is slow for all is in no ratio."""
    calls, rng = iter(range(10_000)), np.random.default_rng(0)

    def slow_every_other_round(seconds):
        return lambda chips: seconds * (1 + next(calls) // 12 % 2)  # 2 variants, 6 predictions each

    steady = {"eager_fp32": slow_every_other_round(0.1), "form": slow_every_other_round(0.05)}
    assert timed(steady)["round"].max() == 5
    assert timed(steady, samples=31)["round"].max() == 7
    found = timed({"eager_fp32": lambda chips: 0.1, "form": lambda chips: rng.lognormal(sigma=0.5)})
    assert found["round"].max() == 20 and len(found) == 2 * 20 * 5
    row = latency.latency_table(found, (50,)).iloc[1]
    assert row.speedup_high - row.speedup_low > 0.05 * row.speedup


def test_an_interval_of_a_speedup_holds_the_true_one():
    """In about 95 of 100 cases, though rounds stop when it is narrow."""
    rng, within = np.random.default_rng(0), []
    names = ["eager_fp32", *map(str, range(20))]
    for _ in range(30):
        found = timed({name: lambda chips: 0.1 * rng.lognormal(sigma=0.03) for name in names})
        assert 5 < found["round"].max() < 20
        table = latency.latency_table(found, (50,))[1:]
        within += list((table.speedup_low < 1) & (table.speedup_high > 1))
    assert np.mean(within) > 0.92
