"""The model: features are Meta's, weights arrive completely or not at all, files come back."""

import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn
from torchvision.transforms.v2 import functional as transforms

from helpers import InputError
from helpers.models import backbones, files
from helpers.models.backbones import (
    ARCHITECTURES,
    backbone_label,
    build_backbone,
    create_backbone,
    load_backbone_weights,
    read_state_dict,
    weights_digest,
)
from helpers.models.classifier import HEAD_INPUTS, ClassifierConfig, create_classifier, head_columns
from helpers.models.export import count_parameters, module_tree
from helpers.models.files import load_classifier, save_classifier
from tests.fake_weights import hub_cache, published_state_dict
from tests.models.parity import MODELS, empty_backbone, meta_outputs, published, tiny_classifier

RGB = (0, 1, 2)
CLASSES = ("no_tree", "tree")


def example_config(**changes):
    return replace(ClassifierConfig("example", "random", 98, RGB, CLASSES), **changes)


def random_chips(n=2, bands=3, size=98, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, bands, size, size), dtype=torch.uint8, generator=generator)


def refusal(function, *arguments, **options):
    """The message of the one InputError that a call ends with."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="session")
def example():
    """A classifier on the example's architecture with random weights."""
    torch.manual_seed(0)
    return create_classifier(example_config()).eval()


@pytest.fixture(scope="session")
def saved(example, tmp_path_factory):
    """The same in a file; not to be changed."""
    path = tmp_path_factory.mktemp("saved") / "model_final.safetensors"
    return save_classifier(example, path, {"data": "chips", "epochs": 3})


# --- Parity with Meta's code ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [98, 196, 224, 518])
@pytest.mark.parametrize("model", MODELS)
@torch.inference_mode()
def test_features_are_metas(model, size):
    classifier = tiny_classifier(size, model)
    meta = {
        key.removesuffix(f"_{size}"): value
        for key, value in meta_outputs(model).items()
        if key.endswith(f"_{size}")
    }
    tokens = classifier.backbone.forward_features(classifier.normalize(meta["image"]))
    patches = tokens[:, classifier.backbone.num_prefix_tokens :]
    features = classifier.features(meta["image"])
    ours = {
        "cls": tokens[:, 0],
        "patches": patches[:, ::10] if size == 518 else patches,
        "patch_mean": features[:, 256:],
        "cls_last4": features[:, :256],
    }
    for name, value in ours.items():
        torch.testing.assert_close(value, meta[name], atol=1e-4, rtol=0, msg=name)


@pytest.mark.parametrize("size", [98, 224])
@torch.inference_mode()
def test_timms_own_resampling_would_not_be_metas(size):
    """The test above can fail: without registers timm resamples position embeddings otherwise."""
    classifier = tiny_classifier(size)
    state = checkpoint_filter_fn(dict(published("dinov2")), classifier.backbone)
    classifier.backbone.load_state_dict(state)
    meta = meta_outputs("dinov2")
    tokens = classifier.backbone.forward_features(classifier.normalize(meta[f"image_{size}"]))
    assert (tokens[:, 1:] - meta[f"patches_{size}"]).abs().max() > 0.5


# --- Weights in Meta's and timm's layouts --------------------------------------------------------


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize("name, registers", [("dinov2_vits14", 0), ("dinov2_vits14_reg", 4)])
def test_a_published_checkpoint_loads_completely(name, registers, tmp_path):
    state = published_state_dict(width=384, depth=12, registers=registers)
    torch.save(state, tmp_path / "pretrain.pth")
    own = create_backbone(name, str(tmp_path / "pretrain.pth"), image_size=98).state_dict()

    # Each tensor of the file is in the model, and the model has no others.
    moved = {"mask_token", "pos_embed", "cls_token", "register_tokens"}
    assert own.keys() - state.keys() == ({"reg_token"} if registers else set())
    for key in state.keys() - moved:
        assert torch.equal(own[key], state[key]), key
    if registers:
        assert torch.equal(own["reg_token"], state["register_tokens"])
        assert torch.equal(own["cls_token"], state["cls_token"] + state["pos_embed"][:, :1])
        assert own["pos_embed"].shape == (1, 49, 384)
    else:
        assert torch.equal(own["cls_token"], state["cls_token"])
        assert torch.equal(own["pos_embed"][:, :1], state["pos_embed"][:, :1])
        assert own["pos_embed"].shape == (1, 50, 384)


