"""What a classifier costs in production, form by form, and which form to deploy.

`python -m helpers.production_benchmarking --model_path ./models/model_final.safetensors` measures
everything that the notebook shows: quality, latency, memory, throughput under load, limits.
Nothing is timed beside anything else, and variants take turns.
"""

from helpers.benchmarking.bench import BenchmarkConfig, load_all, open_bench, save_results
from helpers.benchmarking.decision import decide, summarise
from helpers.benchmarking.latency import latency_table, measure_latency
from helpers.benchmarking.limits import machine_limits
from helpers.benchmarking.load import (
    load_names,
    measure_competition,
    measure_load_curve,
    measure_scaling,
    measure_scenarios,
    offline_rate,
)
from helpers.benchmarking.memory import measure_memory
from helpers.benchmarking.quality import measure_quality
from helpers.benchmarking.roofline import roofline
from helpers.console import run_command
from helpers.deployment.variants.build import build_variants
from helpers.reporting.answers import deployment_sentence


def main() -> None:
    """Benchmark every form of a trained classifier and recommend one."""
    bench = open_bench(BenchmarkConfig.from_arguments(main.__doc__))
    print(bench.label)
    variants, built = build_variants(bench.source, bench.config.variant_names)
    predicts = load_all(bench, variants)
    by_name = {v.name: v for v in variants}
    quality = measure_quality(bench, predicts)
    samples = measure_latency(bench, predicts)
    latency = latency_table(samples, bench.config.percentiles)
    memory = measure_memory(bench, variants)
    limits = machine_limits(bench.device, bench.threads)
    roof = roofline(bench, variants, latency, limits)
    names = load_names(bench, quality, latency)
    scenarios, search = measure_scenarios(bench, [by_name[name] for name in names])
    loaded = by_name[names[-1]]
    capacity = offline_rate(scenarios, loaded.name)
    curve = measure_load_curve(bench, loaded, capacity)
    competition = measure_competition(bench, loaded, capacity)
    scaled = measure_scaling(bench, [by_name[name] for name in names])
    summary = summarise(bench, built, quality, latency, memory)
    decision = decide(summary)
    sentence = deployment_sentence(bench, summary, decision, scenarios, scaled)
    files = save_results(
        bench,
        {
            "": summary,
            "latency": latency,
            "latency_samples": samples,
            "memory": memory,
            "roofline": roof,
            "scenarios": scenarios,
            "server_search": search,
            "load_curve": curve,
            "competition": competition,
            "scaling": scaled,
        },
        {"limits": limits, "decision": decision, "sentence": sentence},
    )
    shown = ["variant", "passes_gate", "accuracy", "p50_ms", "images_per_s", "speedup",
             "mebibytes_on_disk", "peak_mib", "unavailable"]  # fmt: skip
    print(f"\n{summary[shown].round(3).to_string(index=False)}\n\n{sentence}")
    print("\nwrote " + ", ".join(map(str, files)))


if __name__ == "__main__":
    run_command(main)
