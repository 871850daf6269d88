"""What does the service over HTTP cost, and what is lost when a replica dies?

`python -m benchmarks.http_load [--seconds 10] [--model_path F] [--variant openvino_int8]
[--replicas 1] [--engine local]` measures one variant in process and over HTTP under the same
LoadGen, in requests of one and of eight chips, with the highest rate within the bound for both;
then, on the local engine, kills one of two replicas under load. It prints a table and ends with one
line of JSON. Ten minutes of load are `benchmarks.soak --http`.
"""

import argparse
import json

from benchmarks.soak import opened
from helpers.benchmarking.bench import BenchmarkConfig
from helpers.benchmarking.benchmark import rows_of, save_record
from helpers.benchmarking.http import SIZES, measure_http, measure_killed_replica
from helpers.benchmarking.load import measure_scenarios
from helpers.console import run_command
from helpers.deployment.variants.build import BUILDERS
from helpers.reporting.service import http_answer, http_view


def main() -> None:
    """Build the variant, measure it both ways, print and write what happened."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="least length of a run")
    parser.add_argument("--model_path", default=BenchmarkConfig().model_path)
    parser.add_argument("--variant", choices=BUILDERS, default="openvino_int8")
    parser.add_argument("--replicas", type=int, default=1, help="they share the cores")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    arguments = parser.parse_args()
    on_ray = arguments.engine == "ray"
    of_several = f"_{arguments.replicas}_replicas" * (arguments.replicas > 1) + "_ray" * on_ray
    bench, variant = opened(
        arguments.model_path,
        arguments.variant,
        run_name=f"http_{arguments.variant}{of_several}",
        load_seconds=arguments.seconds,
    )
    scenarios, _ = measure_scenarios(bench, [variant])
    served = (arguments.replicas, arguments.engine)
    table, curve = measure_http(bench, variant, scenarios, SIZES, *served)
    result = {"table": rows_of(table), "curve": rows_of(curve)}
    if not on_ray:
        result["killed_replica"] = measure_killed_replica(bench, variant)
    print(f"{bench.label}; {bench.threads} threads; latency of a query in ms, CPU ms of an image")
    print(http_view(table).round(2).to_string(index=False, na_rep=""))
    print(http_answer(table))
    save_record(bench, {"http": result})
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
