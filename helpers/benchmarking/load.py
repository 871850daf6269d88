"""Throughput and latency of variants under load, beside other processes and in several copies."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import pandas as pd

from helpers import InputError
from helpers.benchmarking.bench import Bench
from helpers.benchmarking.limits import energy_meter
from helpers.benchmarking.load_generator import LoadSettings, System, all_scenarios, run_scenario
from helpers.benchmarking.quality import worst_rows
from helpers.deployment.runtimes import Variant, remote
from helpers.deployment.variants.source import CONTROL, REFERENCE


def load_curve(system: System, capacity: float, fractions: Sequence[float]) -> pd.DataFrame:
    """Server runs at fractions of a capacity (images/s), as `load` in the result."""
    return pd.DataFrame(
        {"load": fraction} | run_scenario(system, "Server", fraction * capacity, percentile=90)
        for fraction in fractions
    )


@contextmanager
def competing_processes(n: int) -> Iterator[None]:
    """Keep n other processes busy with computing."""
    # They end with this process, however it ends; Ctrl-C at a terminal is for this one alone.
    busy = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10_000))"
    command = [sys.executable, "-c", busy]
    processes = [subprocess.Popen(command, start_new_session=True) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def under_competition(
    system: System, rate: float, offline_qps: float, counts: Sequence[int]
) -> pd.DataFrame:
    """The Server scenario at one rate, and Offline, with `competing` other busy processes."""
    rows = []
    for n in counts:
        with competing_processes(n):
            rows.append({"competing": n} | run_scenario(system, "Server", rate, percentile=90))
            rows.append({"competing": n} | run_scenario(system, "Offline", offline_qps))
    return pd.DataFrame(rows)


def scaling(
    variant: Variant,
    counts: Sequence[int],
    *,
    chips: np.ndarray,
    settings: LoadSettings,
    threads: int,
    device: str = "cpu",
) -> pd.DataFrame:
    """Throughput, latency and memory with several processes behind one queue.

    Returns:
        One row per count: `processes, threads_each, images_per_s` (Offline), `efficiency`
        (against so many times the first row's rate per process), `offered_qps` (the same in every
        row: 70 % of what the first count carries), `p50_ms, p90_ms` (Server), `memory_bytes`
        (proportional set size of all model processes, which shares common pages out).
    """
    rows = []
    for n in counts:
        with ExitStack() as stack:
            models = [stack.enter_context(remote(variant, threads, device)) for _ in range(n)]
            system = System(models, chips, settings)
            rate = rows[0]["images_per_s"] * n / rows[0]["processes"] if rows else 100.0
            offline = run_scenario(system, "Offline", rate)["answered_per_second"]
            offered = rows[0]["offered_qps"] if rows else 0.7 * offline
            server = run_scenario(system, "Server", offered, percentile=90)
            memory = sum(model.memory_bytes() for model in models)
        rows.append(
            {
                "processes": n,
                "threads_each": threads,
                "images_per_s": offline,
                "offered_qps": offered,
                "p50_ms": server["p50_ms"],
                "p90_ms": server["p90_ms"],
                "refused": server["refused"],
                "memory_bytes": memory,
            }
        )
    table = pd.DataFrame(rows)
    alone = table.images_per_s[0] / table.processes[0]
    return table.assign(efficiency=table.images_per_s / (table.processes * alone))


def load_names(bench: Bench, quality: pd.DataFrame, latency: pd.DataFrame) -> tuple[str, ...]:
    """What to put under load: as asked for, or the reference and the fastest that may be deployed.

    Raises:
        InputError: a variant was asked for that does not run here, or is not measured by itself.
    """
    if bench.config.load_variants:
        missing = set(bench.config.load_variants) - set(latency.variant)
        if missing:
            raise InputError(f"load_variants: {', '.join(sorted(missing))} was not timed here")
        return bench.config.load_variants
    worst = worst_rows(quality)
    rows = latency[latency.variant.isin(worst.variant[worst.passes_gate])]
    fastest = rows.variant[rows.images_per_s.idxmax()]
    return tuple(dict.fromkeys((REFERENCE, fastest)))


@contextmanager
def served(bench: Bench, variant: Variant) -> Iterator[System]:
    """A system whose model runs in a process of its own.

    Not in a thread of this one: PyTorch's second pool of OpenMP threads makes them all wait
    asleep, and eager fp32 took three times as long there on two cores.
    """
    with remote(variant, bench.threads, bench.device) as model:
        yield System([model], bench.chips, bench.config.load_settings)


def measure_scenarios(
    bench: Bench, variants: Sequence[Variant]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The four LoadGen scenarios of each variant; of the control SingleStream and Offline alone.

    Returns:
        One row per variant and scenario (`variant`, `load_generator.run_scenario`'s columns,
        `joules_per_1000_images` of Offline, NaN without a counter); Server is the fastest rate
        within the bound. And all rates that the searches tried.
    """
    scenarios, searches = [], []
    for variant in variants:
        with served(bench, variant) as system:
            table, search = all_scenarios(
                system,
                bench.config.start_qps,
                energy_meter(bench.device),
                brief=variant.name == CONTROL,
            )
        scenarios.append(table.assign(variant=variant.name))
        searches.append(search.assign(variant=variant.name))
    return pd.concat(scenarios, ignore_index=True), pd.concat(searches, ignore_index=True)


def offline_rate(scenarios: pd.DataFrame, variant: str) -> float:
    """Measured capacity of a variant in images/s: the Offline rate."""
    rows = scenarios[(scenarios.variant == variant) & (scenarios.scenario == "Offline")]
    return float(rows.answered_per_second.iloc[0])


def measure_load_curve(bench: Bench, variant: Variant, capacity: float) -> pd.DataFrame:
    """Latency against offered load, from light to more than the capacity (images/s)."""
    with served(bench, variant) as system:
        return load_curve(system, capacity, bench.config.load_fractions)


def measure_competition(bench: Bench, variant: Variant, capacity: float) -> pd.DataFrame:
    """Half the capacity offered, and Offline, beside competing CPU-bound processes."""
    with served(bench, variant) as system:
        return under_competition(system, capacity / 2, capacity, bench.config.competing)


def measure_scaling(bench: Bench, variants: Sequence[Variant]) -> pd.DataFrame:
    """Copies of a model in processes of their own; each has the same share of the cores.

    Returns:
        `variant` and the columns of `scaling`, one row per number of processes.
    """
    threads = max(1, bench.threads // max(bench.config.processes))
    tables = [
        scaling(
            variant,
            bench.config.processes,
            chips=bench.chips,
            settings=bench.config.load_settings,
            threads=threads,
            device=bench.device,
        ).assign(variant=variant.name)
        for variant in variants
    ]
    return pd.concat(tables, ignore_index=True)
