"""Does serving stay stable? Minutes of the Server scenario at 80 % of capacity.

`python -m benchmarks.soak [--minutes 10] [--model_path F] [--variant openvino_int8] [--http]`
serves one variant from a process of its own, or as the service over HTTP, finds its capacity
(Offline), offers 80 % of it and compares the memory of what serves at the end with the memory after
the first minute.
"""

import argparse
import threading
from collections.abc import Callable
from dataclasses import replace

from helpers import InputError
from helpers.benchmarking.bench import Bench, BenchmarkConfig
from helpers.benchmarking.benchmark import Benchmark, save_record
from helpers.benchmarking.http import http_requests, http_system, service
from helpers.benchmarking.load_generator import System, run_scenario
from helpers.console import run_command
from helpers.deployment.runtimes import Variant, remote
from helpers.deployment.variants.build import BUILDERS
from helpers.deployment.variants.source import REFERENCE

LOAD = 0.8
SAMPLE_EVERY = 10  # seconds between two readings of the memory


def main() -> None:
    """Build the variant, find its capacity, soak it, print and write what happened."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model_path", default=BenchmarkConfig().model_path)
    parser.add_argument("--variant", choices=BUILDERS, default="openvino_int8")
    parser.add_argument("--http", action="store_true", help="the service, in requests of one chip")
    arguments = parser.parse_args()
    name = f"soak_{'http_' if arguments.http else ''}{arguments.variant}"
    bench, variant = opened(arguments.model_path, arguments.variant, run_name=name)
    settings = replace(bench.config.load_settings, seconds=5)
    if arguments.http:
        requests = http_requests(bench.test_paths, 1)
        with service(bench, variant) as running:
            system = http_system(running.address, requests, settings)
            result = soak(system, running.memory_bytes, arguments.minutes)
    else:
        with remote(variant, bench.threads) as model:
            system = System([model], bench.chips, settings)
            result = soak(system, model.memory_bytes, arguments.minutes)
    print(bench.label)
    for name, value in result.items():
        print(f"{name:24} {value}")
    save_record(bench, {"soak": result})


def opened(model_path: str, name: str, **parameters) -> tuple[Bench, Variant]:
    """A benchmark of one variant of a model, built; InputError where it does not run here."""
    config = BenchmarkConfig.checked(
        model_path=model_path,
        variants=(REFERENCE, name),
        results_path="benchmark_results",
        **parameters,
    )
    benchmark = Benchmark(config)
    if name not in benchmark.variants:
        reason = benchmark.built.set_index("variant").unavailable[name]
        raise InputError(f"variant: {name} does not run here: {reason}")
    return benchmark.bench, benchmark.variants[name]


def soak(system: System, memory_bytes: Callable[[], int], minutes: float) -> dict:
    """Load a system for minutes; memory is that of what serves it, in MiB."""
    rate = run_scenario(system, "Offline", 100)["answered_per_second"]
    capacity = run_scenario(system, "Offline", rate)["answered_per_second"]
    system.settings = replace(system.settings, seconds=60 * minutes)
    readings: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_EVERY):
            readings.append(memory_bytes() / 2**20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    row = run_scenario(system, "Server", LOAD * capacity)
    done.set()
    watcher.join()
    first_minute = readings[min(60 // SAMPLE_EVERY, len(readings)) - 1]
    return {
        "minutes": minutes,
        "capacity_per_s": round(capacity, 1),
        "offered_per_s": round(LOAD * capacity, 1),
        "queries": row["queries"],
        "answered_per_s": round(row["answered_per_second"], 1),
        "p50_ms": round(row["p50_ms"], 2),
        "p99_ms": round(row["p99_ms"], 2),
        "errors": row["errors"],
        "refused": row["refused"],
        "mib_after_one_minute": round(first_minute, 1),
        "mib_at_the_end": round(readings[-1], 1),
    }


if __name__ == "__main__":
    run_command(main)
