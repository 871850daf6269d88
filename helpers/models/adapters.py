"""Adapters around a `Classifier`, through PEFT: add, count, merge, transfer, save and load.

Apart from `classifier.py`, and PEFT is loaded when an adapter is made: it loads transformers, half
of the seconds in which a command starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ConfigDict, TypeAdapter
from torch import nn

from helpers import InputError
from helpers.models.backbones import check_complete, read_state_dict, weights_digest
from helpers.models.classifier import Classifier, create_classifier
from helpers.models.files import read_record, without_folders
from helpers.records import written_whole_folder

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class PeftMethod:
    """How PEFT adapts a layer.

    `options` are what its configuration has besides rank, scale, dropout and the layers. `names`
    say what that class calls a field of `AdapterSettings`; others have no meaning for the method.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    config: str = "LoraConfig"  # name of PEFT's class
    names: Mapping[str, str] = field(
        default_factory=lambda: {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
    )
    b_rate: float = 1.0  # rate of B, of biases and magnitudes, in units of that of A


# Not here: EVA's initialisation, which needs activations of training chips.
PEFT_METHODS = {
    "lora": PeftMethod(),  # Hu et al. 2021, arXiv:2106.09685
    "dora": PeftMethod({"use_dora": True}),  # Liu et al. 2024, arXiv:2402.09353
    "rslora": PeftMethod({"use_rslora": True}),  # Kalajdzievski 2023, arXiv:2312.03732
    "pissa": PeftMethod({"init_lora_weights": "pissa"}),  # Meng et al. 2024, arXiv:2404.02948
    "loraplus": PeftMethod(b_rate=16.0),  # Hayou et al. 2024, arXiv:2402.12354, and their ratio
    "miss": PeftMethod(  # Kang and Yin 2024, arXiv:2409.15371
        config="MissConfig", names={"rank": "r", "dropout": "miss_dropout"}
    ),
}
"""One entry adds a method; nothing else asks which one it is."""

METHODS = ("head_only", *PEFT_METHODS, "full")


@dataclass(frozen=True)
class AdapterSettings:
    """What is adapted, and how."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    rank: int = 4  # r, width of the low-rank update B @ A
    alpha: float = 8  # the update is scaled by alpha / rank (rslora: alpha over the rank's root)
    dropout: float = 0.1  # on the input of A, in training
    targets: tuple[str, ...] = ("qkv",)  # linear layers in the blocks: qkv, proj, fc1, fc2
    method: str = "lora"  # a name in `PEFT_METHODS`
    blocks: int | None = None  # how many of the backbone's last blocks; None for all
    stem: bool = False  # whether all weights of the patch embedding are trained too


def add_adapter(classifier: Classifier, settings: AdapterSettings) -> PeftModel:
    """Wrap a classifier, in place, so that only the adapter and the head (and stem) are trained.

    PEFT changes the classifier's modules; build a new one for every adapter.

    Raises:
        InputError: rank below 1 or above every layer's width, an unknown method, or a target that
            names no linear layer of the blocks.
    """
    import peft

    layers = {
        name.rsplit(".", 1)[-1]: module
        for name, module in classifier.backbone.blocks.named_modules()
        if isinstance(module, nn.Linear)
    }
    unknown = sorted(set(settings.targets) - layers.keys())
    if unknown or not settings.targets:
        raise InputError(
            f"lora_targets: {unknown[:4] or 'nothing'} names no linear layer of the blocks; "
            f"there are {', '.join(sorted(layers))}"
        )
    largest = max(min(layers[name].weight.shape) for name in settings.targets)
    if not 1 <= settings.rank <= largest:
        raise InputError(f"lora_rank: {settings.rank} is not between 1 and {largest}")
    first = first_adapted(settings.blocks, len(classifier.backbone.blocks))
    if settings.method not in PEFT_METHODS:
        raise InputError(f"method: {settings.method!r} is none of {', '.join(PEFT_METHODS)}")
    method = PEFT_METHODS[settings.method]
    config = getattr(peft, method.config)(
        **{theirs: getattr(settings, ours) for ours, theirs in method.names.items()},
        target_modules=list(settings.targets),
        # In blocks only: the patch embedding's convolution is called proj too.
        layers_to_transform=list(range(first, len(classifier.backbone.blocks))),
        layers_pattern="blocks",
        modules_to_save=["linear_head", *["patch_embed.proj"] * settings.stem],
        bias="none",
        **method.options,
    )
    model = peft.get_peft_model(classifier, config)
    model.adapter_settings = settings
    return model


def first_adapted(blocks: int | None, depth: int) -> int:
    """Number of the first of the last `blocks` blocks (None: all); those before it are frozen.

    Raises:
        InputError: a number that is not between 1 and the backbone's depth.
    """
    if blocks is None:
        return 0
    if not 1 <= blocks <= depth:
        raise InputError(
            f"adapted_blocks: {blocks} is not between 1 and {depth}, the backbone's blocks"
        )
    return depth - blocks


def adapter_parameters(model: PeftModel) -> dict[str, int]:
    """Numbers of trainable parameters: `magnitude` (DoRA's), `head`, and `lora`, all others.

    And `stem`, where it is trained.
    """
    counts = {"magnitude": 0, "linear_head": 0, "patch_embed": 0, "": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[next(kind for kind in counts if kind in name)] += parameter.numel()
    stem = {"stem": counts["patch_embed"]} if counts["patch_embed"] else {}
    parts = {"lora": counts[""], "magnitude": counts["magnitude"], "head": counts["linear_head"]}
    return parts | stem


def rate_factors(model: PeftModel) -> dict[nn.Parameter, float]:
    """Trained parameter -> what its learning rate is in units of the run's (LoRA+)."""
    from peft.optimizers import create_loraplus_optimizer

    ratio = PEFT_METHODS[model.adapter_settings.method].b_rate
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=ratio)
    return {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def merge_adapter(model: PeftModel) -> Classifier:
    """Return the plain classifier with the adapter added into its weights; model is used up.

    Raises:
        ValueError: the weights are not fp32, in which sums of small updates would be rounded.
    """
    if any(p.dtype != torch.float32 for p in model.parameters()):
        raise ValueError("merge in fp32: load the adapter onto an fp32 base first")
    return model.merge_and_unload().eval()


def transfer_adapter(source: PeftModel, classifier: Classifier) -> PeftModel:
    """Put source's adapter and head, in fp32, onto a fresh fp32 classifier."""
    import peft

    target = add_adapter(classifier, source.adapter_settings)
    state = {k: v.float() for k, v in peft.get_peft_model_state_dict(source).items()}
    peft.set_peft_model_state_dict(target, state)
    return target.eval()


def save_adapter(
    model: PeftModel, folder: str | Path, base_digest: str, provenance: dict | None = None
) -> Path:
    """Write an adapter folder in PEFT's format, with what is needed to rebuild its base.

    Beside PEFT's files lies `classifier.json`: the base's configuration, the adapter's settings,
    the provenance as in `save_classifier`, and digests of the base's weights and the adapter's.
    The folder appears whole or not at all. `base_digest` is the `weights_digest` of the backbone
    before the adapter was added, which a method may change (PiSSA moves the principal part of a
    weight into the adapter).
    """
    base = model.get_base_model()
    with written_whole_folder(folder) as part:
        model.save_pretrained(part)
        (part / "README.md").unlink()  # PEFT's empty model card
        record = {
            "config": asdict(base.config),
            "settings": asdict(model.adapter_settings),
            "provenance": without_folders(provenance or {}),
            "base_digest": base_digest,
            "files": {name: _digest((part / name).read_bytes()) for name in _PEFT_FILES},
        }
        record["digest"] = _digest(json.dumps(record).encode())
        (part / "classifier.json").write_text(json.dumps(record, indent=2) + "\n")
    return Path(folder)


_PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")


def load_adapter(folder: str | Path) -> tuple[PeftModel, dict]:
    """Read what `save_adapter` wrote onto a fresh base.

    PEFT's configuration is only compared with its digest: the adapter is built from checked
    settings, so that no pattern from a file is ever matched.

    Returns:
        The model (eval mode, not merged) and its provenance.

    Raises:
        InputError: no adapter folder, damaged or altered files, or a base with other weights than
            the adapter was trained on.
    """
    import peft

    folder = Path(folder)
    try:
        record = json.loads((folder / "classifier.json").read_text())
        digest = record.pop("digest")
        config, provenance = read_record(
            json.dumps(record["config"]), json.dumps(record["provenance"])
        )
        settings = TypeAdapter(AdapterSettings).validate_python(record["settings"])
        changed = [
            name
            for name in _PEFT_FILES
            if _digest((folder / name).read_bytes()) != record["files"].get(name)
        ]
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{folder}: no complete adapter folder of this project ({type(error).__name__}); "
            "pass the adapter folder of a run"
        ) from error
    if _digest(json.dumps(record).encode()) != digest:
        changed.append("classifier.json")
    if changed:
        raise InputError(
            f"{folder}: {' and '.join(changed)} changed after the adapter was saved; "
            "copy the folder again, or train again"
        )
    classifier = create_classifier(config)
    if weights_digest(classifier.backbone) != record["base_digest"]:
        raise InputError(
            f"{folder}: the adapter was trained on other weights than those of "
            f"{config.backbone} ({config.weights}); restore them and load again"
        )
    model = add_adapter(classifier, settings)
    state = read_state_dict(folder / "adapter_model.safetensors")
    check_complete(peft.get_peft_model_state_dict(model), state, str(folder))
    peft.set_peft_model_state_dict(model, state)
    return model.eval(), provenance


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
