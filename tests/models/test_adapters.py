"""LoRA and DoRA around a classifier: parameters, shapes, files, merging."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from helpers import InputError
from helpers.evaluation import inspection
from helpers.models import adapters
from helpers.models.adapters import AdapterSettings
from helpers.models.backbones import build_backbone
from helpers.models.classifier import Classifier, ClassifierConfig, create_classifier
from helpers.models.export import count_parameters, module_tree
from helpers.models.files import load_classifier, save_classifier

CONFIG = ClassifierConfig("example", "pretrained", 28, (0, 1, 2), ("a", "b"), "cls+mean")


def fresh():
    torch.manual_seed(0)
    return create_classifier(CONFIG)


def adapted(seed=0, **settings):
    """An adapter whose every trainable value has moved away from its start, in eval mode."""
    model = adapters.add_adapter(fresh(), AdapterSettings(**settings))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.05 * noise
    return model.eval()


def chips(n=4):
    shape = (n, 3, 28, 28)
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1)).byte()


@torch.inference_mode()
def logits(model):
    return model.eval()(chips())


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def model(request):
    return adapted(dora=request.param)


def test_the_reference_shape_has_the_published_number_of_parameters():
    config = ClassifierConfig("dinov2_vitl14", "random", 196, (0, 1, 2), ("a", "b"))
    with torch.device("meta"):
        for dora in (False, True):
            classifier = Classifier(config, build_backbone("dinov2_vitl14", 196))
            model = adapters.add_adapter(classifier, AdapterSettings(dora=dora))
            parts = adapters.adapter_parameters(model)
            assert (parts["lora"], parts["head"]) == (393_216, 2_050)
            assert parts["magnitude"] == (73_728 if dora else 0)
            trainable = count_parameters(model)["trainable"]
            assert trainable == sum(parts.values())
    qkv = model.get_base_model().backbone.blocks[23].attn.qkv
    assert qkv.lora_A["default"].weight.shape == (4, 1024)
    assert qkv.lora_B["default"].weight.shape == (3072, 4)
    head = model.get_base_model().linear_head
    assert type(head).__name__ == "ModulesToSaveWrapper"
    assert head.modules_to_save["default"].weight.shape == (2, 1024)
    assert "24 x Block(" in module_tree(model)


def test_a_new_lora_changes_nothing_yet():
    expected = logits(fresh())
    torch.testing.assert_close(logits(adapters.add_adapter(fresh(), AdapterSettings())), expected)


def test_targets_name_any_linear_layer_of_the_blocks():
    model = adapters.add_adapter(fresh(), AdapterSettings(targets=("proj", "fc1", "fc2")))
    block = model.get_base_model().backbone.blocks[0]
    adapted_layers = (block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    assert all(hasattr(layer, "lora_A") for layer in adapted_layers)
    assert not hasattr(block.attn.qkv, "lora_A")
    stem = model.get_base_model().backbone.patch_embed.proj
    assert type(stem) is nn.Conv2d, "the patch embedding is called proj too, but is no target"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "lora_rank: 0 is below 1"),
        ({"targets": ("query",)}, r"lora_targets: \['query'\] names no .* fc1, fc2, proj, qkv"),
        ({"targets": ()}, "lora_targets: nothing names no linear layer"),
    ],
)
def test_wrong_settings_are_one_clear_error(settings, message):
    with pytest.raises(InputError, match=message):
        adapters.add_adapter(fresh(), AdapterSettings(**settings))


def test_saved_loaded_merged_and_unmerged_agree(model, tmp_path):
    expected = logits(model)
    folder = adapters.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(adapters.load_adapter(folder)), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh(), str(folder))), expected)
    merged = adapters.merge_adapter(adapters.transfer_adapter(model, fresh()))
    assert type(merged) is Classifier
    assert (logits(merged) - expected).abs().max() < 1e-5
    path = save_classifier(merged, tmp_path / "model.safetensors", {})
    assert torch.equal(logits(load_classifier(path)[0]), logits(merged))
    assert (expected - logits(fresh())).abs().max() > 1e-3, "the adapter must do something"


def test_the_adapter_folder_holds_safetensors_with_the_head(model, tmp_path):
    folder = adapters.save_adapter(model, tmp_path / "adapter")
    names = {"adapter_config.json", "adapter_model.safetensors", "classifier.json"}
    assert {path.name for path in folder.iterdir()} == names
    keys = load_file(folder / "adapter_model.safetensors").keys()
    assert any("linear_head.weight" in key for key in keys)
    assert not any("base_layer" in key for key in keys)


def test_a_failed_save_leaves_the_old_adapter(model, tmp_path, monkeypatch):
    folder = adapters.save_adapter(model, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(adapters, "base_digest", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapters.save_adapter(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_merging_low_precision_is_refused(model):
    with pytest.raises(ValueError, match="merge in fp32"):
        adapters.merge_adapter(adapters.transfer_adapter(model, fresh()).bfloat16())


def test_an_adapter_of_another_base_is_refused(model, tmp_path):
    folder = adapters.save_adapter(model, tmp_path / "adapter")
    record = json.loads((folder / "classifier.json").read_text())
    record["base_digest"] = "0" * 16
    (folder / "classifier.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="was trained on other weights than those of example"):
        adapters.load_adapter(folder)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("classifier.json", None, "not an adapter folder of this project"),
        ("classifier.json", b"{", "not an adapter folder of this project"),
        ("adapter_model.safetensors", b"short", "PEFT's files are damaged or missing"),
        ("adapter_config.json", b"{", "PEFT's files are damaged or missing"),
    ],
)
def test_damaged_adapter_folders_are_one_clear_error(model, tmp_path, name, damage, message):
    folder = adapters.save_adapter(model, tmp_path / "adapter")
    if damage is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(damage)
    with pytest.raises(InputError, match=message):
        adapters.load_adapter(folder)


def test_weight_changes_are_the_scaled_product_over_the_weight():
    settings = {"rank": 2, "alpha": 6.0}
    model = adapted(**settings)
    qkv = model.get_base_model().backbone.blocks[3].attn.qkv
    update = qkv.lora_B["default"].weight @ qkv.lora_A["default"].weight * 6 / 2
    expected = float((update.norm() / qkv.base_layer.weight.norm()).detach())
    merged = adapters.merge_adapter(adapters.transfer_adapter(model, fresh()))
    table = inspection.weight_changes(fresh(), merged).set_index(["block", "layer"]).relative_change
    assert table[3, "attn.qkv"] == pytest.approx(expected, rel=1e-4)
    assert (table[:, "mlp.fc1"] == 0).all()
