"""Saved classifiers come back bit for bit; files from elsewhere are refused in one line."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.deployment.runtimes import Variant, load
from helpers.models import files
from helpers.models.adapters import AdapterSettings, add_adapter, save_adapter
from helpers.models.backbones import weights_digest
from helpers.models.classifier import create_classifier
from helpers.models.files import load_classifier, load_model, save_classifier
from tests.models.common import example_config, random_chips, refusal
from tests.models.parity import TINY, published, tiny_architectures, tiny_classifier

# What load_model wants to know of a classifier's past, with the paths that a run was given.
PROVENANCE = {
    "run": "head_only_chips_seed0",
    "backbone": "ViT-Ti/14, random weights",
    "config": {
        "data_path": "/home/somebody/secret/chips",
        "output_path": "/mnt/results/",
        "weights": "../shared/backbone.pth",
        "run_name": None,
    },
    "classifier": {"weights": "../shared/backbone.pth", "image_size": 98},
}


@pytest.fixture(scope="module")
def example():
    """A classifier on the example's architecture with random weights."""
    return create_classifier(example_config()).eval()


@pytest.fixture(scope="module")
def saved(example, tmp_path_factory):
    """The same in a file; not to be changed."""
    path = tmp_path_factory.mktemp("saved") / "model_final.safetensors"
    return save_classifier(example, path, {"data": "chips", "epochs": 3})


@torch.inference_mode()
def test_a_saved_classifier_comes_back_bit_for_bit(example, saved):
    loaded, provenance = load_classifier(saved)
    chips = random_chips()
    assert torch.equal(loaded(chips), example(chips))
    assert loaded.config == example.config
    assert provenance == {"data": "chips", "epochs": 3}
    assert not loaded.training
    assert weights_digest(loaded) == weights_digest(example)


@torch.inference_mode()
def test_bands_and_statistics_come_back(tmp_path):
    config = example_config(bands=(3, 0), mean=(0.1, 700.5), std=(1 / 3, 2.0))
    classifier = create_classifier(config).eval()
    loaded, _ = load_classifier(save_classifier(classifier, tmp_path / "two.safetensors", {}))
    chips = 1000 * torch.rand(2, 2, 98, 98)
    assert loaded.config == config
    assert torch.equal(loaded(chips), classifier(chips))


def test_a_saved_classifier_is_tensors_and_json(example, saved):
    content = saved.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert header.keys() == example.state_dict().keys()
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(content) - 8 - length
    assert metadata.keys() == {"format", "config", "provenance"}
    assert json.loads(metadata["config"]) == json.loads(json.dumps(asdict(example.config)))


