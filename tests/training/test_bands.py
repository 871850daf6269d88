"""Training on chips of more than three bands: what the stem begins with, and whether it moves."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from helpers import InputError
from helpers.models.backbones import build_backbone
from helpers.training import methods
from helpers.training.runs import read_run, starting_digest
from helpers.training.setup import new_classifier
from tests.fake_data import manifest_folder
from tests.training.short_run import NUMBERS, config_for, run


@pytest.fixture(scope="module")
def chips_folder(tmp_path_factory):
    folder, counts = tmp_path_factory.mktemp("data"), {"train": 8, "valid": 4, "test": 4}
    return manifest_folder(folder, counts=counts, bands=5, suffix=".tif")


def stem_of(classifier):
    return classifier.backbone.patch_embed.proj.weight


def config_of(chips_folder, folder, **changes):
    defaults = {"bands": (0, 1, 2, 3, 4), "epochs": 2, "learning_rate": 1e-2}
    return config_for(chips_folder, folder, **defaults | changes)


@pytest.mark.parametrize(("stem", "trained"), [(None, 0), ("trained", 1), ("new", 1)])
def test_the_stem_moves_where_it_is_trained_and_the_run_can_be_read(
    stem, trained, chips_folder, tmp_path
):
    config = config_of(chips_folder, tmp_path, stem=stem)
    done = run(config)
    before, after = stem_of(new_classifier(config, config.data())), stem_of(done.classifier)
    assert torch.equal(before, after) == (not trained)
    assert done.record["parameters"].get("stem", 0) == trained * (64 * 5 * 16 * 16 + 64)
    assert torch.equal(stem_of(read_run(config).classifier), after)
    assert done.record["classifier"]["new_stem"] == (stem == "new")


def test_a_new_stem_goes_on_from_a_checkpoint(chips_folder, tmp_path):
    config = config_of(chips_folder, tmp_path, stem="new")
    data = config.data()
    first = methods.train(config, data, report=lambda line: None)
    going_on = methods.train(config.model_copy(update={"resume": True}), data, lambda line: None)
    pd.testing.assert_frame_equal(first.history[NUMBERS], going_on.history[NUMBERS])
    assert torch.equal(stem_of(first.classifier), stem_of(going_on.classifier))


def test_a_run_starts_from_the_weights_that_its_record_is_compared_with(chips_folder, tmp_path):
    """A stem of before training comes from the file and, where it is new, from the seed."""
    torch.manual_seed(9)
    save_file(build_backbone("timm:test_vit", 32).state_dict(), tmp_path / "rgb.safetensors")
    weights, digests = str(tmp_path / "rgb.safetensors"), {}
    for stem, seed in ((None, 0), (None, 1), ("trained", 0), ("new", 0), ("new", 1)):
        config = config_of(chips_folder, tmp_path, weights=weights, stem=stem, seed=seed)
        data = config.data()
        digests[stem, seed] = methods.training_setup(config, data)[2]
        assert starting_digest(config, data) == digests[stem, seed]
    repeated, new = digests[None, 0], digests["new", 0]
    assert digests[None, 1] == digests["trained", 0] == repeated
    assert len({repeated, new, digests["new", 1]}) == 3


def test_a_run_of_before_there_was_a_choice_is_the_same_run(chips_folder, tmp_path):
    config = config_of(chips_folder, tmp_path)
    run(config)
    path = Path(config.history_path) / f"{config.name}.json"
    record = json.loads(path.read_text())
    assert record["config"].pop("stem", "missing") is None
    path.write_text(json.dumps(record))
    resumed = config.model_copy(update={"resume": True})
    assert read_run(resumed) is not None
    with pytest.raises(InputError, match="stem was None and is 'new'"):
        run(config_of(chips_folder, tmp_path, stem="new"))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"method": "head_only", "stem": "trained"}, "stem: head_only trains no stem; use lora"),
        ({"adapted_blocks": 2, "stem": "new"}, "stem: tokens of frozen blocks are kept as a"),
        ({"stem": "repeated"}, "stem: "),
    ],
)
def test_a_stem_that_cannot_be_trained_is_one_clear_error(
    parameters, message, chips_folder, tmp_path
):
    with pytest.raises(InputError, match=message):
        run(config_of(chips_folder, tmp_path, **parameters))
    assert list(tmp_path.iterdir()) == []
