"""The committed notebooks: run with other parameters, and compared with their stored outputs."""

import ast
import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from unittest import mock

import nbformat
import pandas as pd
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from helpers import InputError
from helpers.benchmarking.bench import BenchmarkConfig
from helpers.deployment.mapping import MapConfig
from helpers.evaluation.comparison import CompareConfig
from helpers.records import ROOT
from helpers.training import jobs
from helpers.training.config import NotebookConfig
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
PUBLISHED = [f"reports/hurricane_harvey/{name}" for name in NOTEBOOKS if name != "map_scene"]
# With the defaults the comparison with the stored outputs takes minutes, and what these parameters
# change is not compared, but for `SIZES`: small chips, few runs and epochs; a few variants, one of
# which needs a GPU. One thread, since threads that wait for each other beside another test run many
# times as long.
SHORTER = {
    "setup_finetune": {"image_size = 98": "image_size = 28"},
    "finetune_lora": {
        "image_size = 98": "image_size = 28",
        "epochs = None": "epochs = 2",
        "fractions = [0.25, 0.5]": "fractions = [0.5]",
    },
    "benchmark": {
        "variants = None": 'variants = ["eager_fp32", "onnx_fp32", "openvino_int8", "sparse_2_4"]',
        "threads = None": "threads = 1",
        "load_variants = None": 'load_variants = ["onnx_fp32"]',
        "load_seconds = 0.5": "load_seconds = 0.2",
        "load_fractions = [0.3, 0.5, 0.7, 0.9, 1.1]": "load_fractions = [0.3, 0.5]",
        "latency_bound_ms = 100.0": "latency_bound_ms = 2000.0",
    },
}
# What is printed of chips of 98 px, and of those of 28 px.
SIZES = {"5,466,240": "5,457,600", "49 patches": "4 patches", "98 px": "28 px"}
# The others use the model that the first notebook leaves.
CHAINS = [("setup_finetune", "benchmark", "map_scene"), ("finetune_lora",)]


def read(name):
    return nbformat.read(ROOT / f"{name}.ipynb", as_version=4)


def code_cells(name):
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def places(folder):
    return {
        f"{kind}_path": str(folder / kind) for kind in ("output", "history", "figures", "cache")
    }


def run_here(name, **parameters):
    """Run a notebook's code cells in this process, as papermill's kernel has them."""
    first, *others = (cell.source for cell in code_cells(name))
    given = "# Parameters\n" + "".join(f"{key} = {value!r}\n" for key, value in parameters.items())
    namespace = {"In": ["", first, given], "__shown__": lambda value: display(value)}
    with mock.patch("IPython.display.display") as display:
        for source in (first, given, *others):
            *body, last = ast.parse(source).body
            if isinstance(last, ast.Expr):  # its value is shown
                last = ast.parse(f"__shown__({ast.unparse(last)})").body[0]
            exec(compile(ast.Module([*body, last], []), name, "exec"), namespace)
    for shown in [argument for call in display.call_args_list for argument in call.args]:
        getattr(shown, "_repr_html_", str)()


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
    assert set(papermill.inspect_notebook(ROOT / f"{name}.ipynb")) == set(namespace)
    lines = first.source.splitlines()
    for statement in ast.parse(first.source).body:
        assert "#" in lines[statement.end_lineno - 1], ast.unparse(statement)


@pytest.mark.parametrize("name", [*NOTEBOOKS, *PUBLISHED])
def test_the_committed_notebook_is_executed_clean_and_small(name):
    cells = code_cells(name)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(
        output.output_type != "error" and output.get("name") != "stderr" for output in outputs
    )
    text = (ROOT / f"{name}.ipynb").read_text()
    assert len(text) < 700_000 and str(ROOT) not in text
    assert "papermill" not in read(name).metadata, "its notes hold paths of the machine"


