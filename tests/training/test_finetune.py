import json
import runpy
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.metrics import METRICS
from helpers.models.files import load_classifier
from helpers.training import jobs, methods, runs
from helpers.training.progress import HISTORY_COLUMNS
from tests.fake_data import class_folders, manifest_folder
from tests.training import short_run


def config_for(folder, **parameters):
    """A head-only run on chips of 28 px, everything below one folder."""
    defaults = {"method": "head_only", "backbone": "example", "image_size": 28, "epochs": 15,
                "patience": None, "batch_size": None, "learning_rates": (1e-3, 1e-2),
                "weight_decays": 0.0}  # fmt: skip
    return short_run.config_for(folder / "data", folder, **defaults | parameters)


def train(config, report=lambda line: None):
    return methods.train_head_only(config, config.data(), report)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished and saved run: config, run, files."""
    folder = tmp_path_factory.mktemp("run")
    manifest_folder(folder / "data", counts={"train": 20, "valid": 8, "test": 8})
    config = config_for(folder)
    run, _ = jobs.finished(config, config.data(), report=lambda line: None)
    return config, run, runs.saved_files(config)


def test_the_record_holds_what_a_reader_needs(finished):
    config, run, _ = finished
    record = run.record
    assert record["backbone"] == "ViT-Ti/14, random weights"
    assert record["chips"] == {"train": 40, "valid": 16, "test": 16}
    assert record["config"]["learning_rates"] == [1e-3, 1e-2]
    assert record["parameters"]["trainable"] == run.classifier.linear_head.in_features * 2 + 2
    assert record["best_epoch"] <= record["epochs_trained"] <= config.epochs
    assert record["config"]["device"] == "cpu" and record["config"]["precision"] == "fp32"
    assert set(record["test"]) == set(record["valid"]) == set(METRICS)
    for entry in record["test"].values():
        assert entry["low"] <= entry["value"] <= entry["high"]
        assert entry["group_low"] <= entry["group_high"]
    assert np.sum(record["confusion_matrix"]) == 16


def test_the_files_agree_with_the_run(finished):
    _, run, files = finished
    weights, card, predictions, history, record = files
    assert (weights.name, card.name) == ("model_final.safetensors", "README.md")
    assert tuple(pd.read_csv(history).columns) == HISTORY_COLUMNS
    assert len(run.candidates) == 3 * 2 * 1
    assert json.loads(record.read_text()) == json.loads(json.dumps(run.record))
    table = pd.read_parquet(predictions)
    assert table.split.value_counts().to_dict() == {"valid": 16, "test": 16}
    assert (table.filter(regex="^p_").dtypes == np.float32).all()
    np.testing.assert_allclose(table.filter(regex="^p_").sum(axis=1), 1, atol=1e-5)
    for split in ("valid", "test"):
        rows = table[table.split == split]
        accuracy = (rows.predicted == rows.target).mean()
        assert accuracy == pytest.approx(run.record[split]["accuracy"]["value"])


def test_the_saved_classifier_gives_the_predictions_of_the_record(finished):
    config, run, files = finished
    classifier, provenance = load_classifier(files[0])
    assert provenance["run"] == "trial"
    test_set = config.data().dataset("test", classifier.config.image_size)
    chips = torch.stack([chip for chip, _ in test_set])
    with torch.inference_mode():
        probabilities = classifier(chips).softmax(1)
    expected = run.test_predictions.filter(regex="^p_").to_numpy()
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_what_goes_with_the_weights_names_no_chip_and_no_folder(finished, tmp_path):
    config, run, _ = finished
    said = {
        "leaks": ["2 chips share a file with a chip of another split, e.g. secret/a.png (train)"],
        "skipped": [{"img_path": "secret/b.png", "reason": "damaged"}],
    }
    elsewhere = config.model_copy(
        update={"output_path": str(tmp_path / "m"), "history_path": str(tmp_path / "h")}
    )
    runs.save_run(elsewhere, replace(run, record=run.record | said))
    for name in ("model_final.safetensors", "README.md"):
        content = (elsewhere.folder / name).read_bytes()
        assert b"2 chips share a file" in content and b"secret" not in content
        assert config.data_path.encode() not in content and str(tmp_path).encode() not in content
    assert "secret/a.png" in (tmp_path / "h" / "trial.json").read_text()


def test_a_card_that_a_person_went_on_with_is_still_of_its_run(finished):
    config, _, files = finished
    card = files[1]
    before = card.read_text()
    card.write_text(before + "mine\n")
    try:
        assert runs.read_run(config.resolved()).record["run"] == "trial"
    finally:
        card.write_text(before)


def test_the_second_run_reads_features_and_gives_the_same(finished):
    config, run, _ = finished
    lines = []
    again = train(config, lines.append)
    assert lines[0].endswith("read from the cache")
    pd.testing.assert_frame_equal(again.predictions, run.predictions)
    columns = ["train_loss", "valid_loss", "valid_auroc"]
    pd.testing.assert_frame_equal(again.history[columns], run.history[columns])


def test_nothing_is_seen_of_the_test_split_before_the_head_is_chosen(finished, monkeypatch):
    config, _, _ = finished
    order = []
    features, fit_heads = methods.split_features, methods.fit_heads
    monkeypatch.setattr(methods, "split_features", lambda *a: (order.append(a[3]), features(*a))[1])
    monkeypatch.setattr(
        methods, "fit_heads", lambda *a, **k: (order.append("fit"), fit_heads(*a, **k))[1]
    )
    train(config)
    assert order == ["train", "valid", "fit", "test"]


def test_more_than_two_classes_and_four_float_bands(tmp_path):
    class_folders(
        tmp_path / "data", per_class=15, classes=("a", "b", "c"), bands=4, suffix=".npy",
        dtype="float32",
    )  # fmt: skip
    config = config_for(tmp_path, bands=(3, 0, 1, 2), augment=True, epochs=5)
    run = train(config)
    assert run.classifier.config.bands == (3, 0, 1, 2)
    assert len(run.classifier.config.mean) == 4
    assert list(run.predictions.filter(regex="^p_")) == ["p_a", "p_b", "p_c"]
    assert np.isfinite(run.record["test"]["auroc"]["value"])


def test_the_command_line_trains_and_prints_the_test_table(finished, tmp_path, monkeypatch, capsys):
    config, run, _ = finished
    arguments = [
        "finetune", "--data_path", config.data_path, "--output_path", tmp_path / "models",
        "--cache_path", config.cache_path, "--weights", "random",
        "--image_size", 28, "--epochs", 15, "--learning_rates", 1e-3, 1e-2, "--weight_decays", 0,
        "--device", "cpu", "--run_name", "trial",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    monkeypatch.delitem(sys.modules, "helpers.finetune", raising=False)
    runpy.run_module("helpers.finetune", run_name="__main__")  # as `python -m` does
    printed = capsys.readouterr().out
    assert "colour statistics" in printed and "ViT-Ti/14, random weights" in printed
    written = json.loads((tmp_path / "models/training_history/trial.json").read_text())
    assert written["test"] == run.record["test"]
    assert (tmp_path / "models" / "trial" / "model_final.safetensors").is_file()
