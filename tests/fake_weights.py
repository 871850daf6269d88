"""Random numbers in the layouts that weights are published in, shared by the tests."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.models.architectures import ARCHITECTURES
from helpers.models.classifier import create_classifier


@pytest.fixture(scope="module")
def tiny():
    """An architecture of two blocks by that name, since exporting twelve takes a minute."""
    example = ARCHITECTURES["example"]
    ARCHITECTURES["tiny"] = replace(example, overrides=example.overrides | {"depth": 2})
    yield "tiny"
    del ARCHITECTURES["tiny"]


def lively_classifier(config, seed=0):
    """A classifier with random weights of which every block matters, whatever its depth."""
    torch.manual_seed(seed)
    classifier = create_classifier(config).eval()
    for block in classifier.backbone.blocks:  # untrained layer scales are 1e-5
        torch.nn.init.constant_(block.ls1.gamma, 0.3)
        torch.nn.init.constant_(block.ls2.gamma, 0.3)
    return classifier


def published_state_dict(width, depth, registers):
    """Random numbers under the names and shapes of Meta's published checkpoints (MLP models).

    Every tensor is another stretch of one row of numbers: drawing and writing 300 million takes a
    while.
    """
    block = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "ls1.gamma": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.fc1.weight": (4 * width, width),
        "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width),
        "mlp.fc2.bias": (width,),
        "ls2.gamma": (width,),
    }
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1370, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if registers:
        shapes["register_tokens"] = (1, registers, width)
    for i in range(depth):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    numbers = 0.1 * torch.randn(max(sizes.values()) + len(sizes), generator=generator)
    return {
        name: numbers[start : start + sizes[name]].reshape(shape)
        for start, (name, shape) in enumerate(shapes.items())
    }


def hub_layout(state):
    """A state dict of Meta's in the layout of timm's copies on the hub."""
    if "storage_tokens" not in state:
        return {key: value for key, value in state.items() if key != "mask_token"}
    names = {".ls1.gamma": ".gamma_1", ".ls2.gamma": ".gamma_2", "storage_tokens": "reg_token"}
    left_out = ("qkv.bias", "bias_mask", "periods", "mask_token")
    copied = {}
    for key, value in state.items():
        if not key.endswith(left_out) and not key.startswith("local_cls_norm"):
            for metas, timms in names.items():
                key = key.replace(metas, timms)
            copied[key] = value
    return copied


def hub_cache(root, name, state):
    """Put a state dict where the hub's client keeps timm's model `name`; return the file."""
    folder = Path(root) / f"models--timm--{name}"
    file = folder / "snapshots" / ("0" * 40) / "model.safetensors"
    file.parent.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    save_file({name: value.contiguous().clone() for name, value in state.items()}, file)
    return file