def shortened(name):
    """A notebook with other defaults of some parameters."""
    notebook = read(name)
    parameters = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    for default, value in SHORTER.get(name, {}).items():
        assert parameters.source.count(f"\n{default}") == 1
        parameters.source = parameters.source.replace(f"\n{default}", f"\n{value}")
    printed = [o for c in notebook.cells for o in c.get("outputs", []) if "text" in o]
    for output, (default, value) in itertools.product(printed, SIZES.items()):
        output.text = output.text.replace(default, value)
    return notebook


@pytest.mark.parametrize("names", CHAINS, ids="-".join)
def test_the_stored_outputs_are_what_the_notebooks_give(names, tmp_path):
    """nbval, on a copy of the project, so that nothing in the work tree changes."""
    for part in ("helpers", "example"):
        shutil.copytree(ROOT / part, tmp_path / part)
    files = [f"{name}.ipynb" for name in names]
    for name, file in zip(names, files, strict=True):
        nbformat.write(shortened(name), tmp_path / file)
    options = ["-q", "-p", "no:cacheprovider", "--nbval"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:]
    if "benchmark" in names:
        check_benchmark(tmp_path / "runs")


def check_benchmark(made):
    """What the notebook leaves: every variant asked for, the loads, the figures."""
    name = "benchmark_head_only_example_example_seed0"
    table = pd.read_csv(made / f"benchmark_results/{name}.csv").set_index("variant")
    variants = ["onnx_fp32", "openvino_int8", "sparse_2_4"]
    assert list(table.index) == ["eager_fp32", "eager_fp32_again", *variants]
    assert "GPU" in table.unavailable["sparse_2_4"]
    assert table.peak_mib["onnx_fp32"] < table.peak_mib["eager_fp32"]  # no torch in it
    tables = json.loads((made / f"benchmark_results/{name}.json").read_text())["tables"]
    assert [row["processes"] for row in tables["scaling"]] == [1, 2]
    assert [row["competing"] for row in tables["competition"]] == [0, 0, 2, 2]
    figures = {path.stem for path in (made / "figures").glob("benchmark_*.png")}
    shown = (
        "latency", "roofline", "load_curve", "sharing", "http", "latency_throughput", "pareto"
    )  # fmt: skip
    assert figures == {f"benchmark_{name}" for name in shown}
    assert (made / name / "onnx_fp32.onnx").is_file()


def test_setup_with_other_parameters_on_other_data(tmp_path):
    """Four classes in split folders, three kept, other sizes, one head input as a single value."""
    counts = {"train": 12, "valid": 4, "test": 4}
    split_folders(tmp_path / "data", counts=counts, classes=("a", "b", "c", "d"), size=40)
    executed = tmp_path / "executed.ipynb"
    parameters = {
        "data_path": str(tmp_path / "data"),
        "classes": ["c", "a", "b"],
        "show_chips": False,
        "backbone": "timm:test_vit",
        "weights": "random",
        "image_size": 32,
        "head_inputs": "cls",
        "learning_rates": [1e-2],
        "weight_decays": [0.0],
        "epochs": 3,
        "augment": True,
        "device": "cpu",
        "run_name": "other",
    }
    papermill.execute_notebook(
        ROOT / "setup_finetune.ipynb", executed, places(tmp_path) | parameters, cwd=ROOT,
        progress_bar=False,
    )  # fmt: skip
    record = json.loads((tmp_path / "history" / "other.json").read_text())
    assert record["chips"] == {"train": 36, "valid": 12, "test": 12}
    assert record["classifier"]["classes"] == ["c", "a", "b"]
    assert len(pd.read_csv(tmp_path / "history" / "other.csv")) == 3
    figures = {p.name for p in (tmp_path / "figures").iterdir()}
    assert not figures & {
        "setup_chips.jpg",
        "setup_answers.jpg",
        "setup_token_components.jpg",
    }  # show_chips is False
    assert figures >= {
        "model.onnx.png", "setup_sweep.png", "setup_features.png",
        "setup_training_curves.png", "setup_test_metrics.png", "setup_confusion.png",
        "setup_shortcuts.png",
    }  # fmt: skip
    page = tmp_path / "page.html"
    render(executed, page)
    assert "How far does a frozen DINOv2" in page.read_text()


