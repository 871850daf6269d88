"""The reference models of README.md, built with timm: small backbones for the tests."""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from helpers.models.backbones import load_backbone_weights
from helpers.models.classifier import Classifier, ClassifierConfig

FOLDER = Path(__file__).parent
MODELS = ("dinov2", "dinov2_reg4")


@cache
def published(model):
    """State dict in Meta's layout."""
    return torch.load(FOLDER / f"{model}_state_dict.pth", weights_only=True)


@cache
def meta_outputs(model):
    """Images, and what Meta's code returns for them."""
    return load_file(FOLDER / f"{model}_outputs.safetensors")


def empty_backbone(image_size=28, model="dinov2", **options):
    """A timm model of the reference's shape with fresh weights."""
    registers = 4 if model == "dinov2_reg4" else 0
    return VisionTransformer(
        img_size=image_size,
        patch_size=14,
        embed_dim=64,
        depth=5,
        num_heads=2,
        num_classes=0,
        init_values=1.0,
        reg_tokens=registers,
        no_embed_class=bool(registers),
        **options,
    ).eval()


def tiny_classifier(image_size=28, model="dinov2", classes=("no_tree", "tree"), **config):
    """A classifier on a reference model; its config names an architecture of another size."""
    backbone = empty_backbone(image_size, model)
    load_backbone_weights(backbone, published(model), model)
    torch.manual_seed(0)
    fields = {"bands": (0, 1, 2), **config}
    config = ClassifierConfig("dinov2_vits14", "random", image_size, classes=classes, **fields)
    return Classifier(config, backbone).eval()
