"""MLPerf LoadGen against a queue with dynamic batches.

LoadGen (mlcommons-loadgen) decides when queries arrive and takes the times; latency counts from the
scheduled arrival, so a system that falls behind cannot hide it. The results are not MLPerf
submissions: durations are short unless asked for otherwise, and nobody has reviewed them.
"""

import json
import math
import queue
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlperf_loadgen as loadgen
import numpy as np
import pandas as pd

from helpers import InputError
from helpers.benchmarking.percentiles import PERCENTILES, latency_percentiles, samples_needed
from helpers.console import progress_bar
from helpers.deployment.runtimes import Predict

SCENARIOS = ("SingleStream", "MultiStream", "Server", "Offline")
STREAMS = 8  # samples of a MultiStream query
_MLPERF_SECONDS = 600
_MLPERF_OFFLINE_SAMPLES = 24_576
_SAMPLE = re.compile(
    r'"name":"Sample".*?"ts":([-\d.]+).*?"sample_seq":(\d+),"query_seq":(\d+).*?"complete_ns":(\d+)'
)


@dataclass(frozen=True)
class LoadSettings:
    """How to load a system, and how it queues.

    Args:
        seconds: least duration of one LoadGen run.
        latency_bound_ms: what the p99 of the Server scenario must stay under.
        max_batch: most queries in one prediction.
        max_wait_ms: how long a query may wait for others to share its batch; 0 takes what has
            gathered while the batch before was running.
        queue_limit: waiting queries above which the Server scenario's next is refused.
        bisections: steps that refine the Server rate after doubling.
        mlperf: durations and counts of MLPerf Inference: 600 s, LoadGen's early stopping decides
            whether the queries suffice.
    """

    seconds: float
    latency_bound_ms: float = 100.0
    max_batch: int = 8
    max_wait_ms: float = 0.0
    queue_limit: int = 256
    bisections: int = 2
    mlperf: bool = False


class System:
    """A queue in front of one or more copies of a model, each served by a thread of its own."""

    def __init__(self, predicts: Sequence[Predict], chips: np.ndarray, settings: LoadSettings):
        """Serve chips (N, bands, S, S) by their index; predictions of every batch size run once.

        Args:
            predicts: one function per copy; each releases the interpreter while it computes.
            chips: what queries ask for.
            settings: of the queue.
        """
        self.predicts, self.chips, self.settings = predicts, chips, settings
        for predict in predicts:
            for size in range(1, settings.max_batch + 1):
                predict(np.resize(chips, (size, *chips.shape[1:])))

    @contextmanager
    def serving(self, limit: int) -> Iterator["_Service"]:
        """Run the threads; at most limit queries wait (0: any number)."""
        service = _Service(self, limit)
        threads = [threading.Thread(target=service.work, args=(p,)) for p in self.predicts]
        for thread in threads:
            thread.start()
        try:
            yield service
        finally:
            for _ in threads:
                service.waiting.put(None)
            for thread in threads:
                thread.join()


class _Service:
    """The state of a system during one LoadGen run."""

    def __init__(self, system: System, limit: int):
        self.system = system
        self.waiting: queue.Queue = queue.Queue(limit)
        self.issued = 0
        self.refused: set[int] = set()
        self.batches: list[int] = []
        self.errors: list[str] = []

    def issue(self, samples: list) -> None:
        """Take queries from LoadGen; what finds the queue full is answered at once, unserved."""
        for sample in samples:
            try:
                self.waiting.put_nowait((sample.id, sample.index))
            except queue.Full:
                self.refused.add(self.issued)
                _answer([sample.id])
            self.issued += 1

    def work(self, predict: Predict) -> None:
        """Serve batches until a None arrives."""
        while (first := self.waiting.get()) is not None:
            ids, indices = zip(*self._gather(first), strict=True)
            try:
                predict(self.system.chips[list(indices)])
            except Exception as error:  # a server must survive, and LoadGen waits for its answers
                self.errors.append(f"{type(error).__name__}: {error}")
            self.batches.append(len(ids))
            _answer(ids)

    def _gather(self, first: tuple) -> list[tuple]:
        batch = [first]
        deadline = time.perf_counter() + self.system.settings.max_wait_ms / 1e3
        while len(batch) < self.system.settings.max_batch:
            left = deadline - time.perf_counter()
            try:
                query = self.waiting.get(block=left > 0, timeout=max(left, 0) or None)
            except queue.Empty:
                break
            if query is None:
                self.waiting.put(None)
                break
            batch.append(query)
        return batch


