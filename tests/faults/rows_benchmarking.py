"""Faults of a benchmark: its parameters, and models and data that do not go together."""

from tests.faults.fault import Fault

BENCH = "production_benchmarking"

ROWS = [
    Fault("no model trained yet", None, BENCH, ("model_path", "run setup_finetune.ipynb first")),
    Fault("no such model", None, f"{BENCH} --model_path nothing", ("model_path: no such file",)),
    Fault("no reference", None, f"{BENCH} --variants bf16", ("eager_fp32 is the reference",)),
    Fault("unknown variant", None, f"{BENCH} --variants faster", ("variants: ", "faster")),
    Fault(
        "a percentile without samples",
        None,
        f"{BENCH} --percentiles 99",
        ("p99 needs at least 299 samples", "there are 30"),
    ),
    Fault(
        "a percentile of all", None, f"{BENCH} --percentiles 100", ("100 is not between 0 and 100",)
    ),
    Fault(
        "samples for other batch sizes",
        None,
        f"{BENCH} --batch_sizes 1 8",
        ("latency_samples: 3 numbers for 2 batch_sizes",),
    ),
    Fault("no time", None, f"{BENCH} --load_seconds 0", ("load_seconds: ", "'0'")),
    Fault("no bound", None, f"{BENCH} --latency_bound_ms 0", ("latency_bound_ms: ", "'0'")),
    Fault("a rate below zero", None, f"{BENCH} --start_qps -1", ("start_qps: ",)),
    Fault(
        "results elsewhere", None, f"{BENCH} --run_name ../../x", ("run_name: ", "plain file name")
    ),
]
