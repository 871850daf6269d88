"""Build a backbone, and fill it with weights.

Backbones are timm's ViTs (`architectures`). Weights come from the hub through timm, from a local
file (timm's layout or Meta's published one), from the embedded example, or are random.
"""

import hashlib
import math
from functools import cache
from pathlib import Path

import timm
import torch
from safetensors import safe_open
from timm.layers import PatchDropout, PatchDropoutWithIndices
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models import adapt_input_conv, eva, load_state_dict_from_hf, vision_transformer
from torch import Tensor, nn
from torch.nn import functional

from helpers import InputError
from helpers.models.architectures import architecture, check_image_size, weights_licence
from helpers.records import ROOT

EXAMPLE_WEIGHTS = ROOT / "example" / "backbone.safetensors"

# Licences that ask for nothing that a user of the weights would not expect.
_PERMISSIVE = ("apache-2.0", "mit")

Backbone = vision_transformer.VisionTransformer | eva.Eva
"""`forward_features` gives CLS first, then registers, then patches."""


class Rope(RotaryEmbeddingDinoV3):
    """DINOv3's rotary embedding, its periods among the weights and in fp32 whatever the rest is.

    timm computes them at every start and after every change of precision, and saves none. Meta's
    published files hold them, rounded to bf16, and Meta's code uses what the file holds: features
    differ by up to 8.5e-3.
    """

    def _apply(self, fn, *args, **kwargs):
        periods = self.periods
        super()._apply(fn, *args, **kwargs)
        self.register_buffer("periods", periods.to(self.periods.device))
        return self


def build_backbone(
    name: str, image_size: int | None = None, in_chans: int = 3, initialise: bool = True
) -> Backbone:
    """Return a timm ViT without a head, and without pretrained weights.

    Under `torch.device("meta")` it takes no memory, which is enough to count parameters. Its image
    size in pixels is that of the weights by default. To draw random weights takes seconds; do not
    `initialise` where others follow.

    Raises:
        InputError: unknown name, or a size that patches do not fill.
    """
    chosen = architecture(name)
    overrides = chosen.overrides | {"in_chans": in_chans, "num_classes": 0}
    if image_size is not None:
        check_image_size(image_size, name)
        overrides |= {"img_size": image_size}
    if initialise:
        backbone = timm.create_model(chosen.timm_name, **overrides)
    else:
        with torch.device("meta"):
            backbone = timm.create_model(chosen.timm_name, **overrides)
        backbone.to_empty(device=torch.get_default_device())
        for module in backbone.modules():
            if hasattr(module, "init_non_persistent_buffers"):
                module.init_non_persistent_buffers()
    backbone.reset_classifier(0, "token")  # timm pools some by the mean of patches
    _join_qkv_bias(backbone)
    rope = getattr(backbone, "rope", None)
    if isinstance(rope, RotaryEmbeddingDinoV3):
        rope.__class__ = Rope
        rope.register_buffer("periods", rope.periods.to(chosen.rope_dtype).float())
    return backbone


def _join_qkv_bias(backbone: Backbone) -> None:
    """Make the biases that timm's EVA keeps beside qkv part of that layer.

    There, attention multiplies with the layer's weight and never calls the layer: an adapter on it
    would get no gradient and change nothing, without a word.
    """
    for block in backbone.blocks:
        attention = block.attn
        if getattr(attention, "q_bias", None) is not None:
            parts = (attention.q_bias, attention.k_bias, attention.v_bias)
            attention.qkv.bias = nn.Parameter(torch.cat(parts).detach())
            attention.q_bias = attention.k_bias = attention.v_bias = None