def test_half_precision_checkpoint_becomes_float32():
    state = {key: value.half() for key, value in published("dinov2").items()}
    backbone = empty_backbone()
    load_backbone_weights(backbone, state, "half")
    assert {value.dtype for value in backbone.state_dict().values()} == {torch.float32}
    assert torch.equal(backbone.norm.weight.half(), state["norm.weight"])


def test_position_embeddings_at_their_own_size_are_untouched():
    backbone = empty_backbone(518)
    load_backbone_weights(backbone, published("dinov2"), "dinov2")
    assert torch.equal(backbone.pos_embed, published("dinov2")["pos_embed"])


@torch.inference_mode()
def test_giants_swiglu_has_metas_names_and_order():
    """Meta: `x1, x2 = w12(x).chunk(2); w3(silu(x1) * x2)` (layers/swiglu_ffn.py)."""
    shape = {"embed_dim": 96, "depth": 2, "num_heads": 2, "img_size": 28, "num_classes": 0}
    timm_name = ARCHITECTURES["dinov2_vitg14"].timm_name
    torch.manual_seed(0)
    source = timm.create_model(timm_name, **shape).state_dict()
    state = {
        key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value
        for key, value in source.items()
    } | {"mask_token": torch.zeros(1, 96)}
    assert state["blocks.1.mlp.w12.weight"].shape == (512, 96)
    assert state["blocks.1.mlp.w3.weight"].shape == (96, 256)
    backbone = timm.create_model(timm_name, **shape)
    load_backbone_weights(backbone, state, "giant")
    own = backbone.state_dict()
    assert own.keys() == source.keys()
    assert all(torch.equal(own[key], source[key]) for key in source)

    x = torch.randn(2, 5, 96)
    w12 = nn.functional.linear(x, state["blocks.0.mlp.w12.weight"], state["blocks.0.mlp.w12.bias"])
    x1, x2 = w12.chunk(2, dim=-1)
    expected = nn.functional.linear(
        nn.functional.silu(x1) * x2, state["blocks.0.mlp.w3.weight"], state["blocks.0.mlp.w3.bias"]
    )
    torch.testing.assert_close(backbone.blocks[0].mlp(x), expected)


@pytest.mark.parametrize("bands", [1, 4, 13])
def test_pretrained_stem_is_spread_over_other_band_counts(bands, example, tmp_path):
    """Bands take the RGB filters in turn, scaled by 3 / bands; a single band takes their sum."""
    source = example.backbone.state_dict()
    save_file(source, tmp_path / "rgb.safetensors")
    backbone = create_backbone("example", str(tmp_path / "rgb.safetensors"), 98, bands)
    own, key = backbone.state_dict(), "patch_embed.proj.weight"
    if bands == 1:
        expected = source[key].sum(dim=1, keepdim=True)
    else:
        expected = source[key][:, [i % 3 for i in range(bands)]] * 3 / bands
    torch.testing.assert_close(own[key], expected)
    assert all(torch.equal(own[name], source[name]) for name in own.keys() - {key})
    assert backbone(torch.randn(1, bands, 98, 98)).shape == (1, 192)


HUB_SCRIPT = """
import sys
from helpers import InputError
from helpers.models import files
from helpers.models.backbones import create_backbone
from safetensors.torch import save_file
save_file(create_backbone("dinov2_vits14", image_size=98).state_dict(), sys.argv[1])
try:
    create_backbone("dinov2_vits14_reg")
except InputError as error:
    print(error)
"""


