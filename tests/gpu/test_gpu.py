"""What runs on a GPU, on a real one: `pytest -m gpu`; without one all of it is skipped.

The numbers of a GPU are not those of a CPU: fp32 is multiplied in TF32 (10 bits of fraction) and
sums come in another order. Bounds here say that the same is computed, not that it rounds alike.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import papermill
import pytest
import torch

from helpers.records import ROOT
from helpers.training import jobs
from helpers.training.config import RunConfig
from helpers.training.methods import train
from helpers.training.runs import class_probabilities
from tests.fake_data import manifest_folder

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="no GPU is visible")]

NUMBERS = ["train_loss", "valid_loss"]
# TF32 keeps 10 bits of fraction and bf16 7: a product's relative error is up to 2 ** -10 and
# 2 ** -7; through a dozen blocks and training steps errors grow, here taken as ten times.
BOUNDS = {"fp32": 10 * 2**-10, "bf16": 10 * 2**-7, "fp16": 10 * 2**-10}
SMALL = {"device": "cuda", "threads": 2, "batch_sizes": [1, 4], "latency_samples": [30, 5],
         "load_seconds": 0.2, "load_fractions": [0.5], "competing": [0],
         "processes": [1]}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return manifest_folder(folder, counts={"train": 16, "valid": 8, "test": 8})


@pytest.fixture
def config(root, tmp_path):
    def make(**parameters):
        options = {
            "data_path": str(root),
            "image_size": 28,
            "epochs": 3,
            "batch_size": 16,
            "lora_dropout": 0.0,
            "precision": "fp32",
            "device": "cuda",
            "output_path": str(tmp_path),
            "run_name": "trial",
        }
        return RunConfig.checked(**options | parameters)

    return make


def quiet(config):
    return train(config, config.data(), report=lambda line: None)


@pytest.mark.parametrize("method", ["head_only", "lora", "dora", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_method_does_what_it_does_on_the_cpu(config, tmp_path, method, precision):
    changes = {"method": method, "precision": precision}
    if (method, precision) == ("head_only", "fp16"):
        pytest.skip("frozen features are computed in fp32 or bf16")
    run = quiet(config(**changes))
    there = {"device": "cpu", "precision": "fp32", "cache_path": str(tmp_path / "cpu")}
    expected = quiet(config(**changes | there))
    assert {p.device.type for p in run.classifier.parameters()} == {"cpu"}
    difference = class_probabilities(run.predictions) - class_probabilities(expected.predictions)
    assert np.abs(difference).max() < BOUNDS[precision]


def test_a_run_that_was_interrupted_goes_on(config, tmp_path):
    def stop(line):
        if line.startswith("epoch   2"):
            raise KeyboardInterrupt

    uninterrupted = quiet(config(method="lora", epochs=4, output_path=str(tmp_path / "one")))
    killed = config(method="lora", epochs=4, resume=True)
    with pytest.raises(KeyboardInterrupt):
        jobs.finished(killed, killed.data(), report=stop)
    resumed, was_read = jobs.finished(killed, killed.data(), report=lambda line: None)
    assert not was_read and len(resumed.history) == 4
    found, expected = (run.history[NUMBERS] for run in (resumed, uninterrupted))
    pd.testing.assert_frame_equal(found, expected, rtol=BOUNDS["fp32"])


def notebook(name, folder, **parameters):
    places = {"output_path": str(folder)} | parameters
    offered = papermill.inspect_notebook(ROOT / f"{name}.ipynb")
    papermill.execute_notebook(
        ROOT / f"{name}.ipynb",
        folder / f"{name}.ipynb",
        {key: value for key, value in places.items() if key in offered},
        cwd=ROOT,
        progress_bar=False,
    )


def test_the_notebooks_on_one_model(tmp_path):
    notebook("setup_finetune", tmp_path, device="cuda", epochs=10)
    model = tmp_path / "head_only_example_example_seed0" / "model_final.safetensors"
    notebook("benchmark", tmp_path, **SMALL, model_path=str(model))
    record = next((tmp_path / "benchmark_results").glob("*.json"))
    assert json.loads(record.read_text())["config"]["device"] == "cuda"
    notebook(
        "map_scene", tmp_path, device="cuda", model_path=str(model), output=str(tmp_path / "map")
    )
    assert (tmp_path / "map.tif").is_file()


def test_the_notebook_of_all_methods(root, tmp_path):
    methods = ["head_only", "lora", "dora", "full"]
    options = {"data_path": str(root), "image_size": 28, "methods": methods, "fractions": []}
    notebook("finetune_lora", tmp_path, device="cuda", epochs=2, **options)
    assert len(list((tmp_path / "training_history").glob("compare_*.json"))) == 4


# What a comparison on a GPU leaves out, since another device would serve it.
ON_THE_CPU = ("onnx", "openvino")


def test_every_variant_of_a_gpu(config, tmp_path):
    from helpers.deployment.variants.build import BUILDERS, build_variants
    from helpers.deployment.variants.source import REFERENCE, Source

    run_config = config(method="head_only", backbone="example", image_size=98)
    data = run_config.data()
    classifier = quiet(run_config).classifier
    dataset = data.dataset("train", 98)
    chips = torch.stack([chip for chip, _ in dataset])
    labelled = (chips, dataset.targets)
    source = Source(classifier, labelled, labelled, chips[:8], tmp_path / "v", device="cuda")
    _, predicts, table = build_variants(source, tuple(BUILDERS), threads=2)
    missing = table[table.unavailable.notna()].set_index("variant").unavailable
    assert all(name.startswith(ON_THE_CPU) for name in missing.index), missing.to_string()
    expected = predicts[REFERENCE](chips.numpy()).argmax(axis=1)
    for name, predict in predicts.items():
        answers = predict(chips.numpy())
        assert np.isfinite(answers).all(), name
        if not name.startswith(("structured", "pruned", "sparse", "int4")):
            assert (answers.argmax(axis=1) == expected).mean() > 0.9, name


@pytest.mark.skipif(GPUS < 2, reason="fewer than two GPUs are visible")
@pytest.mark.parametrize("method", ["head_only", "lora"])
def test_two_processes_on_two_gpus_give_the_history_of_one(config, tmp_path, method):
    alone = config(method=method, output_path=str(tmp_path / "one"))
    jobs.finished(alone, alone.data(), report=lambda line: None)
    both = config(method=method, output_path=str(tmp_path / "two"))
    arguments = []
    for name, value in both.model_dump(exclude_defaults=True).items():
        arguments += [f"--{name}", str(value)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [sys.executable, *launch, "-m", "helpers.finetune", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    found, expected = (
        pd.read_csv(f"{run.history_path}/trial.csv")[NUMBERS] for run in (both, alone)
    )
    pd.testing.assert_frame_equal(found, expected, rtol=BOUNDS["fp32"])
