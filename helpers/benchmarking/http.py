"""The service over HTTP under LoadGen: what a request costs against the same model in process.

The service is `python -m helpers.serve` in a process of its own. LoadGen and the connections are
in this one and share the machine's cores with it, so that the client's part is in every number; it
is measured. A sample of LoadGen is a request, of one chip or of several.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from select import select

import httpx
import numpy as np
import pandas as pd
import psutil

from helpers.benchmarking.bench import Bench
from helpers.benchmarking.load import offline_rate
from helpers.benchmarking.load_generator import (
    STREAMS,
    LoadSettings,
    System,
    fastest_within,
    find_server_rate,
    run_scenario,
)
from helpers.console import progress_bar
from helpers.deployment.runtimes import Variant, process_memory, worker_environment

CONNECTIONS = 32  # requests in flight at once; more wait in the client, which LoadGen counts
SIZES = (1, STREAMS)  # chips of a request
IN_PROCESS = "in process"
_READY = "a replica is ready, process "
_START_S = 300  # to load the model, on a busy machine


@dataclass(frozen=True)
class HttpRequest:
    """The body of a request to `/predict`."""

    body: bytes
    content_type: str


def http_requests(paths: Sequence[Path], chips: int) -> np.ndarray:
    """Requests (N,) object, each of so many chip files as they lie on disk, every file once.

    One file is the body itself, several are a multipart form.
    """
    contents = [path.read_bytes() for path in paths]
    if chips == 1:
        made = [HttpRequest(content, "application/octet-stream") for content in contents]
    else:
        groups = np.resize(np.arange(len(contents)), (-(-len(contents) // chips), chips))
        made = [_form([contents[i] for i in group]) for group in groups]
    requests = np.empty(len(made), object)
    requests[:] = made
    return requests


def _form(contents: list[bytes]) -> HttpRequest:
    files = [("images", (str(i), content)) for i, content in enumerate(contents)]
    request = httpx.Request("POST", "http://service/predict", files=files)
    return HttpRequest(request.read(), request.headers["Content-Type"])


class Connection:
    """A kept connection to a service; called with requests as a model is with chips.

    Python's own client: httpx takes five times as much of the cores that the service needs (0.5 ms
    a request against 0.1).
    """

    def __init__(self, address: str):
        """Take `host:port`; the first request connects."""
        self._http = HTTPConnection(address)

    def __call__(self, requests: np.ndarray) -> None:
        """Send one after the other; ConnectionError unless every answer is 200."""
        for request in requests:
            if self._http.sock and select([self._http.sock], [], [], 0)[0]:
                self._http.close()  # the service has closed it: the next request connects again
            try:
                headers = {"Content-Type": request.content_type}
                self._http.request("POST", "/predict", request.body, headers)
                response = self._http.getresponse()
                text = response.read()
            except (OSError, HTTPException) as error:
                self._http.close()
                raise ConnectionError(f"no answer ({error})") from error
            if response.status != 200:
                raise ConnectionError(f"{response.status}: {text.decode(errors='replace')}")


def http_system(address: str, requests: np.ndarray, settings: LoadSettings) -> System:
    """A service as LoadGen's system; its batches are made by the service, from what waits there."""
    connections = [Connection(address) for _ in range(CONNECTIONS)]
    return System(connections, requests, replace(settings, max_batch=1))


class Service:
    """A running `python -m helpers.serve`."""

    def __init__(self, process: subprocess.Popen, address: str):
        """Take the process and its `host:port`."""
        self.process, self.address = process, address

    def replica(self) -> int:
        """The process of the next replica that becomes ready."""
        return int(self.process.stdout.readline().removeprefix(_READY))

    def processes(self) -> list[psutil.Process]:
        """All its processes."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def memory_bytes(self) -> int:
        """`runtimes.process_memory` of all."""
        return sum(map(process_memory, self.processes()))

    def cpu_seconds(self) -> float:
        """What all of them have computed so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes())


