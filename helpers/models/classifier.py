"""`Classifier` = `backbone` + `linear_head`, and its normalisation."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn

from helpers import InputError
from helpers.models.architectures import architecture, check_image_size
from helpers.models.backbones import Backbone, create_backbone

HEAD_INPUTS = {"cls": 1, "cls+mean": 2, "4xcls+mean": 5}
"""Name of a head input -> its width in units of the backbone's embedding width."""


def torch_device(name: str) -> str:
    """`cpu` or `cuda` for the name of a device, which may be `auto`.

    Raises:
        InputError: cuda was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda was asked for and no GPU is visible; use cpu or auto")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


@dataclass(frozen=True)
class ClassifierConfig:
    """What is needed to rebuild and use a classifier, apart from its weights.

    The last four are of the training chips: what a new chip or scene is compared with. They are
    None where a file is older.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    backbone: str  # a name that `architecture` takes
    weights: str  # `pretrained`, `random` or a file's path; a label once weights are loaded
    image_size: int  # side of the square chips in pixels, a multiple of the backbone's patch size
    bands: tuple[int, ...]  # zero-based, of the files that make a chip, in order
    classes: tuple[str, ...]  # names; of two the second is the positive one
    head_input: str = "cls"  # a name in `HEAD_INPUTS`
    mean: tuple[float, ...] | None = None  # by band, 8-bit chips 0 to 255; None: the backbone's
    std: tuple[float, ...] | None = None
    seed: int = 0  # of random weights, with which alone they can be made again
    new_stem: bool = False  # whether the stem began anew before training, from the seed
    chip_size: int | None = None  # median side in pixels, before they were resized
    chip_bands: int | None = None  # how many bands their files have
    chip_dtype: str | None = None  # in which type they are stored; None for several types
    resolution: float | None = None  # metres on the ground of a pixel, where they had coordinates

    def __post_init__(self):
        """Raise InputError for a field that no classifier can be built from."""
        for name in ("mean", "std"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(architecture(self.backbone), name))
        check_image_size(self.image_size, self.backbone)
        if self.head_input not in HEAD_INPUTS:
            raise InputError(
                f"head_input: {self.head_input!r} is unknown; choose one of "
                f"{', '.join(HEAD_INPUTS)}"
            )
        if len(set(self.classes)) < max(2, len(self.classes)):
            raise InputError(
                f"classes: at least two are needed, all different, got {list(self.classes)}"
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed: {self.seed} is not between 0 and {2**32 - 1}")
        if not self.bands or min(self.bands) < 0:
            raise InputError(f"bands: zero or more for each are needed, got {list(self.bands)}")
        if not len(self.mean) == len(self.std) == len(self.bands):
            raise InputError(
                f"mean ({len(self.mean)}) and std ({len(self.std)}) need one value for each of the "
                f"{len(self.bands)} bands"
            )
        if not all(map(math.isfinite, self.mean + self.std)) or min(self.std) <= 0:
            raise InputError(
                f"mean and std: finite numbers are needed, std above zero, got {list(self.mean)} "
                f"and {list(self.std)}"
            )


def config_from_json(fields: dict) -> ClassifierConfig:
    """Rebuild a configuration from its JSON form, in which tuples are lists.

    Raises:
        InputError: a field that is missing, unknown, of another type or impossible.
    """
    try:
        return TypeAdapter(ClassifierConfig).validate_json(json.dumps(fields))
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise InputError(where + first["msg"].removeprefix("Value error, ")) from None


class Classifier(nn.Module):
    """A backbone and a linear head on chips as they come from `ChipDataset`.

    Normalisation is part of it, so that chips travel to the device as uint8 and no caller can
    forget it.
    """

    def __init__(self, config: ClassifierConfig, backbone: Backbone):
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
        """Chips (N, bands, S, S), uint8 or float in file units -> what the backbone expects.

        In fp32 whatever the backbone computes in: half precision cannot hold 16-bit values.
        """
        normalized = (chips.float() - self.mean) / self.std
        return normalized.to(self.backbone.cls_token.dtype)

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
        return self._logits(self.backbone.forward_features(self.normalize(chips)))

    def tokens(self, chips: Tensor, block: int) -> Tensor:
        """What the first `block` blocks make of chips: (N, bands, S, S) -> (N, T, width).

        All tokens, not normalised: CLS, registers and patches; `forward_from` goes on from them.
        """
        ((patches, prefix),) = self.backbone.forward_intermediates(
            self.normalize(chips),
            indices=[block - 1],
            return_prefix_tokens=True,
            intermediates_only=True,
            stop_early=True,
            output_fmt="NLC",
        )
        return torch.cat([prefix, patches], dim=1)

    def forward_from(self, tokens: Tensor, block: int) -> Tensor:
        """Logits (N, classes) from `tokens(chips, block)` in any precision, by the other blocks."""
        tokens = tokens.to(self.backbone.cls_token.dtype)
        classes = []
        for number, layer in enumerate(self.backbone.blocks[block:], start=block):
            tokens = layer(tokens, **self._position(number))
            classes.append(tokens[:, 0])
        if self.config.head_input == "4xcls+mean":
            earlier = [self.backbone.norm(token) for token in classes[-4:-1]]
            return self._logits(self.backbone.norm(tokens), earlier)
        return self._logits(self.backbone.norm(tokens))

    def _position(self, block: int) -> dict[str, Tensor]:
        """What a block of timm's EVA (DINOv3) is told of the places of patches."""
        rope = getattr(self.backbone, "rope", None)
        if rope is None:
            return {}
        grid = {"shape": self.backbone.patch_embed.grid_size}
        embedding = rope.get_embed(**({} if getattr(rope, "feat_shape", None) else grid))
        by_block = getattr(self.backbone, "rope_mixed", False)
        return {"rope": embedding[block] if by_block else embedding}

    def _logits(self, tokens: Tensor, earlier: Sequence[Tensor] = ()) -> Tensor:
        """From the normalised tokens of the last block, and CLS tokens (N, width) before it."""
        inputs = [*earlier, tokens[:, 0]]
        if self.config.head_input != "cls":
            inputs.append(tokens[:, self.backbone.num_prefix_tokens :].mean(dim=1))
        return self.linear_head(torch.cat(inputs, dim=1))

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
    """Return a new classifier: the backbone with its weights and an untrained head.

    Seeds torch's generator with `config.seed`, so that equal configurations are equal classifiers.
    """
    torch.manual_seed(config.seed)
    backbone = create_backbone(
        config.backbone, config.weights, config.image_size, len(config.bands), config.new_stem
    )
    return Classifier(config, backbone)
