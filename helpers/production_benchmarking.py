"""What a classifier costs in production, form by form, and which form to deploy.

`python -m helpers.production_benchmarking --model_path ./runs/RUN/model_final.safetensors` measures
everything that the notebook shows: quality, latency, memory, throughput under load, limits.
Nothing is timed beside anything else, and variants take turns.
"""

from helpers.benchmarking.bench import BenchmarkConfig
from helpers.benchmarking.benchmark import Benchmark
from helpers.console import run_command
from helpers.reporting.answers import deployment_sentence

_SHOWN = ["variant", "passes_gate", "accuracy", "p50_ms", "images_per_s", "speedup",
          "mebibytes_on_disk", "peak_mib", "unavailable"]  # fmt: skip


def main() -> None:
    """Benchmark every form of a trained classifier and recommend one."""
    benchmark = Benchmark(BenchmarkConfig.from_arguments(main.__doc__))
    print(benchmark.bench.label)
    sentence = deployment_sentence(benchmark)
    files = benchmark.save(sentence)
    print(f"\n{benchmark.summary[_SHOWN].round(3).to_string(index=False)}\n\n{sentence}")
    print("\nwrote " + ", ".join(map(str, files)))


if __name__ == "__main__":
    run_command(main)