def _answer(ids: Sequence[int]) -> None:
    loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(i, 0, 0) for i in ids])


def run_scenario(
    system: System,
    scenario: str,
    expected_qps: float,
    *,
    percentile: float = 99,
    log_folder: str | Path | None = None,
) -> dict:
    """Run LoadGen once and return one row of results.

    Args:
        system: to load.
        scenario: of SCENARIOS.
        expected_qps: the Server's rate of Poisson arrivals; for Offline the rate that decides how
            many samples there are.
        percentile: the highest that the queries must carry (`samples_needed`).
        log_folder: keeps LoadGen's logs there; a temporary folder by default.

    Returns:
        `scenario, target_qps, queries, samples, answered_per_second, p50_ms … p99_ms` (per query,
        from the scheduled arrival, see `latency_percentiles`; none for Offline),
        `refused, errors, mean_batch, early_stopping_ms` (LoadGen's own conservative estimate of
        the p90 of SingleStream and the p99 of MultiStream), `loadgen_valid, within_bound`
        (Server whose queries carry the p99: under the bound and nothing refused).

    Raises:
        InputError: rate or duration not positive.
    """
    settings = system.settings
    if not expected_qps > 0:
        raise InputError(f"qps: {expected_qps:g} is not positive")
    if not settings.seconds > 0:
        raise InputError(f"load_seconds: {settings.seconds:g} is not positive")
    limit = settings.queue_limit if scenario == "Server" else 0
    with (
        progress_bar(desc=f"LoadGen {scenario}"),
        tempfile.TemporaryDirectory() as temporary,
        system.serving(limit) as service,
    ):
        folder = Path(log_folder or temporary)
        _start(service, _test_settings(scenario, expected_qps, settings, percentile), folder)
        detail, samples = read_detail(folder), read_samples(folder)
    answered = samples[~samples["sample"].isin(service.refused)]
    latencies = answered.groupby("query").seconds.max().to_numpy()
    no_queries = {f"p{q}_ms": math.nan for q in PERCENTILES}
    row = {
        "scenario": scenario,
        "target_qps": expected_qps if scenario == "Server" else math.nan,
        "queries": len(latencies),
        "samples": len(answered),
        "answered_per_second": len(answered) / (samples.done.max() - samples.scheduled.min()),
        **(no_queries if scenario == "Offline" else latency_percentiles(latencies)),
        "refused": len(service.refused),
        "errors": len(service.errors),
        "mean_batch": float(np.mean(service.batches)) if service.batches else math.nan,
        "early_stopping_ms": _early_stopping_ms(scenario, detail),
        "loadgen_valid": detail["result_validity"] == "VALID",
    }
    failed = row["p99_ms"] > settings.latency_bound_ms or service.refused or service.errors
    judged = scenario == "Server" and percentile >= 99
    return row | {"within_bound": not failed if judged else None}


def _start(service: _Service, test: "loadgen.TestSettings", folder: Path) -> None:
    """Run one test to its end; its logs go to folder."""
    n = len(service.system.chips)
    logs = loadgen.LogSettings()
    logs.log_output.outdir, logs.log_output.copy_summary_to_stdout = str(folder), False
    logs.enable_trace = True
    sut = loadgen.ConstructSUT(service.issue, lambda: None)
    library = loadgen.ConstructQSL(n, n, lambda indices: None, lambda indices: None)
    try:
        # The name of a file that is not there: no audit.config of the working folder is read.
        audit = str(folder / "no_audit.config")
        loadgen.StartTestWithLogSettings(sut, library, test, logs, audit)
    finally:
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(sut)