def test_a_failed_save_leaves_the_old_file_and_nothing_else(monkeypatch, tmp_path):
    path = save_classifier(tiny_classifier(), tmp_path / "model.safetensors", {})
    before = path.read_bytes()

    def full_disk(state, part, metadata):
        part.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_classifier(tiny_classifier(), path, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def rewritten(saved, path, state=None, **metadata):
    """A copy of a saved classifier with other tensors or metadata."""
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata() | metadata
    save_file(load_file(saved) if state is None else state, path, metadata=metadata)
    return path


def test_a_classifier_file_that_is_missing(tmp_path):
    message = refusal(load_classifier, tmp_path / "model_final.safetensors")
    assert f"no such file: {tmp_path / 'model_final.safetensors'}" in message


def test_a_truncated_classifier_file(saved, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(saved.read_bytes()[:-4])
    assert f"{path} is truncated" in refusal(load_classifier, path)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_file_without_a_configuration(name, tmp_path):
    path = tmp_path / name
    save = save_file if path.suffix == ".safetensors" else torch.save
    save(published("dinov2"), path)
    message = refusal(load_classifier, path)
    assert message.startswith(f"{path}: not a classifier saved by this project")
    assert message.endswith("pass the model_final.safetensors of a run")


CONFIG = json.loads(json.dumps(asdict(example_config())))
WRONG_CONFIGS = {
    "no JSON": "{'backbone': 'example'}",
    "not a mapping": [],
    "no fields": {},
    "an unknown field": CONFIG | {"dropout": 0.1},
    "an unknown backbone": CONFIG | {"backbone": "vit"},
    "a size in words": CONFIG | {"image_size": "98"},
    "a mean in words": CONFIG | {"mean": ["1", "2", "3"]},
    "no mean": CONFIG | {"mean": 3},
    "a mean that is no number": CONFIG | {"mean": [1, 2, float("nan")]},
    "bands in words": CONFIG | {"bands": ["0", "1", "2"]},
    "classes that are numbers": CONFIG | {"classes": [0, 1]},
    "a backbone that is a list": CONFIG | {"backbone": ["example"]},
    "a backbone of somebody's": CONFIG | {"backbone": "<img src=x onerror=alert(6)>"},
    "a path for a backbone": CONFIG | {"backbone": "timm:../../vit"},
    "a deep nest": "[" * 100_000,
    "null": None,
}


WRONG_PROVENANCES = {
    "no JSON": "yesterday",
    "null": "null",
    "a list": "[]",
    "a deep nest": '{"run": ' + "[" * 100_000,
    "a run outside": json.dumps(PROVENANCE | {"run": "../../../elsewhere"}),
    "a run that is no text": json.dumps(PROVENANCE | {"run": 3}),
    "empty": "{}",
    "no backbone": json.dumps({k: v for k, v in PROVENANCE.items() if k != "backbone"}),
    "a config that is a list": json.dumps(PROVENANCE | {"config": []}),
}


@pytest.mark.parametrize("case", WRONG_PROVENANCES)
def test_a_file_with_an_odd_provenance(case, saved, tmp_path):
    path = tmp_path / "model.safetensors"
    rewritten(saved, path, provenance=WRONG_PROVENANCES[case])
    message = refusal(load_model, path)
    assert message.startswith(f"{path}: ")
    assert len(message) < 500


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_file_with_a_damaged_configuration(case, saved, tmp_path):
    config = WRONG_CONFIGS[case]
    text = config if isinstance(config, str) else json.dumps(config)
    path = rewritten(saved, tmp_path / "model.safetensors", config=text)
    message = refusal(load_classifier, path)
    assert message.startswith(f"{path}: not a classifier saved by this project")
    assert message.endswith("pass the model_final.safetensors of a run")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, saved, tmp_path):
    state = load_file(saved)
    state["backbone.norm.weight"][3] = value
    message = refusal(load_classifier, rewritten(saved, tmp_path / "x.safetensors", state))
    assert "weights that are not finite numbers: backbone.norm.weight" in message


def test_no_path_of_the_machine_travels(tmp_path):
    classifier = tiny_classifier()
    classifier.config = replace(classifier.config, weights="/home/somebody/backbone.pth")
    path = save_classifier(classifier, tmp_path / "model.safetensors", PROVENANCE)
    with safe_open(path, framework="pt") as file:
        text = json.dumps(file.metadata())
    assert not any(word in text for word in ("somebody", "secret", "/mnt", "../", "shared"))
    with safe_open(path, framework="pt") as file:
        provenance = json.loads(file.metadata()["provenance"])
    assert provenance["config"] == {
        "data_path": "chips",
        "output_path": "results",
        "weights": "backbone.pth",
        "run_name": None,
    }
    assert provenance["classifier"]["weights"] == "backbone.pth"


@pytest.mark.parametrize("model", TINY)
@torch.inference_mode()
def test_a_saved_classifier_of_any_family_is_the_one_that_was(model, tmp_path):
    """From its own file, and from the weights of a deployed variant (DINOv3's periods included)."""
    classifier = tiny_classifier(None, model)
    if model == "dinov3":
        classifier.backbone.rope.periods.mul_(1.5)
    chips = random_chips(size=classifier.config.image_size)
    path = save_classifier(classifier, tmp_path / "model.safetensors", {})
    with tiny_architectures():
        loaded, _ = load_classifier(path)
        assert torch.equal(loaded(chips), classifier(chips))
        if model in ("dinov2", "dinov2_reg4", "dinov3", "timm_eva"):
            options = {"classifier": asdict(classifier.config)}
            variant = Variant("eager", "", "torch", tmp_path, (path.name,), options)
            answer = load(variant, threads=1)(chips.numpy())
            assert torch.equal(torch.from_numpy(answer), classifier(chips))


def test_load_model_takes_files_and_adapter_folders(tmp_path):
    classifier = create_classifier(example_config(image_size=28, seed=3)).eval()
    path = save_classifier(classifier, tmp_path / "model_final.safetensors", PROVENANCE)
    model, provenance, adapter = load_model(path)
    assert weights_digest(model) == weights_digest(classifier) and adapter is None
    assert provenance["run"] == PROVENANCE["run"]

    adapted = add_adapter(create_classifier(example_config(image_size=28, seed=3)), LORA).eval()
    digest = weights_digest(classifier.backbone)
    folder = save_adapter(adapted, tmp_path / "elsewhere", digest, PROVENANCE)
    model, alone, adapter = load_model(folder)
    assert alone == provenance
    chips = random_chips(size=28)
    with torch.inference_mode():
        torch.testing.assert_close(model(chips), adapter(chips))
        assert torch.equal(adapter(chips), adapted(chips))

    message = refusal(load_model, tmp_path / "nothing")
    assert message.startswith("model_path: no such file or folder: ")


LORA = AdapterSettings()


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"classes": ("a", "b", "c")}, "linear_head.weight (2, 192) in place of (3, 192)"),
        (
            {"bands": (0,), "mean": (1.0,), "std": (1.0,)},
            "backbone.patch_embed.proj.weight (192, 3, 14, 14) in place of (192, 1, 14, 14)",
        ),
        ({"image_size": 112}, "backbone.pos_embed (1, 50, 192) in place of (1, 65, 192)"),
        ({"head_input": "cls+mean"}, "linear_head.weight (2, 192) in place of (2, 384)"),
    ],
)
def test_a_configuration_that_is_not_the_weights(changes, expected, saved, tmp_path):
    config = json.dumps(asdict(example_config(**changes)))
    path = rewritten(saved, tmp_path / "model.safetensors", config=config)
    message = refusal(load_classifier, path)
    assert message.startswith(f"{path}: these weights are not of this architecture; of another")
    assert expected in message


def test_other_weights_under_a_right_configuration(saved, tmp_path):
    state = load_file(saved)
    state["backbone.head.weight"] = state.pop("linear_head.weight")
    message = refusal(load_classifier, rewritten(saved, tmp_path / "x.safetensors", state))
    assert "missing: linear_head.weight; unexpected: backbone.head.weight" in message
