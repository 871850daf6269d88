"""The reference models of README.md, built with timm: small backbones for the tests."""

from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import timm
import torch
from safetensors.torch import load_file

from helpers.models import backbones
from helpers.models.architectures import architecture
from helpers.models.backbones import build_backbone, load_backbone_weights
from helpers.models.classifier import Classifier, ClassifierConfig

FOLDER = Path(__file__).parent
# Reference model -> the backbone whose settings it has.
MODELS = {
    "dinov2": "dinov2_vits14",
    "dinov2_reg4": "dinov2_vits14_reg",
    "dinov3": "dinov3_vits16",
    "dinov3_sat": "dinov3_vitl16_sat",
}


@cache
def published(model):
    """State dict in Meta's layout."""
    return torch.load(FOLDER / f"{model}_state_dict.pth", weights_only=True)


@cache
def meta_outputs(model):
    """Images, and what Meta's code returns for them."""
    return load_file(FOLDER / f"{model}_outputs.safetensors")


# Small models of every shape of block: reference models, and gated MLPs as ViT-g, S+ and 7B have.
TINY = MODELS | {
    "giant": "dinov2_vitg14",
    "plus": "dinov3_vits16plus",
    "7b": "dinov3_vit7b16",
    "timm": "timm:vit_small_patch16_224.augreg_in21k",
    "timm_eva": "timm:vit_small_patch16_dinov3_qkvb.lvd1689m",
}


@contextmanager
def tiny_architectures(depth=5):
    """Within it, `build_backbone` builds the shapes of the reference: width 64, 5 blocks."""
    shape = {"embed_dim": 64, "depth": depth, "num_heads": 2, "mlp_ratio": 4}
    create = timm.create_model

    def tiny(name, **options):
        return create(name, **options | shape | {"init_values": 1.0})

    with mock.patch.object(backbones.timm, "create_model", tiny):
        yield


def empty_backbone(image_size=None, model="dinov2", depth=5, **options):
    """A backbone of the reference's shape with random weights."""
    with tiny_architectures(depth):
        return build_backbone(TINY[model], image_size, **options).eval()


def tiny_classifier(
    image_size=None, model="dinov2", classes=("no_tree", "tree"), depth=5, **config
):
    """A classifier on a reference model, of fewer than its five blocks with random weights."""
    image_size = image_size or 2 * architecture(TINY[model]).patch
    torch.manual_seed(0)
    backbone = empty_backbone(image_size, model, depth)
    if model in MODELS and depth == 5:
        load_backbone_weights(backbone, published(model), model)
    fields = {"bands": (0, 1, 2), **config}
    config = ClassifierConfig(TINY[model], "random", image_size, classes=classes, **fields)
    return Classifier(config, backbone).eval()
