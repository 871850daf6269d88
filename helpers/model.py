"""`Classifier` = `backbone` + `linear_head`: architectures, where weights come from, save and load.

Architectures are timm's DINOv2 ViTs. Weights come from the hub through timm, from a local file
(timm's layout or Meta's published one), from the embedded example, or are random.
"""

import hashlib
import itertools
import json
import math
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import adapt_input_conv, load_state_dict_from_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from helpers import InputError
from helpers.records import written_whole

PATCH = 14
EXAMPLE_WEIGHTS = Path(__file__).resolve().parent.parent / "example" / "backbone.safetensors"
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

HEAD_INPUTS = {"cls": 1, "cls+mean": 2, "4xcls+mean": 5}
"""Name of a head input -> its width in units of the backbone's embedding width."""


@dataclass(frozen=True)
class ClassifierConfig:
    """What is needed to rebuild and use a classifier, apart from its weights.

    Args:
        backbone: a name in `ARCHITECTURES`.
        weights: `pretrained`, `random` or a file's path; a label once weights are loaded.
        image_size: side of the square chips in pixels, a multiple of 14.
        bands: zero-based bands of the files that make a chip, in order.
        classes: class names; for two classes the second is the positive one.
        head_input: a name in `HEAD_INPUTS`.
        mean: per band, in units of the chips (8-bit chips: 0 to 255).
        std: per band, in units of the chips.
    """

    backbone: str
    weights: str
    image_size: int
    bands: tuple[int, ...]
    classes: tuple[str, ...]
    head_input: str = "cls"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self):
        """Raise InputError for a field that no classifier can be built from."""
        check_choice("backbone", self.backbone, ARCHITECTURES)
        check_choice("head_input", self.head_input, HEAD_INPUTS)
        check_image_size(self.image_size)
        if len(self.classes) < 2:
            raise InputError(f"classes: at least two are needed, got {list(self.classes)}")
        if not len(self.mean) == len(self.std) == len(self.bands):
            raise InputError(
                f"mean ({len(self.mean)}) and std ({len(self.std)}) need one value for each of the "
                f"{len(self.bands)} bands"
            )


