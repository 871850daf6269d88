"""LoadGen and the queue in front of a model."""

import time

import numpy as np
import pytest

from helpers import InputError
from helpers.benchmarking import load_generator
from helpers.benchmarking.load_generator import LoadSettings, System

CHIPS = np.zeros((16, 3, 4, 4), np.uint8)


def sleeper(seconds_per_batch, seen=None):
    def predict(chips):
        time.sleep(seconds_per_batch)
        if seen is not None:
            seen.append(len(chips))
        return np.zeros((len(chips), 2), np.float32)

    return predict


@pytest.mark.parametrize("scenario", load_generator.SCENARIOS)
def test_results_agree_with_loadgens_own_log(scenario, tmp_path):
    system = System([sleeper(0.002)], CHIPS, LoadSettings(seconds=1.0))
    row = load_generator.run_scenario(system, scenario, 150, log_folder=tmp_path)
    detail = load_generator.read_detail(tmp_path)
    assert row["queries"] == detail["result_query_count"]
    assert row["errors"] == row["refused"] == 0
    if scenario == "Offline":
        rate = detail["result_samples_per_second"]
        assert row["samples"] >= 150
    else:
        kind = "per_query_" if scenario == "MultiStream" else ""
        logged = {q: detail[f"result_{q:.2f}_percentile_{kind}latency_ns"] / 1e6
                  for q in (50, 90, 95, 99)}  # fmt: skip
        assert row["p50_ms"] == pytest.approx(logged[50], rel=1e-6)
        # Those of the tail are bounds, LoadGen's are not.
        assert all(row[f"p{q}_ms"] >= logged[q] * (1 - 1e-6) for q in (90, 95, 99))
        streams = load_generator.STREAMS if scenario == "MultiStream" else 1
        assert row["samples"] == streams * row["queries"]
        rate = detail.get("result_completed_samples_per_sec", row["answered_per_second"])
    # LoadGen counts one query less over the same time.
    assert row["answered_per_second"] == pytest.approx(rate, rel=2 / row["samples"])


def test_latency_counts_from_the_scheduled_arrival():
    """A server ten times too slow answers the last query late by the whole backlog."""
    system = System(
        [sleeper(0.01)], CHIPS, LoadSettings(seconds=0.5, max_batch=1, queue_limit=9999)
    )
    row = load_generator.run_scenario(system, "Server", 1000)
    backlog = row["queries"] * 0.01 - row["queries"] / 1000
    assert row["p99_ms"] > 0.9 * 1e3 * backlog
    assert not row["within_bound"]


def test_a_full_queue_refuses_and_refusals_are_counted():
    system = System([sleeper(0.05)], CHIPS, LoadSettings(seconds=0.5, max_batch=4, queue_limit=4))
    row = load_generator.run_scenario(system, "Server", 600)
    assert row["refused"] > 0 and not row["within_bound"]
    assert row["samples"] + row["refused"] >= 299
    assert row["p50_ms"] > 40  # of what was served; refusals take no time


def test_batches_gather_up_to_the_maximum_and_no_longer_than_the_wait():
    seen = []
    settings = LoadSettings(seconds=0.3, max_batch=4, max_wait_ms=50)
    system = System([sleeper(0.001, seen)], CHIPS, settings)
    seen.clear()
    row = load_generator.run_scenario(system, "Server", 1000)
    assert max(seen) == 4 and row["mean_batch"] > 3
    alone = load_generator.run_scenario(system, "SingleStream", 100, percentile=50)
    assert alone["p50_ms"] > 50  # nobody came


def test_a_failing_model_is_counted_and_loadgen_ends():
    def predict(chips):
        if len(chips) == 1:
            raise RuntimeError("no")
        return np.zeros((len(chips), 2), np.float32)

    system = System([sleeper(0)], CHIPS, LoadSettings(seconds=0.1, max_batch=1))
    system.predicts = [predict]
    row = load_generator.run_scenario(system, "Server", 500)
    assert row["errors"] == row["queries"] and not row["within_bound"]


@pytest.mark.parametrize("start", [10, 90, 400])
def test_the_search_doubles_and_bisects_to_the_highest_rate(start, monkeypatch):
    def run(system, scenario, rate, **options):
        return {"target_qps": rate, "within_bound": rate <= 130}

    monkeypatch.setattr(load_generator, "run_scenario", run)
    system = System([], CHIPS, LoadSettings(seconds=1, bisections=6))
    table = load_generator.find_server_rate(system, start)
    best = table.target_qps[table.within_bound].max()
    assert 0.97 * 130 < best <= 130


def test_the_search_gives_up_where_nothing_holds(monkeypatch):
    monkeypatch.setattr(
        load_generator,
        "run_scenario",
        lambda system, scenario, rate: {"target_qps": rate, "within_bound": False},
    )
    table = load_generator.find_server_rate(System([], CHIPS, LoadSettings(seconds=1)), 16)
    assert not table.within_bound.any() and table.target_qps.min() == 16 / 4


@pytest.mark.parametrize(
    ("rate", "seconds", "message"),
    [(0, 1, "qps: 0 is not positive"), (-5, 1, "qps: -5"), (10, 0, "load_seconds: 0 is not")],
)
def test_rate_and_duration_must_be_positive(rate, seconds, message):
    system = System([], CHIPS, LoadSettings(seconds=seconds))
    with pytest.raises(InputError, match=message):
        load_generator.run_scenario(system, "Server", rate)


def test_a_control_takes_the_two_short_scenarios():
    system = System([sleeper(0.001)], CHIPS, LoadSettings(seconds=0.1))
    table, search = load_generator.all_scenarios(system, brief=True)
    assert table.scenario.tolist() == ["SingleStream", "Offline"] and search.empty
