"""Throughput and latency of variants under load, beside other processes and in several copies."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pandas as pd

from helpers import InputError
from helpers.benchmarking.bench import Bench
from helpers.benchmarking.limits import energy_meter
from helpers.benchmarking.load_generator import System, all_scenarios, run_scenario
from helpers.benchmarking.quality import passing
from helpers.deployment.runtimes import Variant, remote
from helpers.deployment.variants.source import CONTROL, REFERENCE


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
    rows = latency[latency.variant.isin(passing(quality))]
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


def measure_load(
    bench: Bench, variant: Variant, capacity: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Latency against offered load, and beside competing CPU-bound processes.

    Args:
        bench: what is benchmarked.
        variant: that is put under load.
        capacity: images/s.

    Returns:
        Server runs at `load`, fractions of the capacity; and Server at half the capacity, and
        Offline, with `competing` other busy processes; both with `run_scenario`'s columns.
    """
    with served(bench, variant) as system:
        curve = [
            {"load": fraction} | run_scenario(system, "Server", fraction * capacity, percentile=90)
            for fraction in bench.config.load_fractions
        ]
        beside = []
        for n in bench.config.competing:
            with competing_processes(n):
                half = run_scenario(system, "Server", capacity / 2, percentile=90)
                offline = run_scenario(system, "Offline", capacity)
            beside += [{"competing": n} | row for row in (half, offline)]
    return pd.DataFrame(curve), pd.DataFrame(beside)


def measure_scaling(bench: Bench, variants: Sequence[Variant]) -> pd.DataFrame:
    """Several processes behind one queue, each with the same share of the cores.

    Returns:
        One row per variant and number of processes: `processes, threads_each, images_per_s`
        (Offline), `offered_qps` (the same for all of a variant: 70 % of what the first number
        carries), `p50_ms, p90_ms, refused` (Server), `memory_bytes` (proportional set size of all
        model processes, which shares common pages out), `efficiency` (against so many times the
        first row's rate per process), `variant`.
    """
    threads = max(1, bench.threads // max(bench.config.processes))
    return pd.concat([_scaling(bench, v, threads) for v in variants], ignore_index=True)


def _scaling(bench: Bench, variant: Variant, threads: int) -> pd.DataFrame:
    rows = []
    for n in bench.config.processes:
        with ExitStack() as stack:
            models = [stack.enter_context(remote(variant, threads, bench.device)) for _ in range(n)]
            system = System(models, bench.chips, bench.config.load_settings)
            rate = rows[0]["images_per_s"] * n / rows[0]["processes"] if rows else 100.0
            offline = run_scenario(system, "Offline", rate)["answered_per_second"]
            offered = rows[0]["offered_qps"] if rows else 0.7 * offline
            server = run_scenario(system, "Server", offered, percentile=90)
            memory = sum(model.memory_bytes() for model in models)
        rows.append(
            {"processes": n, "threads_each": threads, "images_per_s": offline}
            | {"offered_qps": offered, "memory_bytes": memory}
            | {name: server[name] for name in ("p50_ms", "p90_ms", "refused")}
        )
    table = pd.DataFrame(rows)
    alone = table.images_per_s[0] / table.processes[0]
    return table.assign(
        efficiency=table.images_per_s / (table.processes * alone), variant=variant.name
    )