def config_from_json(fields: dict) -> ClassifierConfig:
    """Rebuild a configuration from its JSON form, in which tuples are lists."""
    return ClassifierConfig(
        **{key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    )


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


# --- Backbones -----------------------------------------------------------------------------------


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
    _load_complete(backbone, state, source)


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


def _load_complete(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
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


# --- Classifier ----------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A backbone and a linear head on chips as they come from `ChipDataset`.

    Normalisation is part of it, so that chips travel to the device as uint8 and no caller can
    forget it.
    """

    def __init__(self, config: ClassifierConfig, backbone: VisionTransformer):
        """Join a backbone built for config.image_size and len(config.bands) with a new head."""
        super().__init__()
        self.config = config
        self.backbone = backbone
        width = backbone.embed_dim * HEAD_INPUTS[config.head_input]
        # As in DINOv2's linear evaluation: a small random weight, no bias.
        self.linear_head = nn.Linear(width, len(config.classes))
        nn.init.normal_(self.linear_head.weight, std=0.01)
        nn.init.zeros_(self.linear_head.bias)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(config, name), dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def normalize(self, chips: Tensor) -> Tensor:
        """Chips (N, bands, S, S), uint8 or float in file units -> what the backbone expects."""
        return (chips.to(self.mean.dtype) - self.mean) / self.std

    def features(self, chips: Tensor) -> Tensor:
        """All head inputs at once: chips (N, bands, S, S) -> (N, 5 * width).

        The columns are the normalised CLS tokens of the last four blocks, earliest first, then
        the mean patch token of the last; `head_columns` picks one head input out of them.
        """
        tokens = self.backbone.forward_intermediates(
            self.normalize(chips),
            indices=4,
            norm=True,
            return_prefix_tokens=True,
            intermediates_only=True,
            output_fmt="NLC",
        )
        classes = [prefix[:, 0] for _, prefix in tokens]
        return torch.cat([*classes, tokens[-1][0].mean(dim=1)], dim=1)

    def forward(self, chips: Tensor) -> Tensor:
        """Chips (N, bands, S, S), uint8 or float in file units -> logits (N, classes)."""
        if self.config.head_input == "4xcls+mean":
            return self.linear_head(self.features(chips))
        tokens = self.backbone.forward_features(self.normalize(chips))
        inputs = tokens[:, 0]
        if self.config.head_input == "cls+mean":
            patches = tokens[:, self.backbone.num_prefix_tokens :]
            inputs = torch.cat([inputs, patches.mean(dim=1)], dim=1)
        return self.linear_head(inputs)

    def with_head(self, head_input: str, linear_head: nn.Linear) -> "Classifier":
        """The same backbone (shared, not copied) with a trained head on one head input."""
        classifier = Classifier(replace(self.config, head_input=head_input), self.backbone)
        classifier.linear_head.load_state_dict(linear_head.state_dict())
        return classifier.to(self.mean.device).eval()


def head_columns(features: Tensor, head_input: str) -> Tensor:
    """The columns of `Classifier.features` (..., 5 * width) that make up one head input."""
    width = features.shape[-1] // 5
    stop = {"cls": 4}.get(head_input, 5) * width
    return features[..., stop - HEAD_INPUTS[head_input] * width : stop]


def create_classifier(config: ClassifierConfig) -> Classifier:
    """Return a new classifier: the backbone with its weights and an untrained head."""
    backbone = create_backbone(
        config.backbone, config.weights, config.image_size, len(config.bands)
    )
    return Classifier(config, backbone)


def module_tree(module: nn.Module, indent: str = "") -> str:
    """The module's `repr` with equal neighbours folded into one line and no-op modules left out."""
    children = [
        (name, child, repr(child))
        for name, child in module.named_children()
        if not isinstance(child, nn.Identity)
        and getattr(child, "p", None) != 0.0  # dropout that drops nothing
        and not (isinstance(child, nn.ModuleDict | nn.ParameterDict) and len(child) == 0)
    ]
    if not children:
        return repr(module)
    lines = []
    for _, run in itertools.groupby(children, key=lambda entry: entry[2]):
        (first, child, _), *more = run
        name = f"({first}-{more[-1][0]}): {len(more) + 1} x " if more else f"({first}): "
        lines.append(f"{indent}  {name}{module_tree(child, indent + '  ')}")
    return "\n".join([f"{module._get_name()}(", *lines, f"{indent})"])


def count_parameters(module: nn.Module) -> dict[str, int]:
    """Numbers of parameters: `total` and `trainable`."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return {"total": sum(n for n, _ in sizes), "trainable": sum(n for n, grad in sizes if grad)}


# --- Export -------------------------------------------------------------------------------------


def export_onnx(classifier: Classifier, path: str | Path) -> Path:
    """Write the classifier as an ONNX file: `chips` (batch, bands, S, S) uint8 -> `logits`.

    The batch size stays free. Nodes carry the module they come from in their metadata.
    """
    size, bands = classifier.config.image_size, len(classifier.config.bands)
    # Two chips: with one, the exporter would take the batch size for a constant.
    chips = torch.zeros(2, bands, size, size, dtype=torch.uint8)
    with warnings.catch_warnings(action="ignore"):  # deprecations between torch and itself
        program = torch.onnx.export(
            classifier.eval(),
            (chips,),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            input_names=["chips"],
            output_names=["logits"],
            verbose=False,
        )
    with written_whole(path) as part:
        program.save(part)
    return Path(path)


# --- Files ---------------------------------------------------------------------------------------


def save_classifier(classifier: Classifier, path: str | Path, provenance: dict) -> Path:
    """Write one safetensors file that holds all that is needed to use the classifier.

    The metadata carry `config` (ClassifierConfig) and `provenance` as JSON. The file appears
    whole or not at all.
    """
    path = Path(path)
    metadata = {
        "format": "pt",
        "config": json.dumps(asdict(classifier.config)),
        "provenance": json.dumps(provenance),
    }
    state = {key: value.detach().contiguous() for key, value in classifier.state_dict().items()}
    with written_whole(path) as part:
        save_file(state, part, metadata=metadata)
    return path


def load_classifier(path: str | Path) -> tuple[Classifier, dict]:
    """Read what `save_classifier` wrote; return the classifier (eval mode) and its provenance.

    Raises:
        InputError: file missing, truncated, without our metadata, or with other weights in it.
    """
    path = Path(path)
    state = read_state_dict(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        config = config_from_json(json.loads(metadata["config"]))
        provenance = json.loads(metadata["provenance"])
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{path}: not a classifier saved by this project (no usable configuration in its "
            f"metadata: {error}); pass the model_final.safetensors of a run"
        ) from error
    bands = len(config.bands)
    backbone = build_backbone(config.backbone, config.image_size, bands, initialise=False)
    classifier = Classifier(config, backbone)
    _load_complete(classifier, state, str(path))
    return classifier.eval(), provenance
