"""benchmark.ipynb with other parameters than its own."""

import nbformat
import pandas as pd
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from helpers.records import ROOT
from tests.benchmarking.test_production_benchmarking import folder  # noqa: F401  the trained classifier

NAMES = ["eager_fp32", "lora_merged", "onnx_fp32", "openvino_fp32", "sparse_2_4"]


def run(model, output, **parameters):
    given = {
        "model_path": str(model / "models/tiny/model_final.safetensors"),
        "data_path": str(model / "data"),
        "variants": NAMES,
        "batch_sizes": [1, 2],
        "latency_samples": [6, 5],
        "percentiles": [50],
        "load_seconds": 0.2,
        "load_variants": ["onnx_fp32"],
        "load_fractions": [0.5],
        "competing": [0, 1],
        "latency_bound_ms": 2000.0,
        "max_batch": 2,
        "threads": 1,
        **{f"{kind}_path": str(output / kind) for kind in ("output", "results", "figures")},
    }
    notebook = output / "benchmark.ipynb"
    papermill.execute_notebook(
        ROOT / "benchmark.ipynb", notebook, given | parameters, cwd=ROOT, progress_bar=False
    )
    return nbformat.read(notebook, as_version=4)


def test_the_notebook_runs_with_other_parameters(folder, tmp_path):  # noqa: F811
    notebook = run(folder, tmp_path, run_name="mine")
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.get("name") == "stderr"]
    summary = pd.read_csv(tmp_path / "results/mine.csv")
    assert summary.variant.tolist() == [NAMES[0], "eager_fp32_again", *NAMES[1:]]
    assert summary.unavailable.notna().tolist() == [False] * 5 + [True]
    names = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    shown = ("latency", "roofline", "load_curve", "sharing", "pareto")
    assert names == {f"benchmark_{name}" for name in shown}
    assert (tmp_path / "output/mine/openvino_fp32.bin").is_file()
    text = "".join(str(o.get("data", "")) for o in outputs)
    assert "For the deployment plan" in text and "Deploy " in text


def test_an_unknown_parameter_stops_the_notebook(folder, tmp_path):  # noqa: F811
    with pytest.raises(PapermillExecutionError, match="varients: unknown parameter"):
        run(folder, tmp_path, varients=["eager_fp32"])