def create_backbone(
    name: str,
    weights: str = "pretrained",
    image_size: int | None = None,
    in_chans: int = 3,
    new_stem: bool = False,
) -> Backbone:
    """Return a backbone with its weights.

    `weights` are `pretrained` (from the hub, for `example` the embedded file), `random` (from
    torch's global seed), or the path of a file in timm's or Meta's layout. A pretrained stem is
    repeated over other counts of bands than 3 and rescaled (timm's `adapt_input_conv`); a new one
    begins from torch's global seed. The licence of weights that ask for something is printed, once.

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
    if name.startswith("timm:"):
        state = _filtered_by_timm(backbone, state, source)
    load_backbone_weights(backbone, state, source)
    if new_stem:
        backbone.patch_embed.proj.reset_parameters()
    licence = weights_licence(name, weights)
    if licence.lower() not in _PERMISSIVE:
        _print_once(f"Weights of {name}: {licence}")
    return backbone


@cache
def _print_once(line: str) -> None:
    print(line)


def load_backbone_weights(backbone: Backbone, state: dict[str, Tensor], source: str) -> None:
    """Fill a backbone completely from a state dict in timm's or Meta's layout.

    Position embeddings are resampled to the backbone's grid as Meta's code does
    (`resample_pos_embed`), and the stem is adapted to its band count. Error messages call the state
    dict (key -> tensor of any floating type) by its `source`.

    Raises:
        InputError: naming the keys that are missing, unexpected or of another shape, or the
            tensors that are not finite floating-point numbers.
    """
    _check_floating(state, source)
    state = _timm_layout({key: value.float() for key, value in state.items()})
    if "blocks.0.gamma_1" in state:
        # timm's files hold no periods, and no biases of qkv where all of them are zero.
        state = {k: v for k, v in backbone.state_dict().items() if k == "rope.periods"} | state
        if not any(key.endswith("qkv.bias") for key in state):
            state |= {
                key: torch.zeros_like(value)
                for key, value in backbone.state_dict().items()
                if key.endswith("qkv.bias")
            }
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


# Meta's names of layers -> timm's. DINOv2: w12, w3; DINOv3: w1, w2, w3.
_LAYERS = {
    ".mlp.w12.": ".mlp.fc1.",
    ".mlp.w1.": ".mlp.fc1_g.",
    ".mlp.w2.": ".mlp.fc1_x.",
    ".mlp.w3.": ".mlp.fc2.",
}
_DINOV3_NAMES = {
    "storage_tokens": "reg_token",
    "rope_embed.periods": "rope.periods",
    ".ls1.gamma": ".gamma_1",
    ".ls2.gamma": ".gamma_2",
}


def _renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    def rename(key: str) -> str:
        for old, new in names.items():
            key = key.replace(old, new)
        return key

    return {rename(key): value for key, value in state.items()}


def _timm_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Meta's published layouts in the names of `build_backbone`; timm's names stay.

    timm's `checkpoint_filter_fn` does nearly the same, but it also resamples whatever does not
    fit, fails on files of another architecture before they can be named, and drops biases.
    """
    # What only Meta's own training uses.
    state = {k: v for k, v in state.items() if not k.startswith(("mask_token", "local_cls_norm."))}
    state = _renamed(state, _LAYERS)
    if "storage_tokens" in state:
        state = _renamed(state, _DINOV3_NAMES)
        for key in [key for key in state if key.endswith(".qkv.bias_mask")]:
            bias = key.removesuffix("_mask")
            state[bias] = state.get(bias, 0) * state.pop(key) + 0.0  # and not -0.0
    if {"register_tokens", "cls_token", "pos_embed"} <= state.keys():
        # With registers, timm has the position of CLS within the token itself.
        position = state["pos_embed"]
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + position[:, :1]
        state["pos_embed"] = position[:, 1:]
    for key in [key for key in state if key.endswith(".attn.q_bias")]:  # timm's EVA
        q, v = state.pop(key), state.pop(key.replace("q_bias", "v_bias"))
        state[key.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    return state


def _filtered_by_timm(backbone: Backbone, state: dict, source: str) -> dict[str, Tensor]:
    """The state dict of a model that only timm knows, as timm itself would load it, less heads."""
    module = eva if isinstance(backbone, eva.Eva) else vision_transformer
    try:
        state = module.checkpoint_filter_fn(_timm_layout(state), backbone)
    except Exception as error:  # of a file of another architecture, anything
        raise InputError(
            f"{source}: these weights are not of this architecture ({error})"
        ) from error
    return {k: v for k, v in state.items() if not k.startswith(("head.", "head_dist.", "fc_norm."))}


def resample_pos_embed(pos_embed: Tensor, grid: int, registers: bool) -> Tensor:
    """Resample position embeddings to a square grid the way Meta's published models do.

    Without registers Meta resamples with plain bicubic interpolation and a scale factor of
    (grid + 0.1) / old grid; with registers antialiased and to the size itself
    (`interpolate_antialias`, `interpolate_offset` in dinov2/hub/backbones.py). timm always does
    the latter, which moves features of models without registers by up to 0.65 at 98 px.

    From (1, prefix + old_grid ** 2, width), prefix 0 or 1, to (1, prefix + grid ** 2, width).
    """
    old = math.isqrt(pos_embed.shape[1])
    prefix = pos_embed.shape[1] - old**2
    if old in (0, grid):
        return pos_embed
    patches = pos_embed[:, prefix:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    how = {"size": (grid, grid)} if registers else {"scale_factor": (grid + 0.1) / old}
    patches = functional.interpolate(patches, mode="bicubic", antialias=registers, **how)
    return torch.cat([pos_embed[:, :prefix], patches.flatten(2).transpose(1, 2)], dim=1)


def _hub_state_dict(name: str) -> dict[str, Tensor]:
    """Published weights from the hub (or its local cache), at their own image size."""
    chosen = architecture(name)
    hub_id = timm.get_pretrained_cfg(chosen.timm_name).hf_hub_id
    by_hand = f"Meta's {chosen.published_file}" if chosen.published_file else "its file"
    try:
        return load_state_dict_from_hf(hub_id, "model.safetensors")
    except Exception as error:  # timm, huggingface_hub and the HTTP client each raise their own
        raise InputError(
            f"backbone {name}: its weights could not be fetched from the hub "
            f"({type(error).__name__}). Check the connection, or download {by_hand} by hand and "
            "pass its path as weights"
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
    odd = [k for k, v in state.items() if v.layout is not torch.strided or v.device.type != "cpu"]
    if odd:
        raise InputError(
            f"weights: {path} holds sparse or empty tensors ({_some(odd)}); save dense ones"
        )
    return state


def load_complete(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load what `check_complete` passes; else the module stays as it was."""
    check_complete(module.state_dict(), state, source)
    module.load_state_dict(state)


def check_complete(wanted: dict[str, Tensor], state: dict[str, Tensor], source: str) -> None:
    """Raise InputError unless a state dict has exactly the wanted keys and shapes, all finite."""
    _check_floating(state, source)
    shapes = {
        f"{key} {tuple(state[key].shape)} in place of {tuple(wanted[key].shape)}"
        for key in wanted.keys() & state.keys()
        if wanted[key].shape != state[key].shape
    }
    faults = {
        "missing": wanted.keys() - state.keys(),
        "unexpected": state.keys() - wanted.keys(),
        "of another shape": shapes,
    }
    if any(faults.values()):
        parts = [f"{what}: {_some(keys)}" for what, keys in faults.items() if keys]
        raise InputError(
            f"{source}: these weights are not of this architecture; {'; '.join(parts)}. "
            "Choose the backbone that the file was made for"
        )
    broken = [key for key, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise InputError(
            f"{source}: weights that are not finite numbers: {_some(broken)}; the file is damaged "
            "or its training diverged"
        )


def _check_floating(state: dict[str, Tensor], source: str) -> None:
    odd = [f"{k} ({value.dtype})" for k, value in state.items() if not value.is_floating_point()]
    if odd:
        raise InputError(f"{source}: weights that are not floating-point numbers: {_some(odd)}")


def _some(keys) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def drop_patches(backbone: Backbone, rate: float) -> None:
    """Leave out a share of the patches in training (PatchDropout, Liu et al. 2022).

    arXiv:2208.07220; none is left out in evaluation.
    """
    # timm's EVA has none by default, and tells its rotary embedding which patches are left.
    kind = PatchDropout if backbone.patch_drop else PatchDropoutWithIndices
    backbone.patch_drop = kind(rate, num_prefix_tokens=backbone.num_prefix_tokens)


def weights_digest(module: nn.Module) -> str:
    """Short SHA-256 over names and values of a module's state, to tell weights apart."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
