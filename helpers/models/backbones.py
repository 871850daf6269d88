"""Architectures, and where their weights come from.

Architectures are timm's DINOv2 ViTs. Weights come from the hub through timm, from a local file
(timm's layout or Meta's published one), from the embedded example, or are random.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors import safe_open
from timm.models import adapt_input_conv, load_state_dict_from_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from helpers import InputError
from helpers.records import ROOT

PATCH = 14


EXAMPLE_WEIGHTS = ROOT / "example" / "backbone.safetensors"


# ImageNet statistics in units of 8-bit chips: what DINOv2 was trained with.
IMAGENET_MEAN = (123.675, 116.28, 103.53)


IMAGENET_STD = (58.395, 57.12, 57.375)


_EXAMPLE = {"patch_size": PATCH, "init_values": 1e-5, "img_size": 98}


_DINOV2 = {"img_size": 518}


@dataclass(frozen=True)
class Architecture:
    """A timm model, the overrides that make it ours, and its name in tables."""

    timm_name: str
    overrides: dict
    label: str


ARCHITECTURES = {"example": Architecture("vit_tiny_patch16_224", _EXAMPLE, "ViT-Ti/14")} | {
    f"dinov2_vit{letter}14{suffix}": Architecture(
        f"vit_{size}_patch14{timm_suffix}_dinov2.lvd142m",
        _DINOV2,
        f"ViT-{letter if letter == 'g' else letter.upper()}/14"
        + (" with registers" if suffix else ""),
    )
    for letter, size in {"s": "small", "b": "base", "l": "large", "g": "giant"}.items()
    for suffix, timm_suffix in {"": "", "_reg": "_reg4"}.items()
}


def check_choice(parameter: str, value, choices) -> None:
    """Raise InputError, listing the choices, if value is not one of them."""
    if value not in choices:
        raise InputError(f"{parameter}: {value!r} is unknown; choose one of {', '.join(choices)}")


def check_image_size(image_size: int) -> None:
    """Raise InputError naming the two next sizes if image_size is not a multiple of 14."""
    if image_size < PATCH or image_size % PATCH:
        below = max(image_size // PATCH, 1) * PATCH
        raise InputError(
            f"image_size: {image_size} is not a multiple of the patch size {PATCH}; "
            f"the next sizes are {below} and {below + PATCH}"
        )


def backbone_label(backbone: str, weights: str) -> str:
    """Name of a backbone and its weights as it must stand beside every number."""
    if weights == "random":
        return f"{ARCHITECTURES[backbone].label}, random weights"
    if backbone == "example" and weights == "pretrained":
        return "example (ViT-Ti/14, distilled)"
    if weights == "pretrained":
        return f"DINOv2 {ARCHITECTURES[backbone].label}"
    return f"{ARCHITECTURES[backbone].label}, weights from {Path(weights).name}"


def build_backbone(
    name: str, image_size: int | None = None, in_chans: int = 3, initialise: bool = True
) -> VisionTransformer:
    """Return a timm VisionTransformer without a head, and without pretrained weights.

    Under `torch.device("meta")` it takes no memory, which is enough to count parameters.

    Args:
        name: a name in `ARCHITECTURES`.
        image_size: pixels, a multiple of 14; None for the size the weights were made at.
        in_chans: bands of a chip.
        initialise: whether to draw random weights, which takes seconds; not where others follow.

    Raises:
        InputError: unknown name, or a size that patches of 14 do not fill.
    """
    check_choice("backbone", name, ARCHITECTURES)
    architecture = ARCHITECTURES[name]
    overrides = architecture.overrides | {"in_chans": in_chans}
    if image_size is not None:
        check_image_size(image_size)
        overrides |= {"img_size": image_size}
    if not initialise:
        overrides |= {"weight_init": "skip"}
    return timm.create_model(architecture.timm_name, num_classes=0, **overrides)


def create_backbone(
    name: str, weights: str = "pretrained", image_size: int | None = None, in_chans: int = 3
) -> VisionTransformer:
    """Return a backbone with its weights.

    Args:
        name: a name in `ARCHITECTURES`.
        weights: `pretrained` (hub for DINOv2's names, the embedded file for `example`), `random`
            (from torch's global seed), or the path of a file in timm's or Meta's layout.
        image_size: pixels, a multiple of 14.
        in_chans: bands of a chip; a pretrained stem is repeated over other counts than 3 and
            rescaled (timm's `adapt_input_conv`).

    Raises:
        InputError: unknown name, unreachable hub, or a file that does not fill the architecture.
    """
    backbone = build_backbone(name, image_size, in_chans, initialise=weights == "random")
    if weights == "random":
        return backbone
    if weights == "pretrained" and name != "example":
        state, source = _hub_state_dict(name), f"hub weights of {name}"
    else:
        path = EXAMPLE_WEIGHTS if weights == "pretrained" else Path(weights)
        state, source = read_state_dict(path), str(path)
    load_backbone_weights(backbone, state, source)
    return backbone


def load_backbone_weights(backbone: VisionTransformer, state: dict[str, Tensor], source: str):
    """Fill a backbone completely from a state dict in timm's or Meta's layout.

    Position embeddings are resampled to the backbone's grid as Meta's code does
    (`resample_pos_embed`), and the stem is adapted to its band count.

    Args:
        backbone: any timm VisionTransformer.
        state: key -> tensor of any floating type.
        source: what error messages call the state dict.

    Raises:
        InputError: naming the keys that are missing, unexpected or of another shape.
    """
    state = _timm_layout({key: value.float() for key, value in state.items()})
    if "pos_embed" in state and state["pos_embed"].ndim == 3:
        state["pos_embed"] = resample_pos_embed(
            state["pos_embed"], backbone.patch_embed.grid_size[0], registers="reg_token" in state
        )
    if "patch_embed.proj.weight" in state:
        stem = state["patch_embed.proj.weight"]
        in_chans = backbone.patch_embed.proj.in_channels
        if stem.ndim == 4 and stem.shape[1] == 3 and in_chans != 3:
            state["patch_embed.proj.weight"] = adapt_input_conv(in_chans, stem)
    load_complete(backbone, state, source)


def _timm_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta's published layout in timm's names; timm's own layout passes unchanged.

    timm's `checkpoint_filter_fn` does the same, but it also resamples whatever does not fit, and
    fails on files of another architecture before they can be named.
    """
    state = {
        key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): value
        for key, value in state.items()
        if key != "mask_token"  # only used in DINOv2's own training
    }
    if {"register_tokens", "cls_token", "pos_embed"} <= state.keys():
        # With registers, timm has the position of CLS within the token itself.
        position = state["pos_embed"]
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + position[:, :1]
        state["pos_embed"] = position[:, 1:]
    return state


def resample_pos_embed(pos_embed: Tensor, grid: int, registers: bool) -> Tensor:
    """Resample position embeddings to a square grid the way Meta's published models do.

    Without registers Meta resamples with plain bicubic interpolation and a scale factor of
    (grid + 0.1) / old grid; with registers antialiased and to the size itself
    (`interpolate_antialias`, `interpolate_offset` in dinov2/hub/backbones.py). timm always does
    the latter, which moves features of models without registers by up to 0.65 at 98 px.

    Args:
        pos_embed: (1, prefix + old_grid ** 2, width) with prefix 0 or 1.
        grid: patches along one side.
        registers: whether the model has register tokens.
    """
    old = math.isqrt(pos_embed.shape[1])
    prefix = pos_embed.shape[1] - old**2
    if old == grid:
        return pos_embed
    patches = pos_embed[:, prefix:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    how = {"size": (grid, grid)} if registers else {"scale_factor": (grid + 0.1) / old}
    patches = functional.interpolate(patches, mode="bicubic", antialias=registers, **how)
    return torch.cat([pos_embed[:, :prefix], patches.flatten(2).transpose(1, 2)], dim=1)


def _hub_state_dict(name: str) -> dict[str, Tensor]:
    """Weights of a DINOv2 backbone from the hub (or its local cache), at their own image size."""
    hub_id = timm.get_pretrained_cfg(ARCHITECTURES[name].timm_name).hf_hub_id
    try:
        return load_state_dict_from_hf(hub_id, "model.safetensors")
    except Exception as error:  # timm, huggingface_hub and the HTTP client each raise their own
        raise InputError(
            f"backbone {name}: its weights could not be fetched from the hub "
            f"({type(error).__name__}). Check the connection, or download Meta's "
            f"{name.removesuffix('_reg')}{'_reg4' if name.endswith('_reg') else ''}_pretrain.pth "
            "by hand and pass its path as weights"
        ) from error


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a flat state dict from a .safetensors or PyTorch file without running any pickle code.

    Raises:
        InputError: file missing, truncated, or holding anything but tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"weights: no such file: {path}; give the path of a .safetensors or .pth file, or for "
            "a new classifier one of the words pretrained, random"
        )
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and safetensors readers each raise their own
        raise InputError(
            f"weights: {path} is truncated or not a file of plain tensors "
            f"({type(error).__name__}); download it again"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise InputError(
            f"weights: {path} does not hold a flat state dict (name -> tensor); "
            "save the model's state_dict() by itself"
        )
    return state


def load_complete(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load with every key present, none left over and all shapes equal, or raise InputError."""
    own = module.state_dict()
    missing = own.keys() - state.keys()
    unexpected = state.keys() - own.keys()
    shapes = {
        key: f"{tuple(state[key].shape)} in place of {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    }
    if missing or unexpected or shapes:
        _refuse(source, missing, unexpected, shapes)
    module.load_state_dict(state)


def _refuse(source: str, missing, unexpected, shapes: dict) -> None:
    def some(keys):
        keys = sorted(keys)
        return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")

    parts = [
        f"{what}: {some(keys)}"
        for what, keys in {
            "missing": missing,
            "unexpected": unexpected,
            "of another shape": [f"{key} {shape}" for key, shape in shapes.items()],
        }.items()
        if keys
    ]
    raise InputError(
        f"{source}: these weights are not of this architecture; {'; '.join(parts)}. "
        "Choose the backbone that the file was made for"
    )


def weights_digest(module: nn.Module) -> str:
    """Short SHA-256 over names and values of a module's state, to tell weights apart."""
    return state_digest(module.state_dict())


def state_digest(state: dict[str, Tensor]) -> str:
    """Short SHA-256 over the names and values of a state dict."""
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
