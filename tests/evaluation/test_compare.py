"""A comparison's runs can be read again, and its sentences say what its tables hold."""

import json
from functools import partial
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import InputError
from helpers.evaluation import comparison
from helpers.records import ROOT
from helpers.training import jobs, runs
from tests.fake_data import manifest_folder
from tests.training.short_run import NUMBERS

SIZE = 32


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    counts = {"train": 12, "valid": 4, "test": 8}
    return comparison.CompareConfig(
        data_path=str(manifest_folder(folder / "data", counts=counts)),
        backbone="timm:test_vit",  # six blocks of width 64
        weights="random",
        image_size=SIZE,
        adapted_blocks=3,
        methods=("head_only", "lora"),
        seeds=(0, 1),
        fractions=(0.5,),
        ranks=(1,),
        epochs=1,
        precision="fp32",
        device="cpu",
        **{f"{kind}_path": str(folder / kind) for kind in ("output", "history", "cache")},
    )


@pytest.fixture(scope="module")
def trained(config):
    """All runs in this process, since starting others takes longer than the training."""
    measured = []

    def alone(run_config, data, report):
        measured.append(run_config.name)
        runs.save_run(run_config, jobs.train(run_config, data, report))

    with mock.patch.object(jobs, "train_alone", alone):
        found = comparison.compare(config, report=lambda line: None)
    assert measured == [config.run(method, 0).name for method in config.methods]
    return found


def without_weights(config, folder):
    return config.model_copy(update={"output_path": str(folder / "nowhere")})


def test_a_run_that_is_read_is_the_run_that_was(config, trained):
    own = config.run("lora", 1)  # trained in this process
    kept, read = trained[own.name], runs.read_run(own)
    assert read.record == json.loads(json.dumps(kept.record))
    pd.testing.assert_frame_equal(read.history, kept.history, check_dtype=False, rtol=1e-8)
    numbers = ["p_no_tree", "p_tree"]
    texts = ["img_path", "group", "label", "target", "predicted"]
    assert read.predictions[texts].astype(str).equals(kept.predictions[texts].astype(str))
    np.testing.assert_array_equal(
        read.predictions[numbers].astype(np.float32), kept.predictions[numbers].astype(np.float32)
    )
    chips = torch.rand(2, 3, SIZE, SIZE) * 255
    with torch.inference_mode():
        expected = kept.classifier.eval()(chips)
        assert torch.equal(read.classifier(chips), expected)
        torch.testing.assert_close(read.adapter(chips), expected, atol=1e-4, rtol=1e-4)


def without_times(record):
    """What two equal runs have in common: without seconds, files that hold them, their sizes, and
    who was first to compute what runs share."""
    tokens = {
        k: v for k, v in (record.get("tokens") or {}).items() if k not in ("seconds", "was_read")
    }
    timed = ("features_per_second", "files", "bytes_to_keep")
    left = {k: v for k, v in record.items() if k not in timed}
    return left | {"tokens": tokens}