def test_hub_weights_come_from_the_cache_and_are_missed_with_one_clear_error(tmp_path):
    """In a process of its own, since the hub's client reads its environment when imported."""
    source = without(published_state_dict(width=384, depth=12, registers=0), "mask_token")
    file = hub_cache(tmp_path / "hub", "vit_small_patch14_dinov2.lvd142m", source)

    result = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT, str(tmp_path / "loaded.safetensors")],
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        cwd=backbones.EXAMPLE_WEIGHTS.parent.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr

    from_hub = load_file(tmp_path / "loaded.safetensors")
    from_file = create_backbone("dinov2_vits14", str(file), 98)
    assert torch.equal(from_hub["blocks.11.mlp.fc2.weight"], source["blocks.11.mlp.fc2.weight"])
    assert from_hub.keys() == from_file.state_dict().keys()
    for key, value in from_file.state_dict().items():
        assert torch.equal(from_hub[key], value), key

    assert re.fullmatch(
        r"backbone dinov2_vits14_reg: its weights could not be fetched from the hub \(\w+\)\. "
        r"Check the connection, or download Meta's dinov2_vits14_reg4_pretrain\.pth by hand and "
        r"pass its path as weights\n",
        result.stdout,
    )


# --- Files that do not fit -----------------------------------------------------------------------


WRONG_STATE_DICTS = {
    "registers in a model without": (lambda: published("dinov2_reg4"), "unexpected: reg_token"),
    "a key missing": (
        lambda: without(published("dinov2"), "blocks.3.ls2.gamma"),
        "missing: blocks.3.ls2.gamma",
    ),
    "a key more": (
        lambda: published("dinov2") | {"head.weight": torch.zeros(2, 64)},
        "unexpected: head.weight",
    ),
    "no position embeddings": (
        lambda: without(published("dinov2"), "pos_embed"),
        "missing: pos_embed",
    ),
    "registers without position embeddings": (
        lambda: without(published("dinov2_reg4"), "pos_embed"),
        "missing: pos_embed",
    ),
    "position embeddings that are no square": (
        lambda: published("dinov2") | {"pos_embed": torch.zeros(1, 12, 64)},
        "pos_embed (1, 7, 64) in place of (1, 5, 64)",
    ),
    "position embeddings without batch dimension": (
        lambda: published("dinov2") | {"pos_embed": torch.zeros(1370, 64)},
        "pos_embed (1370, 64) in place of (1, 5, 64)",
    ),
    "another embedding width": (
        lambda: published_state_dict(width=32, depth=5, registers=0),
        "blocks.0.attn.proj.bias (32,) in place of (64,)",
    ),
    "more blocks": (
        lambda: published_state_dict(width=64, depth=6, registers=0),
        "unexpected: blocks.5.attn.proj.bias",
    ),
    "patches of 16 pixels": (
        lambda: VisionTransformer(
            img_size=32,
            patch_size=16,
            embed_dim=64,
            depth=5,
            num_heads=2,
            num_classes=0,
            init_values=1.0,
        ).state_dict(),
        "of another shape: patch_embed.proj.weight (64, 3, 16, 16) in place of (64, 3, 14, 14)",
    ),
    "an empty file": (lambda: {}, "missing: blocks.0.attn.proj.bias"),
    "a wrapped state dict's key": (
        lambda: published("dinov2") | {"encoder": torch.zeros(1)},
        "unexpected: encoder",
    ),
}


@pytest.mark.parametrize("case", WRONG_STATE_DICTS)
def test_weights_of_another_architecture_are_named(case):
    state, expected = WRONG_STATE_DICTS[case]
    message = refusal(load_backbone_weights, empty_backbone(), state(), "weights.pth")
    assert message.startswith("weights.pth: these weights are not of this architecture; ")
    assert expected in message
    assert message.endswith("Choose the backbone that the file was made for")


def test_weights_without_registers_in_a_model_with_them():
    backbone = empty_backbone(model="dinov2_reg4")
    message = refusal(load_backbone_weights, backbone, published("dinov2"), "weights.pth")
    assert "missing: reg_token" in message