def _test_settings(
    scenario: str, expected_qps: float, settings: LoadSettings, percentile: float
) -> "loadgen.TestSettings":
    seconds = _MLPERF_SECONDS if settings.mlperf else settings.seconds
    test = loadgen.TestSettings()
    test.scenario = getattr(loadgen.TestScenario, scenario)
    test.mode = loadgen.TestMode.PerformanceOnly
    test.min_duration_ms = int(1000 * seconds)
    # An Offline run is one query, of as many samples as the expected rate says.
    test.min_query_count = 1 if scenario == "Offline" else samples_needed(percentile)
    test.multi_stream_samples_per_query = STREAMS
    test.server_target_qps = test.offline_expected_qps = expected_qps
    test.server_target_latency_ns = int(1e6 * settings.latency_bound_ms)
    if settings.mlperf and scenario == "Offline":
        test.min_query_count = _MLPERF_OFFLINE_SAMPLES
    return test


def _early_stopping_ms(scenario: str, detail: dict) -> float:
    key = {"SingleStream": "early_stopping_latency_ss", "MultiStream": "early_stopping_latency_ms"}
    nanoseconds = detail.get(key.get(scenario), 0)
    return nanoseconds / 1e6 if nanoseconds else math.nan  # 0: too few queries for an estimate


def read_detail(folder: Path) -> dict:
    """Key -> last value in LoadGen's detail log."""
    lines = (folder / "mlperf_log_detail.txt").read_text().splitlines()
    entries = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines if "MLLOG" in line]
    return {entry["key"]: entry["value"] for entry in entries}


def read_samples(folder: Path) -> pd.DataFrame:
    """Every sample in LoadGen's trace: `sample, query` (numbers), `scheduled, done, seconds`."""
    with open(folder / "mlperf_log_trace.json") as file:
        found = [match.groups() for line in file if (match := _SAMPLE.search(line))]
    table = pd.DataFrame(found, columns=["scheduled", "sample", "query", "seconds"])
    table = table.astype({"scheduled": float, "sample": int, "query": int, "seconds": float})
    table["scheduled"] /= 1e6
    table["seconds"] /= 1e9
    return table.assign(done=table.scheduled + table.seconds)


def find_server_rate(system: System, start_qps: float) -> pd.DataFrame:
    """Highest rate of Poisson arrivals that stays within the bound: doubling, then bisection.

    Returns:
        One row per rate tried, in order; the answer is the fastest row with `within_bound`, and
        there is none if even start_qps / 4 is too fast.
    """
    rows: list[dict] = []

    def holds(rate: float) -> bool:
        rows.append(run_scenario(system, "Server", rate))
        return rows[-1]["within_bound"]

    low = high = start_qps
    if holds(start_qps):
        while holds(high := 2 * low):
            low = high
    else:
        while not holds(low := high / 2):
            high = low
            if low <= start_qps / 4:
                return pd.DataFrame(rows)
    for _ in range(system.settings.bisections):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return pd.DataFrame(rows)


def fastest_within(search: pd.DataFrame) -> list[dict]:
    """The fastest row of a search that stayed within the bound, or none."""
    within = search[search.within_bound]
    return within.loc[[within.target_qps.idxmax()]].to_dict("records") if len(within) else []


def all_scenarios(
    system: System,
    start_qps: float | None = None,
    energy: tuple[str, Callable[[], float]] | None = None,
    *,
    brief: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The four scenarios, one row each, and all rates that the Server search tried.

    Args:
        system: to load.
        start_qps: where the search starts; half the Offline rate by default.
        energy: of `limits.energy_meter`, read around the Offline run.
        brief: only the two that take a moment, SingleStream and Offline.
    """
    _, joules = energy or ("", lambda: math.nan)
    chips = np.resize(system.chips, (system.settings.max_batch, *system.chips.shape[1:]))
    start = time.perf_counter()
    system.predicts[0](chips)
    estimate = len(system.predicts) * len(chips) / (time.perf_counter() - start)
    joules()
    offline = run_scenario(system, "Offline", estimate)
    offline["joules_per_1000_images"] = 1000 * joules() / offline["samples"]
    # The percentile of SingleStream in MLPerf's rules.
    single = run_scenario(system, "SingleStream", estimate, percentile=90)
    if brief:
        return pd.DataFrame([single, offline]), pd.DataFrame()
    search = find_server_rate(system, start_qps or offline["answered_per_second"] / 2)
    server = fastest_within(search)
    # Eight chips a query: 299 of them would take too long for a default.
    multi = run_scenario(system, "MultiStream", estimate, percentile=90)
    return pd.DataFrame([single, multi, *server, offline]), search
