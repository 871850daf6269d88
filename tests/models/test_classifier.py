"""Architectures, and the classifier on them."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from torchvision.transforms.v2 import functional as transforms

from helpers.models.architectures import ARCHITECTURES, architecture, backbone_label
from helpers.models.backbones import build_backbone, create_backbone, weights_digest
from helpers.models.classifier import (
    HEAD_INPUTS,
    ClassifierConfig,
    create_classifier,
    head_columns,
)
from helpers.models.export import count_parameters, module_tree
from tests.models.common import CLASSES, RGB, example_config, random_chips, refusal
from tests.models.parity import TINY, tiny_classifier


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


# timm's counts without biases of qkv, and those biases as Meta's files have them.
DINOV3_PARAMETERS = {
    "dinov3_vits16": (21_586_944, 12 * 3 * 384),
    "dinov3_vits16plus": (28_683_264, 12 * 3 * 384),
    "dinov3_vitb16": (85_641_216, 12 * 3 * 768),
    "dinov3_vitl16_sat": (303_079_424, 24 * 3 * 1024),
    "dinov3_vith16plus": (840_509_440, 32 * 3 * 1280),
    "dinov3_vit7b16": (6_716_030_976, 0),
}


@pytest.mark.parametrize("name", DINOV3_PARAMETERS)
def test_every_dinov3_builds_without_memory(name):
    with torch.device("meta"):
        backbone = build_backbone(name, image_size=224)
    assert all(p.is_meta for p in backbone.parameters())
    assert backbone.num_prefix_tokens == 5
    assert count_parameters(backbone)["total"] == sum(DINOV3_PARAMETERS[name])


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


def test_counting_separates_trainable_parameters():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    module[0].requires_grad_(False)
    assert count_parameters(module) == {"total": 16 + 25, "trainable": 25}


def test_the_example_is_a_vit_tiny_with_patches_of_14():
    backbone = build_backbone("example")
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
        ("dinov3_vitl16", "pretrained", "DINOv3 ViT-L/16"),
        ("dinov3_vitl16_sat", "pretrained", "DINOv3 ViT-L/16 (SAT-493M)"),
        ("dinov3_vith16plus", "random", "ViT-H+/16, random weights"),
        ("timm:vit_small_patch16_224", "pretrained", "timm vit_small_patch16_224"),
    ],
)
def test_numbers_are_labelled_with_their_weights(backbone, weights, expected):
    assert backbone_label(backbone, weights) == expected


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("head_input", HEAD_INPUTS)
@torch.inference_mode()
def test_forward_is_the_head_on_its_columns_of_the_features(model, head_input):
    classifier = tiny_classifier(None, model, head_input=head_input, classes=("a", "b", "c"))
    chips = random_chips(size=classifier.config.image_size)
    features = classifier.features(chips)
    inputs = head_columns(features, head_input)
    assert features.shape == (2, 5 * 64)
    assert inputs.shape == (2, HEAD_INPUTS[head_input] * 64)
    logits = classifier(chips)
    assert logits.shape == (2, 3)
    torch.testing.assert_close(logits, classifier.linear_head(inputs))


@pytest.mark.parametrize("model", TINY)
@torch.inference_mode()
def test_going_on_from_tokens_gives_the_same_logits(model):
    """Registers, rotary embeddings and gated MLPs included, from every block that allows it."""
    chips = random_chips(size=32 if "dinov3" in TINY[model] or "timm" in TINY[model] else 28)
    for head_input in HEAD_INPUTS:
        classifier = tiny_classifier(chips.shape[-1], model, head_input=head_input)
        expected = classifier(chips)
        for block in (1,) if head_input == "4xcls+mean" else (1, 3, 4):
            tokens = classifier.tokens(chips, block)
            assert tokens.shape[1:] == (classifier.backbone.num_prefix_tokens + 4, 64)
            found = classifier.forward_from(tokens, block)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("dtype, rounding", [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("block", [1, 3])
@torch.inference_mode()
def test_tokens_in_half_precision_move_logits_by_their_rounding(dtype, rounding, block):
    """At most as if both branches of every block after passed the rounding on undiminished.

    Relative to |head| |its input|, which no logit exceeds (Cauchy and Schwarz). Seen here: 0.0004
    of the largest logit for fp16, 0.0025 for bf16.
    """
    classifier = create_classifier(example_config(weights="pretrained", image_size=28))
    chips = random_chips(8, size=28)
    block += len(classifier.backbone.blocks) - 4
    expected, tokens = classifier(chips), classifier.tokens(chips, block)
    found = classifier.forward_from(tokens.to(dtype), block)
    after = len(classifier.backbone.blocks) - block
    norm = classifier.features(chips)[:, -192 * 2 : -192].norm(dim=1).max()
    scale = classifier.linear_head.weight.norm(dim=1).max() * norm
    assert 0 < (found - expected).abs().max() < rounding * (1 + 2 * after) * scale


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


WRONG_CONFIGS = [
    ({"image_size": 100}, "image_size: 100 is not a multiple of example's patch size 14; the next"),
    ({"image_size": 5}, "patch size 14; the next sizes are 14 and 28"),
    ({"image_size": 0}, "patch size 14; the next sizes are 14 and 28"),
    ({"backbone": "dinov3_vits16"}, "dinov3_vits16's patch size 16; the next sizes are 96 and 112"),
    ({"image_size": 14_000_000}, "image_size: 14000000 is larger than 4096"),
    ({"backbone": "dinov2_vitx14"}, "backbone: 'dinov2_vitx14' is unknown; choose one of example,"),
    ({"backbone": "timm:vit_base_patch16_siglip_224"}, "siglip_224' has no CLS token"),
    ({"backbone": "timm:resnet18"}, "'timm:resnet18' is no plain ViT of timm, but its ResNet"),
    ({"backbone": "timm:eva02_tiny_patch14_224"}, "has no norm on its tokens, only one after"),
    ({"backbone": "timm:vit_base_r50_s16_224"}, "does not cut chips into square patches"),
    ({"backbone": "timm:vit_huge"}, "backbone: 'timm:vit_huge' is unknown to timm"),
    ({"backbone": "timm:vit_small_patch16_224.x"}, "cannot be built: Invalid pretrained tag"),
    ({"bands": (0, -1, 2)}, "bands: zero or more for each are needed, got [0, -1, 2]"),
    ({"bands": (), "mean": (), "std": ()}, "bands: zero or more for each are needed, got []"),
    ({"seed": -1}, "seed: -1 is not between"),
    ({"mean": (1.0, 2.0, float("nan"))}, "finite numbers are needed, std above zero, got [1.0, 2"),
    ({"std": (1.0, float("inf"), 1.0)}, "finite numbers are needed, std above zero, got"),
    ({"std": (1.0, 0.0, 1.0)}, "mean and std: finite numbers are needed, std above zero, got"),
    ({"head_input": "mean"}, "head_input: 'mean' is unknown; choose one of cls, cls+mean, 4xcls"),
    ({"classes": ("tree",)}, "classes: at least two are needed, all different, got ['tree']"),
    ({"classes": ("a", "a")}, "classes: at least two are needed, all different, got ['a', 'a']"),
    ({"bands": (0, 1, 2, 3)}, "mean (3) and std (3) need one value for each of the 4 bands"),
    ({"std": (1.0,)}, "mean (3) and std (1) need one value for each of the 3 bands"),
]


@pytest.mark.parametrize(("changes", "expected"), WRONG_CONFIGS)
def test_a_configuration_that_cannot_be_built(changes, expected):
    assert expected in refusal(example_config, **changes)


def test_backbones_are_checked_as_configurations_are():
    assert "next sizes are 98 and 112" in refusal(create_backbone, "example", "random", 100)
    assert "'dinov3' is unknown" in refusal(create_backbone, "dinov3", "random")
    dinov3 = ("s16", "s16plus", "b16", "l16", "h16plus", "7b16", "l16_sat", "7b16_sat")
    assert set(ARCHITECTURES) == {"example"} | {
        f"dinov2_vit{size}14{suffix}" for size in "sblg" for suffix in ("", "_reg")
    } | {f"dinov3_vit{size}" for size in dinov3}


def test_normalisation_is_the_backbones():
    satellite = ClassifierConfig("dinov3_vitl16_sat", "random", 224, RGB, CLASSES)
    assert satellite.mean == pytest.approx([255 * m for m in (0.430, 0.411, 0.296)])
    assert satellite.std == pytest.approx([255 * s for s in (0.213, 0.156, 0.143)])
    assert ClassifierConfig("dinov3_vitl16", "random", 224, RGB, CLASSES).mean == (
        123.675,
        116.28,
        103.53,
    )
    assert architecture("timm:vit_pe_core_base_patch16_224").mean == (127.5, 127.5, 127.5)


def test_timm_says_the_same_of_our_architectures():
    """Patch, mean and deviation are typed in; timm has them of its own, of DINOv3's in full."""
    for name, known in ARCHITECTURES.items():
        timms = timm.get_pretrained_cfg(known.timm_name)
        if name != "example":
            assert f"patch{known.patch}" in known.timm_name
            assert known.mean == pytest.approx([255 * value for value in timms.mean])
            assert known.std == pytest.approx([255 * value for value in timms.std])
            assert known.licence.split(",")[0].lower().replace(" ", "-") == timms.license


def test_equal_configurations_are_equal_classifiers():
    one, other = (create_classifier(example_config(seed=5, image_size=28)) for _ in range(2))
    assert weights_digest(one) == weights_digest(other)
    different = create_classifier(example_config(seed=6, image_size=28))
    assert weights_digest(one.backbone) != weights_digest(different.backbone)