@contextmanager
def service(bench: Bench, variant: Variant, *options: str) -> Iterator[Service]:
    """Serve a variant over HTTP, with the benchmark's threads and batches, until it is left.

    Args:
        bench: what is benchmarked.
        variant: whose files are served.
        options: more flags of `helpers.serve`.

    Raises:
        RuntimeError: it does not start.
    """
    command = [
        sys.executable, "-m", "helpers.serve", "--model_path", str(variant.save()), "--port", "0",
        "--batch_size", str(bench.config.max_batch), "--device", bench.device, *options,
    ]  # fmt: skip
    environment = worker_environment()
    environment.pop("SERVE_TOKEN", None)
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        with progress_bar(desc=f"starting the service of {variant.name}"):
            found = re.search(r"http://(\S+);", process.stdout.readline())
            if not found:
                raise RuntimeError(f"the service of {variant.name} did not start")
            if "ray" in options:
                process.stdout.readline()  # its replicas are ready
            httpx.get(f"http://{found[1]}/health", timeout=_START_S).raise_for_status()
        yield Service(process, found[1])
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def measure_http(
    bench: Bench,
    variant: Variant,
    scenarios: pd.DataFrame,
    searched: Sequence[int] = (1,),
    replicas: int = 1,
    engine: str = "local",
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The service of a variant beside the variant in process, under the same load generator.

    Args:
        bench: what is benchmarked.
        variant: measured in process before, in the same run.
        scenarios: of `load.measure_scenarios`.
        searched: sizes of request whose highest rate within the bound is searched for (Server).
        replicas: of the service, which share the benchmark's threads.
        engine: of the replicas.

    Returns:
        One row per way (`in process`, then by `chips_a_request`) and scenario: `images_per_s`,
        `p50_ms … p99_ms` of a query, `refused`, `errors`; `added_ms` to the median of one query
        and `share` of the images/s in process; of Offline `client_cpu_ms` and `service_cpu_ms` per
        image. A request of eight chips is a query of MultiStream; SingleStream has one chip.
        And the load curve: Server runs at `load`, fractions below 1 of the capacity in process.
    """
    alone = scenarios[scenarios.variant == variant.name]
    capacity = offline_rate(scenarios, variant.name)
    rows = [_row(IN_PROCESS, 1, row) for row in alone.to_dict("records")]
    curve = []
    threads = max(1, bench.threads // replicas)
    options = ("--threads", str(threads), "--replicas", str(replicas), "--engine", engine)
    with service(bench, variant, *options) as running:
        if engine == "local" and replicas > 1:
            for _ in range(replicas):
                running.replica()
        for chips in SIZES:
            requests = http_requests(bench.test_paths, chips)
            system = http_system(running.address, requests, bench.config.load_settings)
            way = f"HTTP, {chips} chip{'s' * (chips > 1)} a request"
            way += f", {replicas} replicas" * (replicas > 1) + " on Ray" * (engine == "ray")
            found = _http_scenarios(system, running, chips, capacity, chips in searched)
            rows += [_row(way, chips, row) for row in found]
            for load in (f for f in bench.config.load_fractions if f < 1):
                offered = load * capacity / chips
                row = run_scenario(system, "Server", offered, percentile=90)
                curve.append({"load": load, "offered_images_per_s": load * capacity}
                             | _row(way, chips, row))  # fmt: skip
    return _compared(pd.DataFrame(rows)), pd.DataFrame(curve)


def _http_scenarios(
    system: System, running: Service, chips: int, capacity: float, search: bool
) -> list[dict]:
    """The scenarios over HTTP as `run_scenario` returns them."""
    single = run_scenario(system, "SingleStream", capacity, percentile=90)
    if chips == 1:
        rows = [single, run_scenario(system, "MultiStream", capacity, percentile=90)]
    else:
        rows = [single | {"scenario": "MultiStream"}]
    client, server = time.process_time(), running.cpu_seconds()
    offline = run_scenario(system, "Offline", capacity / chips)
    images = offline["samples"] * chips
    offline["client_cpu_ms"] = 1e3 * (time.process_time() - client) / images
    offline["service_cpu_ms"] = 1e3 * (running.cpu_seconds() - server) / images
    if search:
        rows += fastest_within(find_server_rate(system, offline["answered_per_second"] / 2))
    return [*rows, offline]


def _row(way: str, chips: int, row: dict) -> dict:
    columns = ("p50_ms", "p90_ms", "p95_ms", "p99_ms", "refused", "errors", "queries")
    costs = {name: row[name] for name in ("client_cpu_ms", "service_cpu_ms") if name in row}
    return (
        {"way": way, "chips_a_request": chips, "scenario": row["scenario"]}
        | {"images_per_s": chips * row["answered_per_second"]}
        | {name: row[name] for name in columns}
        | costs
    )


def _compared(table: pd.DataFrame) -> pd.DataFrame:
    """With `added_ms` and `share` against the same scenario in process."""
    alone = table[table.way == IN_PROCESS].set_index("scenario")
    one_at_a_time = table.scenario.isin(["SingleStream", "MultiStream"])
    added = table.p50_ms - table.scenario.map(alone.p50_ms)
    share = table.images_per_s / table.scenario.map(alone.images_per_s)
    return table.assign(added_ms=added.where(one_at_a_time), share=share.where(~one_at_a_time))


def measure_killed_replica(bench: Bench, variant: Variant) -> dict:
    """Two replicas, one of them killed under load: what is lost, and how long until it is back.

    Args:
        bench: what is benchmarked; the load lasts three times its `load_seconds` and is half of
            the two replicas' own Offline rate.
        variant: whose files are served.

    Returns:
        `offered_per_s, requests, lost` (without an answer), `recovered_s` (from the kill until the
        new replica is ready), `p50_ms, p99_ms, refused`.
    """
    settings = bench.config.load_settings
    with service(bench, variant, "--replicas", "2") as running:
        first, _ = running.replica(), running.replica()
        system = http_system(running.address, http_requests(bench.test_paths, 1), settings)
        rate = run_scenario(system, "Offline", 100)["answered_per_second"]
        offered = run_scenario(system, "Offline", rate)["answered_per_second"] / 2
        system.settings = replace(system.settings, seconds=3 * settings.seconds)
        times = []

        def kill() -> None:
            time.sleep(settings.seconds)
            os.kill(first, signal.SIGKILL)
            times.append(time.monotonic())
            running.replica()
            times.append(time.monotonic())

        killer = threading.Thread(target=kill)
        killer.start()
        row = run_scenario(system, "Server", offered)
        killer.join()
    return {
        "offered_per_s": offered,
        "requests": row["queries"],
        "lost": row["errors"],
        "recovered_s": times[1] - times[0],
    } | {name: row[name] for name in ("p50_ms", "p99_ms", "refused")}
