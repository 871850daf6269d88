"""The backbones there are: what the project needs to know of each, and of any other of timm."""

from dataclasses import dataclass, field
from functools import cache

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from helpers import InputError

# Statistics of 8-bit RGB chips, per channel, in units of 0 to 255.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
# DINOv3's README, "Image transforms", for SAT-493M: 0.430, 0.411, 0.296 and 0.213, 0.156, 0.143.
SAT493M_MEAN = (109.65, 104.805, 75.48)
SAT493M_STD = (54.315, 39.78, 36.465)

DINOV3_LICENCE = (
    "DINOv3 License, https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
)

# Attention grows with the fourth power of the side: one block on 4,096 px takes minutes on a CPU.
LARGEST_IMAGE = 4096

BACKBONE_HELP = (
    "example, dinov2_vit{s,b,l,g}14 (each also with _reg), dinov3_vit{s,s..plus,b,l,h..plus,7b}16, "
    "dinov3_vit{l,7b}16_sat, or timm:<name> for another ViT of timm"
)


@dataclass(frozen=True)
class Architecture:
    """One backbone; nothing outside this room asks for more, least of all for its family."""

    timm_name: str  # timm's model and the tag of its weights
    label: str  # the architecture's name in tables
    pretrained_label: str  # the same with its published weights
    patch: int  # side of a patch in pixels
    licence: str  # of the published weights
    pretraining: str  # what they were pretrained on
    mean: tuple[float, ...] = IMAGENET_MEAN  # of 8-bit RGB chips, in units of 0 to 255
    std: tuple[float, ...] = IMAGENET_STD
    published_file: str | None = None  # Meta's file of the weights, to download by hand
    overrides: dict = field(default_factory=dict)  # of timm's defaults
    rope_dtype: torch.dtype = torch.float32  # that periods of the rotary embedding come in


def _dinov2(letter: str, size: str, registers: bool) -> Architecture:
    label = f"ViT-{letter if letter == 'g' else letter.upper()}/14"
    label += " with registers" if registers else ""
    return Architecture(
        timm_name=f"vit_{size}_patch14{'_reg4' if registers else ''}_dinov2.lvd142m",
        label=label,
        pretrained_label=f"DINOv2 {label}",
        patch=14,
        licence="Apache-2.0",
        pretraining="LVD-142M, web",
        published_file=f"dinov2_vit{letter}14{'_reg4' if registers else ''}_pretrain.pth",
        overrides={"img_size": 518},
    )


def _dinov3(name: str, size: str, letters: str, satellite: bool = False) -> Architecture:
    tag = "sat493m" if satellite else "lvd1689m"
    return Architecture(
        timm_name=f"vit_{size}_patch16_dinov3.{tag}",
        label=f"ViT-{letters}/16",
        pretrained_label=f"DINOv3 ViT-{letters}/16" + (" (SAT-493M)" if satellite else ""),
        patch=16,
        licence=DINOV3_LICENCE,
        pretraining="SAT-493M, Maxar satellites" if satellite else "LVD-1689M, web",
        mean=SAT493M_MEAN if satellite else IMAGENET_MEAN,
        std=SAT493M_STD if satellite else IMAGENET_STD,
        published_file=f"dinov3_{name}_pretrain_{tag}-*.pth",
        # Meta's files have a bias on qkv, all but 7B's; timm's default leaves it out. Its attention
        # for rotary embeddings calls qkv as a layer, bias included, and may have fewer heads.
        overrides={"img_size": 256, "attn_type": "rope", "qkv_bias": size != "7b"},
        rope_dtype=torch.bfloat16,
    )


_DINOV3 = {
    "vits16": ("small", "S"),
    "vits16plus": ("small_plus", "S+"),
    "vitb16": ("base", "B"),
    "vitl16": ("large", "L"),
    "vith16plus": ("huge_plus", "H+"),
    "vit7b16": ("7b", "7B"),
}