def test_lora_with_other_parameters(tmp_path, monkeypatch):
    """Three classes, all four methods on other layers, sweeps of all shapes, two epochs.

    In this process: starting others takes longer, and the comparison with the stored outputs does.
    """
    monkeypatch.setattr(jobs, "train_alone", lambda *given: save_run(given[0], train(*given)))
    counts = {"train": 8, "valid": 4, "test": 6}
    manifest_folder(tmp_path / "data", counts=counts, classes=("a", "b", "c"))
    run_here(
        "finetune_lora",
        **places(tmp_path),
        data_path=str(tmp_path / "data"),
        backbone="timm:test_vit",
        weights="random",
        image_size=32,
        methods=["head_only", "lora", "dora", "full"],
        fractions=[],
        seeds=[0, 1],
        full_seeds=1,
        ranks=[1],
        target_sets=[["proj"]],
        lora_targets=["qkv", "fc1"],
        adapted_blocks=2,
        epochs=2,
        device="cpu",
    )
    records = [json.loads(p.read_text()) for p in (tmp_path / "history").glob("*_seed*.json")]
    counts = Counter(r["method"] for r in records)
    assert counts == {"head_only": 2, "lora": 5, "dora": 2, "full": 1}
    configs = [r["config"] for r in records if r["method"] == "lora"]
    shapes = [(c["adapted_blocks"], c["lora_rank"], *c["lora_targets"]) for c in configs]
    common = (2, 4, "qkv", "fc1")
    further = [(None, 4, "qkv", "fc1"), (2, 1, "qkv", "fc1"), (2, 4, "proj")]
    assert Counter(shapes) == {common: 2} | dict.fromkeys(further, 1)
    figures = {p.name for p in (tmp_path / "figures").glob("*.png")}
    assert figures >= {"lora_curves.png", "lora_ranks.png", "lora_weight_changes.png"}
    render(ROOT / "finetune_lora.ipynb", tmp_path / "page.html")
    assert "Is DoRA worth its extra cost?" in (tmp_path / "page.html").read_text()


def test_a_wrong_parameter_stops_a_run_of_papermill_with_one_clear_error(tmp_path):
    """A notebook of two cells, whose kernel imports little."""
    cells = map(nbformat.v4.new_code_cell, (
        "epochs = 100",
        "from helpers.config import Config\n"
        "class Parameters(Config):\n    epochs: int = 100\n"
        "Parameters.from_notebook(globals())",
    ))  # fmt: skip
    kernel = {"name": "python3", "language": "python", "display_name": "Python"}
    notebook = nbformat.v4.new_notebook(cells=list(cells), metadata={"kernelspec": kernel})
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, tmp_path / "in.ipynb")
    with pytest.raises(PapermillExecutionError) as error:
        papermill.execute_notebook(
            tmp_path / "in.ipynb", tmp_path / "out.ipynb", {"epoch": 3}, cwd=ROOT,
            progress_bar=False,
        )  # fmt: skip
    assert error.value.ename == "InputError"
    assert error.value.evalue == "epoch: unknown parameter; the notebook's parameters are epochs"


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("setup_finetune", {"epochs": "many"}, "epochs: Input should be a valid integer"),
        ("setup_finetune", {"data_path": "nowhere"}, "data_path: nowhere does not exist"),
        ("finetune_lora", {"seed": 0}, "seed: unknown parameter"),
        ("finetune_lora", {"data_path": "nowhere"}, "data_path: nowhere does not exist"),
        ("benchmark", {"varients": ["eager_fp32"]}, "varients: unknown parameter"),
        ("map_scene", {"strides": 7}, "strides: unknown parameter"),
    ],
)
def test_a_wrong_parameter_stops_every_notebook(name, parameters, message, tmp_path, monkeypatch):
    """In its first cells."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^{message}"):
        run_here(name, **parameters)
    assert not list(tmp_path.iterdir())
