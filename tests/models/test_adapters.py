"""Adapters around a classifier: parameters, shapes, files, merging."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from helpers import InputError
from helpers.evaluation import inspection
from helpers.models import adapters
from helpers.models.adapters import AdapterSettings
from helpers.models.backbones import build_backbone, weights_digest
from helpers.models.classifier import Classifier, ClassifierConfig, create_classifier
from helpers.models.export import count_parameters, module_tree
from helpers.models.files import load_classifier, save_classifier
from tests.models.common import moved, random_chips, refusal
from tests.models.parity import TINY, empty_backbone, tiny_classifier

CONFIG = ClassifierConfig("example", "pretrained", 28, (0, 1, 2), ("a", "b"), "cls+mean")


def fresh():
    torch.manual_seed(0)
    return create_classifier(CONFIG)


def adapted(**settings):
    return moved(adapters.add_adapter(fresh(), AdapterSettings(**settings)), 0.05)


@torch.inference_mode()
def logits(model):
    return model.eval()(random_chips(4, size=28))


def saved(model, folder, provenance=None, config=CONFIG):
    digest = weights_digest(create_classifier(config).backbone)
    return adapters.save_adapter(model, folder, digest, provenance)


@pytest.fixture(scope="module", params=adapters.PEFT_METHODS)
def model(request):
    return adapted(method=request.param)


@pytest.fixture(scope="module")
def lora():
    return adapted()


def test_the_reference_shape_has_the_published_number_of_parameters():
    config = ClassifierConfig("dinov2_vitl14", "random", 196, (0, 1, 2), ("a", "b"))
    with torch.device("meta"):
        for method in ("lora", "dora"):
            classifier = Classifier(config, build_backbone("dinov2_vitl14", 196))
            model = adapters.add_adapter(classifier, AdapterSettings(method=method))
            parts = adapters.adapter_parameters(model)
            assert (parts["lora"], parts["head"]) == (393_216, 2_050)
            assert parts["magnitude"] == (73_728 if method == "dora" else 0)
            trainable = count_parameters(model)["trainable"]
            assert trainable == sum(parts.values())
    qkv = model.get_base_model().backbone.blocks[23].attn.qkv
    assert qkv.lora_A["default"].weight.shape == (4, 1024)
    assert qkv.lora_B["default"].weight.shape == (3072, 4)
    head = model.get_base_model().linear_head
    assert type(head).__name__ == "ModulesToSaveWrapper"
    assert head.modules_to_save["default"].weight.shape == (2, 1024)
    assert "24 x Block(" in module_tree(model)


@pytest.mark.parametrize("method", adapters.PEFT_METHODS)
def test_a_new_adapter_changes_nothing_yet(method):
    model = adapters.add_adapter(fresh(), AdapterSettings(method=method))
    torch.testing.assert_close(logits(model), logits(fresh()))


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
        ({"rank": 0}, "lora_rank: 0 is not between 1 and 192"),
        ({"rank": 1_000_000}, "lora_rank: 1000000 is not between 1 and 192"),
        ({"method": "vera"}, "method: 'vera' is none of lora, dora"),
        ({"targets": ("(a|aa)+$",)}, "names no linear layer of the blocks"),
        ({"targets": tuple(map(str, range(200_000)))}, r"\['0', '1', '10', '100'\] names no"),
        ({"targets": ("query",)}, r"lora_targets: \['query'\] names no .* fc1, fc2, proj, qkv"),
        ({"targets": ()}, "lora_targets: nothing names no linear layer"),
    ],
)
def test_wrong_settings_are_one_clear_error(settings, message):
    with pytest.raises(InputError, match=message):
        adapters.add_adapter(fresh(), AdapterSettings(**settings))


def test_saved_loaded_merged_and_unmerged_agree(model, tmp_path):
    expected = logits(model)
    folder = saved(model, tmp_path / "adapter")
    assert torch.equal(logits(adapters.load_adapter(folder)[0]), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh(), str(folder))), expected)
    merged = adapters.merge_adapter(adapters.transfer_adapter(model, fresh()))
    assert type(merged) is Classifier
    assert (logits(merged) - expected).abs().max() < 1e-5
    path = save_classifier(merged, tmp_path / "model.safetensors", {})
    assert torch.equal(logits(load_classifier(path)[0]), logits(merged))
    assert (expected - logits(fresh())).abs().max() > 1e-3, "the adapter must do something"


def test_the_adapter_folder_holds_safetensors_with_the_head(model, tmp_path):
    folder = saved(model, tmp_path / "adapter")
    names = {"adapter_config.json", "adapter_model.safetensors", "classifier.json"}
    assert {path.name for path in folder.iterdir()} == names
    keys = load_file(folder / "adapter_model.safetensors").keys()
    assert any("linear_head.weight" in key for key in keys)
    assert not any("base_layer" in key for key in keys)


def test_a_failed_save_leaves_the_old_adapter(lora, tmp_path, monkeypatch):
    folder = saved(lora, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(adapters, "without_folders", lambda provenance: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saved(lora, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_merging_low_precision_is_refused(lora):
    with pytest.raises(ValueError, match="merge in fp32"):
        adapters.merge_adapter(adapters.transfer_adapter(lora, fresh()).bfloat16())


def test_an_adapter_of_another_base_is_refused(tmp_path):
    for name, seed in {"w": 0, "other": 1}.items():
        torch.manual_seed(seed)
        save_file(build_backbone("example").state_dict(), tmp_path / f"{name}.safetensors")
    config = replace(CONFIG, weights=str(tmp_path / "w.safetensors"))
    model = adapters.add_adapter(create_classifier(config), AdapterSettings())
    folder = saved(model, tmp_path / "adapter", config=config)
    assert adapters.load_adapter(folder)
    (tmp_path / "other.safetensors").replace(tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="was trained on other weights than those of example"):
        adapters.load_adapter(folder)


def test_an_adapter_on_random_weights_is_rebuilt_from_its_seed(tmp_path):
    config = replace(CONFIG, weights="random", seed=7)
    model = adapters.add_adapter(create_classifier(config), AdapterSettings())
    folder = saved(model, tmp_path / "adapter", {"run": "a"}, config)
    torch.manual_seed(123)
    loaded, provenance = adapters.load_adapter(folder)
    assert torch.equal(logits(loaded), logits(model))
    assert provenance == {"run": "a"}


def altered_json(**changes):
    """Set fields of a JSON file anywhere in it."""

    def change(path):
        text = path.read_text()
        for name, value in changes.items():
            text, count = re.subn(rf'("{name}": )[^,\n]+', rf"\g<1>{value}", text)
            assert count == 1
        path.write_text(text)

    return change


def without_tensors(path):
    state = {k: v for k, v in load_file(path).items() if "lora_B" not in k}
    save_file(state, path)


def not_a_number(path):
    save_file({k: v * float("nan") for k, v in load_file(path).items()}, path)


DAMAGES = {
    "no record": ("classifier.json", Path.unlink, "no complete adapter folder of this project"),
    "cut record": ("classifier.json", b"{", "no complete adapter folder of this project"),
    "binary record": ("classifier.json", bytes(range(256)), "no complete adapter folder"),
    "deep record": ("classifier.json", b"[" * 100_000, "no complete adapter folder"),
    "list as record": ("classifier.json", b"[]", "no complete adapter folder"),
    "empty record": ("classifier.json", b"{}", "no complete adapter folder"),
    "no weights": ("adapter_model.safetensors", Path.unlink, "no complete adapter folder"),
    "cut weights": ("adapter_model.safetensors", b"short", "adapter_model.safetensors changed"),
    "half the weights": ("adapter_model.safetensors", without_tensors, "changed after"),
    "weights of NaN": ("adapter_model.safetensors", not_a_number, "changed after"),
    "cut settings": ("adapter_config.json", b"{", "adapter_config.json changed after"),
    "PEFT's alpha": ("adapter_config.json", altered_json(lora_alpha=1000), "changed after"),
    "PEFT's method": ("adapter_config.json", altered_json(use_dora="null"), "changed after"),
    "PEFT's targets": (
        "adapter_config.json",
        altered_json(target_modules='"(a|aa|aaa)+$"'),
        "adapter_config.json changed after",
    ),
    "alpha": ("classifier.json", altered_json(alpha=1000), "classifier.json changed after"),
    "alpha of NaN": ("classifier.json", altered_json(alpha="NaN"), "no complete adapter folder"),
    "method": ("classifier.json", altered_json(method='"rslora"'), "classifier.json changed"),
    "digest of the base": (
        "classifier.json",
        altered_json(base_digest='"0000"'),
        "classifier.json changed after",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_and_altered_adapter_folders_are_one_clear_error(lora, tmp_path, case):
    name, damage, message = DAMAGES[case]
    folder = saved(lora, tmp_path / "adapter")
    if isinstance(damage, bytes):
        (folder / name).write_bytes(damage)
    else:
        damage(folder / name)
    assert message in refusal(adapters.load_adapter, folder)


def sealed(folder):
    """Digests as whoever forges a whole folder would write them."""
    record = json.loads((folder / "classifier.json").read_text())
    del record["digest"]
    for name in record["files"]:
        record["files"][name] = adapters._digest((folder / name).read_bytes())
    record["digest"] = adapters._digest(json.dumps(record).encode())
    (folder / "classifier.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "message"), [(without_tensors, "missing: base_model"), (not_a_number, "not finite")]
)
def test_a_forged_adapter_must_be_complete_all_the_same(lora, tmp_path, damage, message):
    folder = saved(lora, tmp_path / "adapter")
    damage(folder / "adapter_model.safetensors")
    sealed(folder)
    assert message in refusal(adapters.load_adapter, folder)


def targets_of(model):
    layers = empty_backbone(None, model).blocks[0].named_modules()
    return [name.rsplit(".", 1)[-1] for name, layer in layers if isinstance(layer, nn.Linear)]


LORAS = [(name, "lora") for name in TINY]
OTHERS = [method for method in adapters.PEFT_METHODS if method != "lora"]
OTHERS = [(name, method) for i, method in enumerate(OTHERS) for name in list(TINY)[i % 3 :: 3]]


@pytest.mark.parametrize(("name", "method"), LORAS + OTHERS)
def test_an_adapter_trains_on_every_layer_of_every_family(name, method):
    """timm's own `_qkvb` models never call qkv: the gradient would be missing, without a word."""
    classifier = tiny_classifier(None, name)
    size = classifier.config.image_size
    batch = random_chips(size=size)
    before = classifier(batch).detach()
    targets = targets_of(name)
    settings = AdapterSettings(targets=tuple(targets), method=method, dropout=0.0)
    model = adapters.add_adapter(classifier, settings)
    prefix = model.base_model.prefix  # of names of the adapter's parameters, lora_
    trainable = {k: p for k, p in model.named_parameters() if p.requires_grad and prefix in k}
    adapted = {k.split(f".{prefix}")[0] for k in trainable}
    assert len(adapted) == 5 * len(targets), "every layer of each block"
    for _ in range(2):  # A's gradient is zero while B is
        model.zero_grad()
        model(batch).square().sum().backward()
        with torch.no_grad():
            for parameter in trainable.values():
                parameter -= 0.1 * parameter.grad / parameter.grad.norm().clamp(min=1e-12)
    for key, parameter in trainable.items():
        assert parameter.grad.abs().max() > 0, key
    with torch.inference_mode():
        adapted = model.eval()(batch)
        assert (adapted - before).abs().max() > 1e-4
        merged = adapters.merge_adapter(copy.deepcopy(model))
        torch.testing.assert_close(merged(batch), adapted, atol=1e-5, rtol=1e-4)


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