def test_refused_weights_leave_the_backbone_as_it_was():
    backbone = empty_backbone()
    before = weights_digest(backbone)
    refusal(load_backbone_weights, backbone, without(published("dinov2"), "norm.bias"), "file")
    assert weights_digest(backbone) == before


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_a_pickled_object_is_refused_and_not_run(tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "weights.pth"
    torch.save({"norm.weight": torch.zeros(64), "more": Touch(marker)}, path)
    message = refusal(read_state_dict, path)
    assert f"{path} is truncated or not a file of plain tensors" in message
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # so the file would have run code


BROKEN_FILES = {
    "missing.pth": (lambda path: None, "no such file"),
    "folder.pth": (lambda path: path.mkdir(), "no such file"),
    "empty.pth": (lambda path: path.touch(), "truncated or not a file of plain tensors"),
    "empty.safetensors": (lambda path: path.touch(), "truncated or not a file of plain tensors"),
    "text.pth": (lambda path: path.write_text("<html>"), "truncated or not"),
    "pickle.pth": (
        lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)),
        "truncated or not a file of plain tensors",
    ),
    "number.pth": (lambda path: torch.save({"a": 1}, path), "flat state dict"),
    "nested.pth": (
        lambda path: torch.save({"model": {"a": torch.zeros(1)}}, path),
        "does not hold a flat state dict (name -> tensor); save the model's state_dict()",
    ),
    "tensor.pth": (lambda path: torch.save(torch.zeros(1), path), "flat state dict"),
    "numbered.pth": (lambda path: torch.save({0: torch.zeros(1)}, path), "flat state dict"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_of_weights(name, tmp_path):
    make, expected = BROKEN_FILES[name]
    make(tmp_path / name)
    message = refusal(read_state_dict, str(tmp_path / name))
    assert message.startswith("weights: ")
    assert str(tmp_path / name) in message and expected in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_of_weights(suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(published("dinov2"), path)
    else:
        save_file(published("dinov2"), path)
    path.write_bytes(path.read_bytes()[:-1000])
    message = refusal(read_state_dict, path)
    assert f"{path} is truncated or not a file of plain tensors" in message
    assert message.endswith("download it again")


# --- Architectures -------------------------------------------------------------------------------


def parameters_by_hand(width, depth, image_size, registers, hidden):
    """Count the parameters of a DINOv2 ViT; hidden: inputs of SwiGLU's w3, None for an MLP."""
    tokens = (image_size // 14) ** 2
    if hidden is None:
        mlp = (width * 4 * width + 4 * width) + (4 * width * width + width)
    else:
        mlp = (width * 2 * hidden + 2 * hidden) + (hidden * width + width)
    attention = (width * 3 * width + 3 * width) + (width * width + width)
    block = attention + mlp + 2 * 2 * width + 2 * width  # two norms, two layer scales
    stem = 3 * 14 * 14 * width + width
    prefix = width + registers * width
    positions = (tokens if registers else tokens + 1) * width
    return stem + prefix + positions + depth * block + 2 * width


@pytest.mark.parametrize("suffix, registers", [("", 0), ("_reg", 4)])
@pytest.mark.parametrize(
    "name, width, depth, hidden",
    [
        ("dinov2_vits14", 384, 12, None),
        ("dinov2_vitb14", 768, 12, None),
        ("dinov2_vitl14", 1024, 24, None),
        ("dinov2_vitg14", 1536, 40, 4096),
    ],
)
def test_every_dinov2_builds_without_memory(name, width, depth, hidden, suffix, registers):
    with torch.device("meta"):
        backbone = build_backbone(name + suffix, image_size=196)
    assert all(p.is_meta for p in backbone.parameters())
    assert (backbone.embed_dim, len(backbone.blocks)) == (width, depth)
    assert backbone.num_prefix_tokens == 1 + registers
    total = count_parameters(backbone)["total"]
    assert total == parameters_by_hand(width, depth, 196, registers, hidden)
    if name + suffix == "dinov2_vitl14":
        assert total == 303_166_464


@pytest.mark.parametrize("head_input, width", [("cls", 1024), ("4xcls+mean", 5120)])
def test_the_head_of_vit_l_really_has_its_size(head_input, width):
    config = ClassifierConfig("dinov2_vitl14", "random", 196, RGB, CLASSES, head_input)
    with torch.device("meta"):
        classifier = create_classifier(config)
    tree = module_tree(classifier)
    assert tree.startswith("Classifier(\n  (backbone): VisionTransformer(\n")
    assert "(0-23): 24 x Block(" in tree
    head = f"(linear_head): Linear(in_features={width}, out_features=2, bias=True)"
    assert tree.endswith(f"\n  {head}\n)")
    assert classifier.linear_head.weight.shape == (2, width)
    assert count_parameters(classifier.linear_head)["total"] == 2 * width + 2
    assert count_parameters(classifier)["total"] == 303_166_464 + 2 * width + 2


def test_counting_separates_trainable_parameters(example):
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    module[0].requires_grad_(False)
    assert count_parameters(module) == {"total": 16 + 25, "trainable": 25}


def test_the_example_is_a_vit_tiny_with_patches_of_14(example):
    backbone = example.backbone
    assert (backbone.embed_dim, len(backbone.blocks)) == (192, 12)
    assert backbone.blocks[0].attn.num_heads == 3
    assert backbone.patch_embed.patch_size == (14, 14)


@pytest.mark.parametrize(
    "backbone, weights, expected",
    [
        ("example", "pretrained", "example (ViT-Ti/14, distilled)"),
        ("example", "random", "ViT-Ti/14, random weights"),
        ("dinov2_vitl14", "pretrained", "DINOv2 ViT-L/14"),
        ("dinov2_vitg14_reg", "pretrained", "DINOv2 ViT-g/14 with registers"),
        ("dinov2_vits14_reg", "random", "ViT-S/14 with registers, random weights"),
        ("dinov2_vits14", "some/file.pth", "ViT-S/14, weights from file.pth"),
    ],
)
def test_numbers_are_labelled_with_their_weights(backbone, weights, expected):
    assert backbone_label(backbone, weights) == expected


# --- Classifier ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("head_input", HEAD_INPUTS)
@torch.inference_mode()
def test_forward_is_the_head_on_its_columns_of_the_features(model, head_input):
    classifier = tiny_classifier(28, model, head_input=head_input, classes=("a", "b", "c"))
    chips = random_chips(size=28)
    features = classifier.features(chips)
    inputs = head_columns(features, head_input)
    assert features.shape == (2, 5 * 64)
    assert inputs.shape == (2, HEAD_INPUTS[head_input] * 64)
    logits = classifier(chips)
    assert logits.shape == (2, 3)
    torch.testing.assert_close(logits, classifier.linear_head(inputs))


def test_head_columns_are_the_last_cls_and_the_patch_mean():
    features = torch.arange(5).repeat_interleave(2)[None]  # CLS 0 to 3, then the mean
    assert head_columns(features, "cls").tolist() == [[3, 3]]
    assert head_columns(features, "cls+mean").tolist() == [[3, 3, 4, 4]]
    assert head_columns(features, "4xcls+mean").tolist() == features.tolist()


@pytest.mark.parametrize("size, bands", [(98, 1), (112, 4), (196, 13)])
@torch.inference_mode()
def test_any_multiple_of_14_and_any_band_count(size, bands):
    config = example_config(
        image_size=size, bands=tuple(range(bands)), mean=(100.0,) * bands, std=(50.0,) * bands
    )
    classifier = create_classifier(config).eval()
    assert classifier.backbone.patch_embed.grid_size == (size // 14, size // 14)
    assert classifier(random_chips(bands=bands, size=size)).shape == (2, 2)


def test_normalisation_is_torchvisions():
    chips = random_chips(size=28)
    scaled = transforms.to_dtype(chips, torch.float32, scale=True)
    expected = transforms.normalize(scaled, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    normalized = tiny_classifier().normalize(chips)
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(normalized, expected, atol=2e-6, rtol=0)


def test_normalisation_keeps_fractions_where_statistics_are_whole_numbers():
    classifier = tiny_classifier(mean=(1, 2, 3), std=(2, 2, 2))
    normalized = classifier.normalize(torch.full((1, 3, 1, 1), 3.5))
    assert normalized.flatten().tolist() == [1.25, 0.75, 0.25]


def test_with_head_shares_the_backbone_and_copies_the_head():
    classifier = tiny_classifier()
    head = nn.Linear(5 * 64, 2)
    best = classifier.with_head("4xcls+mean", head)
    assert best.backbone is classifier.backbone
    assert best.config == replace(classifier.config, head_input="4xcls+mean")
    assert torch.equal(best.linear_head.weight, head.weight)
    nn.init.zeros_(head.weight)
    assert best.linear_head.weight.any()
    assert classifier.linear_head.in_features == 64


WRONG_CONFIGS = {
    "image_size: 100 is not a multiple of the patch size 14; the next sizes are 98 and 112": {
        "image_size": 100
    },
    "image_size: 5 is not a multiple of the patch size 14; the next sizes are 14 and 28": {
        "image_size": 5
    },
    "image_size: 0 is not a multiple of the patch size 14; the next sizes are 14 and 28": {
        "image_size": 0
    },
    "backbone: 'dinov2_vitx14' is unknown; choose one of example, dinov2_vits14,": {
        "backbone": "dinov2_vitx14"
    },
    "head_input: 'mean' is unknown; choose one of cls, cls+mean, 4xcls+mean": {
        "head_input": "mean"
    },
    "classes: at least two are needed, got ['tree']": {"classes": ("tree",)},
    "mean (3) and std (3) need one value for each of the 4 bands": {"bands": (0, 1, 2, 3)},
    "mean (3) and std (1) need one value for each of the 3 bands": {"std": (1.0,)},
}


@pytest.mark.parametrize("expected", WRONG_CONFIGS)
def test_a_configuration_that_cannot_be_built(expected):
    assert refusal(example_config, **WRONG_CONFIGS[expected]).startswith(expected)


def test_backbones_are_checked_as_configurations_are():
    assert "next sizes are 98 and 112" in refusal(create_backbone, "example", "random", 100)
    assert "'dinov3' is unknown" in refusal(create_backbone, "dinov3", "random")
    assert set(ARCHITECTURES) == {"example"} | {
        f"dinov2_vit{size}14{suffix}" for size in "sblg" for suffix in ("", "_reg")
    }


# --- Saved classifiers ---------------------------------------------------------------------------


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


WRONG_METADATA = {
    "no JSON": {"config": "{'backbone': 'example'}"},
    "not a mapping": {"config": "[]"},
    "no fields": {"config": "{}"},
    "an unknown field": {"config": json.dumps(asdict(example_config()) | {"dropout": 0.1})},
    "one class": {"config": json.dumps(asdict(example_config()) | {"classes": ["tree"]})},
    "bands without statistics": {"config": json.dumps(asdict(example_config()) | {"bands": [0]})},
    "an unknown backbone": {"config": json.dumps(asdict(example_config()) | {"backbone": "vit"})},
    "a size in words": {"config": json.dumps(asdict(example_config()) | {"image_size": "98"})},
    "provenance that is no JSON": {"provenance": "yesterday"},
}


@pytest.mark.parametrize("case", WRONG_METADATA)
def test_a_file_with_a_damaged_configuration(case, saved, tmp_path):
    path = rewritten(saved, tmp_path / "model.safetensors", **WRONG_METADATA[case])
    message = refusal(load_classifier, path)
    assert message.startswith(f"{path}: not a classifier saved by this project")
    assert message.endswith("pass the model_final.safetensors of a run")


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


# --- Digest --------------------------------------------------------------------------------------


def test_the_digest_tells_weights_apart():
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    assert weights_digest(first) != weights_digest(second)
    second.load_state_dict(first.state_dict())
    assert weights_digest(first) == weights_digest(second)
    with torch.no_grad():
        second.bias[0] = torch.nextafter(second.bias[0], torch.tensor(9.0))
    assert weights_digest(first) != weights_digest(second)
    assert re.fullmatch("[0-9a-f]{16}", weights_digest(first))
    assert weights_digest(first) == weights_digest(first.requires_grad_(False).eval())


def test_the_digest_covers_names():
    class Named(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.register_buffer(name, torch.ones(3))

    assert weights_digest(Named("one")) != weights_digest(Named("other"))