ARCHITECTURES = {
    "example": Architecture(
        timm_name="vit_tiny_patch16_224",
        label="ViT-Ti/14",
        pretrained_label="example (ViT-Ti/14, distilled)",
        patch=14,
        licence="Apache-2.0",
        pretraining="9,135 overhead chips, distilled from SAM 2's Hiera-Tiny",
        overrides={"patch_size": 14, "init_values": 1e-5, "img_size": 98},
    ),
    **{
        f"dinov2_vit{letter}14{'_reg' if registers else ''}": _dinov2(letter, size, registers)
        for letter, size in {"s": "small", "b": "base", "l": "large", "g": "giant"}.items()
        for registers in (False, True)
    },
    **{f"dinov3_{name}": _dinov3(name, *rest) for name, rest in _DINOV3.items()},
    **{f"dinov3_{name}_sat": _dinov3(name, *_DINOV3[name], True) for name in ("vitl16", "vit7b16")},
}


def architecture(name: str) -> Architecture:
    """Return the architecture of a name in `ARCHITECTURES`, or of `timm:<model>[.<tag>]`.

    Raises:
        InputError: unknown name, or a model of timm that lacks what the head needs.
    """
    if isinstance(name, str) and name.startswith("timm:"):
        return _of_timm(name)
    if name not in ARCHITECTURES:
        raise InputError(
            f"backbone: {name!r} is unknown; choose one of {', '.join(ARCHITECTURES)}, "
            "or timm:<name>"
        )
    return ARCHITECTURES[name]


@cache
def _of_timm(name: str) -> Architecture:
    timm_name = name.removeprefix("timm:")
    if not timm.is_model(timm_name.split(".")[0]):
        raise InputError(f"backbone: {name!r} is unknown to timm {timm.__version__}")
    try:
        with torch.device("meta"):
            model = timm.create_model(timm_name, num_classes=0)
    except Exception as error:  # an unknown tag; models raise whatever they like
        raise InputError(f"backbone: {name!r} cannot be built: {error}") from error
    lacking = _lacking(model)
    if lacking:
        raise InputError(f"backbone: {name!r} {lacking}; choose a plain ViT with a CLS token")
    published = model.pretrained_cfg
    return Architecture(
        timm_name=timm_name,
        label=timm_name,
        pretrained_label=f"timm {timm_name}",
        patch=model.patch_embed.patch_size[0],
        licence=published.get("license") or "not stated by timm",
        pretraining=published.get("tag") or "none",
        mean=tuple(255 * value for value in published["mean"]),
        std=tuple(255 * value for value in published["std"]),
    )


def _lacking(model: nn.Module) -> str | None:
    """What a model of timm lacks of what heads and adapters stand on; None if nothing."""
    if not isinstance(model, VisionTransformer | Eva):
        return f"is no plain ViT of timm, but its {type(model).__name__}"
    if model.cls_token is None:
        return "has no CLS token"
    if type(model.patch_embed) is not PatchEmbed or len(set(model.patch_embed.patch_size)) > 1:
        return "does not cut chips into square patches"
    if isinstance(model.norm, nn.Identity):
        return "has no norm on its tokens, only one after pooling"
    if len(model.blocks) < 4:
        return f"has {len(model.blocks)} blocks, and head inputs are made from the last four"
    return None


def check_image_size(image_size: int, backbone: str) -> None:
    """Raise InputError naming the next sizes if patches do not fill an image, or it is too large.

    `image_size` is its side in pixels.
    """
    patch = architecture(backbone).patch
    if image_size > LARGEST_IMAGE:
        raise InputError(f"image_size: {image_size} is larger than {LARGEST_IMAGE}")
    if image_size < patch or image_size % patch:
        below = max(image_size // patch, 1) * patch
        raise InputError(
            f"image_size: {image_size} is not a multiple of {backbone}'s patch size {patch}; "
            f"the next sizes are {below} and {below + patch}"
        )


def backbone_label(backbone: str, weights: str) -> str:
    """Name of a backbone and its weights as it must stand beside every number."""
    known = architecture(backbone)
    if weights == "pretrained":
        return known.pretrained_label
    if weights == "random":
        return f"{known.label}, random weights"
    return f"{known.label}, weights from {weights.rsplit('/', 1)[-1]}"


def weights_licence(backbone: str, weights: str) -> str | None:
    """Licence of the weights a classifier starts from; None for random ones.

    A file is taken for the published one of its architecture: whoever trained another knows.
    """
    return None if weights == "random" else architecture(backbone).licence
