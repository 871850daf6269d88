"""The benchmark of a GPU, with tiny sizes on the CPU, so that it does not rot."""

import json
import time

import pandas as pd

from benchmarks import gpu
from benchmarks.tables import Report


def test_a_dry_run_measures_every_row(tmp_path):
    gpu.main(["--dry_run", "--results_path", str(tmp_path)])
    training, inference, scenarios = (
        pd.read_csv(tmp_path / f"gpu_{name}.csv") for name in ("training", "inference", "scenarios")
    )
    assert set(training.what) == {"step", "plain loop", "features", "original job"}
    assert set(training.method.dropna()) == {"lora", "dora", "full"}
    assert "failure" not in training and "failure" not in scenarios
    assert set(inference.form) == set(gpu.FORMS)
    failed = inference[inference.get("failure", pd.Series()).notna()]
    assert set(failed.form) <= {"compiled_fp8"}, "which needs a GPU"
    assert set(scenarios.scenario) == {"SingleStream", "Offline"}
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["dry_run"] and record["limits"]["bf16"] > 0
    assert "original job" in (tmp_path / "gpu_log.txt").read_text()


def test_a_measurement_that_fails_or_lasts_too_long_is_a_row_with_the_reason(tmp_path):
    def fails():
        yield {"images": 1}
        raise RuntimeError("no kernel\nfor this")

    def lasts():
        while True:
            time.sleep(0.01)
        yield {}

    report = Report(tmp_path, time.monotonic() + 100, limit_s=1)
    report.rows("tried", {"form": "a"}, fails)
    report.rows("tried", {"form": "b"}, lasts)
    report.ends = time.monotonic()
    report.rows("tried", {"form": "c"}, fails)
    table = pd.read_csv(tmp_path / "gpu_tried.csv")
    assert table.form.tolist() == ["a", "a", "b", "c"] and table.images[0] == 1
    assert table.failure.tolist()[1:] == [
        "RuntimeError: no kernel for this",
        "TimeoutError: took more than 1 s",
        "TimeoutError: no time left",
    ]