def test_side_by_side_on_ray_the_runs_are_those_of_one_after_the_other(
    config, trained, tmp_path, monkeypatch
):
    """Their main runs in processes of their own beside the workers, with an empty cache."""
    ray = pytest.importorskip("ray", reason="requirements-ray.txt is not installed")
    monkeypatch.setattr(ray, "init", partial(ray.init, num_cpus=2 * torch.get_num_threads()))
    monkeypatch.chdir(ROOT)  # workers import the project from where this process does
    places = {f"{kind}_path": str(tmp_path / kind) for kind in ("output", "history", "cache")}
    lines = []
    try:
        there = config.model_copy(update={"engine": "ray", **places})
        found = comparison.compare(there, report=lines.append)
    except ConnectionError as error:  # github.com/ray-project/ray/issues/65983
        if "cannot be started here" not in str(error):
            raise
        pytest.skip(f"Ray gives its helpers 15 s, and this machine is too busy: {error}")
    assert sum(line.startswith("2 runs side by side") for line in lines) == 1
    assert list(found) == list(trained)
    for name, run in found.items():
        expected = trained[name]
        assert without_times(run.record) == json.loads(json.dumps(without_times(expected.record)))
        pd.testing.assert_frame_equal(
            run.history[NUMBERS], expected.history[NUMBERS], check_dtype=False, rtol=1e-8
        )
        pd.testing.assert_frame_equal(run.predictions, expected.predictions)
        states = [r.classifier.state_dict() for r in (run, expected)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_without_ray_nothing_is_trained_on_it(config, monkeypatch):
    monkeypatch.setattr("helpers.cluster.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^engine: ray is not installed"):
        comparison.compare(config.model_copy(update={"engine": "ray", "data_path": "nowhere"}))


def test_bytes_to_keep_are_those_on_disk(config, trained):
    lora, head = (config.run(method, 0) for method in ("lora", "head_only"))
    on_disk = sum(file.stat().st_size for file in (lora.folder / "adapter").iterdir())
    assert trained[lora.name].record["bytes_to_keep"] == on_disk
    weights = trained[head.name].record["parameters"]["trainable"]
    assert trained[head.name].record["bytes_to_keep"] == 4 * weights


def test_resume_reads_what_is_finished_and_trains_the_rest(config, trained, monkeypatch, tmp_path):
    trained_now = []

    def train(run_config, data, report):
        trained_now.append(run_config.name)
        return trained[config.run("lora", 0).name]

    monkeypatch.setattr(jobs, "train", train)
    monkeypatch.setattr(jobs, "save_run", lambda run_config, run: None)
    lines = []
    more = config.model_copy(update={"resume": True, "seeds": (0, 1, 2)})
    again = comparison.compare(more, report=lines.append)
    assert trained_now == [more.run("head_only", 2).name, more.run("lora", 2).name]
    assert sum(line.endswith("finished before") for line in lines) == len(trained)
    tests = [comparison.paired_tests(comparison.main_runs(r, config)) for r in (trained, again)]
    pd.testing.assert_frame_equal(*tests)


def test_records_alone_give_the_same_tables(config, trained, tmp_path):
    gathered = runs.gather_predictions(trained.values(), f"{config.history_path}/report.parquet")
    read = comparison.read_runs(without_weights(config, tmp_path))
    gathered.unlink()
    assert all(run.classifier is None and run.adapter is None for run in read.values())
    old, new = (comparison.main_runs(found, config) for found in (trained, read))
    pd.testing.assert_frame_equal(comparison.cost_table(old), comparison.cost_table(new), rtol=1e-8)
    pd.testing.assert_frame_equal(comparison.paired_tests(old), comparison.paired_tests(new))
    pd.testing.assert_frame_equal(
        comparison.sweep_rows(trained, "auroc"), comparison.sweep_rows(read, "auroc")
    )


def test_runs_with_other_parameters_are_not_these_runs(config, trained):
    assert runs.read_run(config.run("lora", 0, lora_alpha=4)) is None
    with pytest.raises(
        InputError,
        match=r"history: no run compare_head_only_data_\S+_seed7 .*\(6 of 8 missing\)",
    ):
        comparison.read_runs(config.model_copy(update={"epochs": 2, "seeds": (0, 7)}))


def test_a_record_without_its_predictions_is_named(config, trained, tmp_path):
    run_config = config.run("lora", 0)
    nowhere = run_config.model_copy(update={"output_path": str(tmp_path)})
    with pytest.raises(InputError, match=r"predictions.parquet is missing, and no .parquet file"):
        runs.read_run(nowhere)


def test_files_of_two_runs_are_not_read_as_one(config, trained, tmp_path):
    """As if a second run was killed after its weights were published over a finished one's."""
    places = {f"{kind}_path": str(tmp_path / kind) for kind in ("output", "history")}
    first, second = (config.run("lora", seed) for seed in (0, 1))
    copies = [c.model_copy(update=places | {"run_name": "same"}) for c in (first, second)]
    runs.save_run(copies[0], trained[first.name])
    for name in ("model_final.safetensors", "adapter/adapter_model.safetensors"):
        whole = (copies[0].folder / name).read_bytes()
        (copies[0].folder / name).write_bytes((second.folder / name).read_bytes())
        with pytest.raises(InputError, match=r"is not the one that .*same.json was written with"):
            runs.read_run(copies[0])
        (copies[0].folder / name).write_bytes(whole)
    assert runs.read_run(copies[0]) is not None


def test_sweeps_keep_to_their_seeds_and_share_the_common_shape(config, trained):
    by_size = comparison.by_training_chips(trained, config, "auroc")
    assert set(by_size.seed) == {0} and len(by_size) == 4
    assert set(by_size.train_chips) == {12, 24}
    shapes = comparison.by_shape(trained, config, "auroc")
    found = shapes.groupby("method")["rank"].apply(list).to_dict()
    assert found == {"LoRA on qkv in 3 blocks": [4, 1], "LoRA on qkv in all blocks": [4]}


def test_the_last_blocks_stand_beside_all_of_them(config, trained):
    pairs = comparison.block_runs(trained, config)
    assert list(pairs) == [("LoRA in the last 3 blocks", 0), ("LoRA in all blocks", 0)]
    counts = [run.record["parameters"]["lora"] for run in pairs.values()]
    assert counts[1] == 2 * counts[0]
    assert not comparison.block_runs(trained, config.model_copy(update={"block_counts": ()}))
