"""The committed notebooks: run with other parameters, and compared with their stored outputs."""

import ast
import json
import shutil
import subprocess
import sys
from collections import Counter

import nbformat
import pandas as pd
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from helpers.benchmarking.bench import BenchmarkConfig
from helpers.deployment.mapping import MapConfig
from helpers.evaluation.comparison import CompareConfig
from helpers.records import ROOT
from helpers.training.config import NotebookConfig, RunConfig
from helpers.training.methods import train
from helpers.training.runs import save_run
from tests.fake_data import manifest_folder, split_folders
from tools.run_notebooks import NOTEBOOKS, render

CONFIGS = {
    "setup_finetune": NotebookConfig,
    "finetune_lora": CompareConfig,
    "benchmark": BenchmarkConfig,
    "map_scene": MapConfig,
}
# Two dozen variants take minutes, and what this notebook prints of them varies; three show that
# its cells run as stored. One thread, since threads that wait for each other beside another test
# run many times as long.
SHORTER = {
    "variants = None": 'variants = ["eager_fp32", "onnx_fp32", "openvino_int8"]',
    "threads = None": "threads = 1",
    "load_seconds = 0.5": "load_seconds = 0.2",
    "load_fractions = [0.3, 0.5, 0.7, 0.9, 1.1]": "load_fractions = [0.3, 0.5]",
    "latency_bound_ms = 100.0": "latency_bound_ms = 2000.0",
}


def read(name):
    return nbformat.read(ROOT / f"{name}.ipynb", as_version=4)


def code_cells(name):
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def run(name, folder, **parameters):
    """Run a notebook through papermill, writing below a folder; return the executed file."""
    output = folder / f"{name}.ipynb"
    own = {f"{kind}_path": str(folder / kind) for kind in ("output", "history", "figures", "cache")}
    papermill.execute_notebook(
        ROOT / f"{name}.ipynb", output, own | parameters, cwd=ROOT, progress_bar=False
    )
    return output


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_parameters_cell_is_the_whole_interface(name):
    """Only parameters of the configuration, with its defaults, and a comment beside each."""
    first = code_cells(name)[0]
    assert first.metadata.tags == ["parameters"]
    namespace = {}
    exec(first.source, {}, namespace)
    config = CONFIGS[name]
    assert set(namespace) <= set(config.model_fields)
    assert config.checked(**namespace) == config.checked()
    lines = first.source.splitlines()
    for statement in ast.parse(first.source).body:
        assert "#" in lines[statement.end_lineno - 1], ast.unparse(statement)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_committed_notebook_is_executed_clean_and_small(name):
    cells = code_cells(name)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(
        output.output_type != "error" and output.get("name") != "stderr" for output in outputs
    )
    assert (ROOT / f"{name}.ipynb").stat().st_size < 1_500_000
    assert "papermill" not in read(name).metadata, "its notes hold paths of the machine"


def shorten(cells):
    """Replace the default of some parameters in the parameters cell."""
    parameters = next(cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    for default, value in SHORTER.items():
        assert default in parameters.source
        parameters.source = parameters.source.replace(default, value)


def train_default_model(folder):
    """What the first notebook leaves for the third."""
    config = RunConfig(
        output_path=str(folder / "models"),
        history_path=str(folder / "history"),
        cache_path=str(folder / "cache"),
    )
    save_run(config, train(config, config.data()))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_stored_outputs_are_what_the_notebook_gives(name, tmp_path):
    """nbval, on a copy of the project, so that nothing in the work tree changes."""
    for part in ("helpers", "example"):
        shutil.copytree(ROOT / part, tmp_path / part)
    notebook = read(name)
    if name == "benchmark":
        shorten(notebook.cells)
    if name in ("benchmark", "map_scene"):
        train_default_model(tmp_path)
    nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--nbval",
            f"{name}.ipynb",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:]


def test_setup_with_other_parameters_on_other_data(tmp_path):
    """Four classes in split folders, three kept, other sizes, one head input as a single value."""
    counts = {"train": 12, "valid": 4, "test": 4}
    split_folders(tmp_path / "data", counts=counts, classes=("a", "b", "c", "d"), size=40)
    executed = run(
        "setup_finetune",
        tmp_path,
        data_path=str(tmp_path / "data"),
        classes=["c", "a", "b"],
        show_chips=False,
        weights="random",
        image_size=28,
        head_inputs="cls",
        learning_rates=[1e-2],
        weight_decays=[0.0],
        epochs=3,
        augment=True,
        device="cpu",
        run_name="other",
    )
    record = json.loads((tmp_path / "history" / "other.json").read_text())
    assert record["chips"] == {"train": 36, "valid": 12, "test": 12}
    assert record["classifier"]["classes"] == ["c", "a", "b"]
    assert len(pd.read_csv(tmp_path / "history" / "other.csv")) == 3
    figures = {p.name for p in (tmp_path / "figures").iterdir()}
    assert not figures & {"setup_chips.png", "setup_errors.png"}  # show_chips is False
    assert figures >= {
        "model.onnx.png", "setup_token_components.png", "setup_sweep.png",
        "setup_training_curves.png", "setup_test_metrics.png", "setup_confusion.png",
        "setup_shortcuts.png",
    }  # fmt: skip
    page = tmp_path / "page.html"
    render(executed, page)
    assert "How far does a frozen DINOv2" in page.read_text()


def test_lora_with_other_parameters(tmp_path):
    """Three classes, all four methods on other layers, sweeps of ranks and layers, two epochs."""
    counts = {"train": 8, "valid": 4, "test": 6}
    manifest_folder(tmp_path / "data", counts=counts, classes=("a", "b", "c"))
    executed = run(
        "finetune_lora",
        tmp_path,
        data_path=str(tmp_path / "data"),
        image_size=28,
        methods=["head_only", "lora", "dora", "full"],
        fractions=[],
        seeds=[0, 1],
        full_seeds=1,
        ranks=[1],
        target_sets=[["proj"]],
        lora_targets=["qkv", "fc1"],
        epochs=2,
        device="cpu",
    )
    records = [json.loads(p.read_text()) for p in (tmp_path / "history").glob("*_seed*.json")]
    counts = Counter(r["method"] for r in records)
    assert counts == {"head_only": 2, "lora": 4, "dora": 2, "full": 1}
    shapes = [
        (r["config"]["lora_rank"], *r["config"]["lora_targets"])
        for r in records
        if r["method"] == "lora"
    ]
    own = (4, "qkv", "fc1")
    assert Counter(shapes) == {own: 2, (1, "qkv", "fc1"): 1, (4, "proj"): 1}
    figures = {p.name for p in (tmp_path / "figures").glob("*.png")}
    assert figures >= {"lora_curves.png", "lora_ranks.png", "lora_weight_changes.png"}
    render(executed, tmp_path / "page.html")
    assert "Is DoRA worth its extra cost?" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"epoch": 3}, "epoch: unknown parameter; the notebook's parameters are data_path"),
        ({"epochs": "many"}, "epochs: Input should be a valid integer"),
        ({"image_size": 100}, "image_size: 100 is not a multiple of example's patch size 14"),
        ({"data_path": "nowhere"}, "data_path: nowhere does not exist"),
    ],
)
def test_a_wrong_parameter_stops_the_notebook_with_one_clear_error(tmp_path, parameters, message):
    with pytest.raises(PapermillExecutionError) as error:
        run("setup_finetune", tmp_path, **parameters)
    assert error.value.ename == "InputError"
    assert error.value.evalue.startswith(message)
    assert not (tmp_path / "history").exists()
