"""The model card of a run, without a network: what it says, and that the hub's library reads it."""

import math

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_eval_result

from helpers.training.card import model_card, shareable
from tests.fake_run import RECORD


def card_of(file="model_final.safetensors", backbone="example", weights="pretrained", **changes):
    config = RECORD["config"] | {"backbone": backbone, "weights": weights}
    return model_card(shareable(RECORD | {"config": config} | changes), file)


def test_metadata_survive_the_hubs_own_reading():
    written = card_of()
    read = ModelCard(str(written)).data
    assert read.to_dict() == written.data.to_dict()
    assert read.model_name == RECORD["run"] and read.license == "unknown"
    values = {result.metric_type: result.metric_value for result in read.eval_results}
    assert values == {name: entry["value"] for name, entry in RECORD["test"].items()}
    for result in read.eval_results:
        assert (result.dataset_name, result.dataset_split) == ("example", "test")
    # What the hub's library makes of one metric has the same shape.
    (model,) = metadata_eval_result(
        model_pretty_name=RECORD["run"], task_pretty_name="", task_id="image-classification",
        metrics_pretty_name="", metrics_id="accuracy", metrics_value=values["accuracy"],
        dataset_pretty_name="example", dataset_id="example", dataset_split="test",
    )["model-index"]  # fmt: skip
    (ours,) = written.data.to_dict()["model-index"]
    assert ours["name"] == model["name"]
    assert ours["results"][0]["dataset"] == model["results"][0]["dataset"]


def test_a_metric_without_a_value_is_left_out():
    test = RECORD["test"] | {"auroc": RECORD["test"]["auroc"] | {"value": math.nan}}
    names = {result.metric_type for result in card_of(test=test).data.eval_results}
    assert names == set(test) - {"auroc"}


@pytest.mark.parametrize(
    "backbone, weights, base, says",
    [
        ("example", "pretrained", None, "not Meta's DINOv2"),
        ("dinov2_vits14", "pretrained", "timm/vit_small_patch14_dinov2.lvd142m", "LVD-142M"),
        ("dinov2_vits14", "random", None, "pretrained on: nothing"),
        ("dinov2_vits14", "/home/me/mine.pth", None, "what mine.pth was"),
        ("timm:vit_small_patch14_dinov2.lvd142m", "pretrained",
         "timm/vit_small_patch14_dinov2.lvd142m", "lvd142m"),
    ],
)  # fmt: skip
def test_base_model_and_weights_are_named_truthfully(backbone, weights, base, says):
    licence = None if weights == "random" else RECORD["licence"]
    card = card_of(backbone=backbone, weights=weights, licence=licence)
    assert card.data.base_model == base
    assert says in card.text and "/home" not in card.content
    assert ("if they are the published ones" in card.text) == (weights == "/home/me/mine.pth")
    assert ("not Meta's DINOv2" in card.text) == (backbone == "example")


def test_the_text_says_what_was_measured_and_how_to_load_it():
    text = card_of("adapter").text
    accuracy = RECORD["test"]["accuracy"]
    ends = [f"{accuracy[name]:.3f}" for name in ("value", "low", "high", "group_low", "group_high")]
    assert "| accuracy | {} [{}, {}] ({} to {}) |".format(*ends) in text
    assert 'load_model("adapter")' in text and "--model_path adapter " in text
    assert "253 train, 104 valid, 161 test" in text and "`no_tree`, `tree`" in text
    assert "The positive class is `tree`." in text


def test_limits_follow_from_the_record():
    plain = {
        name: {key: value for key, value in entry.items() if not key.startswith("group_")}
        for name, entry in RECORD["test"].items()
    }
    text = card_of(
        test=plain,
        leaks=["12 chips share a group with a chip of another split, e.g. secret/a.png (train)"],
        skipped=[{"img_path": "secret/b.png", "reason": "damaged"}],
        failure="no better than chance",
    ).text
    assert "name no groups" in text and "whole groups" not in text
    assert "Leak in the data: 12 chips share a group with a chip of another split." in text
    assert "1 files of the data" in text and "failed**: no better than chance" in text
    assert "secret" not in text
    assert "Leak" not in card_of().text and "failed" not in card_of().text
