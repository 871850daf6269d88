"""LoRA and DoRA around a `Classifier`, through PEFT: add, count, merge, transfer, save and load.

Apart from `classifier.py`, so that serving a merged classifier does not load PEFT.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn

from helpers import InputError
from helpers.models.backbones import state_digest, weights_digest
from helpers.models.classifier import Classifier, config_from_json, create_classifier
from helpers.records import written_whole_folder

METHODS = ("head_only", "lora", "dora", "full")


@dataclass(frozen=True)
class AdapterSettings:
    """LoRA (Hu et al. 2021, arXiv:2106.09685) or DoRA (Liu et al. 2024, arXiv:2402.09353).

    Args:
        rank: r, width of the low-rank update B @ A.
        alpha: the update is scaled by alpha / rank.
        dropout: on the input of A, in training.
        targets: names of the linear layers in every block, from qkv, proj, fc1, fc2.
        dora: whether the magnitude of each output is trained apart from its direction.
    """

    rank: int = 4
    alpha: float = 8
    dropout: float = 0.1
    targets: tuple[str, ...] = ("qkv",)
    dora: bool = False


def add_adapter(classifier: Classifier, settings: AdapterSettings) -> PeftModel:
    """Wrap a classifier, in place, so that only the adapter and the head are trained.

    PEFT changes the classifier's modules; build a new one for every adapter.

    Raises:
        InputError: rank below 1, or a target that names no linear layer of the blocks.
    """
    if settings.rank < 1:
        raise InputError(f"lora_rank: {settings.rank} is below 1")
    layers = {
        name.rsplit(".", 1)[-1]
        for name, module in classifier.backbone.blocks.named_modules()
        if isinstance(module, nn.Linear)
    }
    unknown = [target for target in settings.targets if target not in layers]
    if unknown or not settings.targets:
        raise InputError(
            f"lora_targets: {unknown or 'nothing'} names no linear layer of the blocks; "
            f"there are {', '.join(sorted(layers))}"
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        # By path, since the patch embedding's convolution is called proj too.
        target_modules=rf".*\.blocks\..*\.({'|'.join(settings.targets)})",
        modules_to_save=["linear_head"],
        bias="none",
        use_dora=settings.dora,
    )
    return get_peft_model(classifier, config)


def adapter_parameters(model: PeftModel) -> dict[str, int]:
    """Numbers of trainable parameters: `lora` (A and B), `magnitude` (DoRA's) and `head`."""
    kinds = {"lora": "lora_[AB]", "magnitude": "magnitude", "head": "linear_head"}
    return {
        kind: sum(
            p.numel()
            for name, p in model.named_parameters()
            if p.requires_grad and re.search(pattern, name)
        )
        for kind, pattern in kinds.items()
    }


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
    target = get_peft_model(classifier, source.peft_config["default"])
    state = {k: v.float() for k, v in get_peft_model_state_dict(source).items()}
    set_peft_model_state_dict(target, state)
    return target.eval()


def save_adapter(model: PeftModel, folder: str | Path) -> Path:
    """Write an adapter folder in PEFT's format, with what is needed to rebuild its base.

    Beside PEFT's files lies `classifier.json`: the base's configuration and the digest of its
    weights. The folder appears whole or not at all.
    """
    base = model.get_base_model()
    with written_whole_folder(folder) as part:
        model.save_pretrained(part)
        (part / "README.md").unlink()  # PEFT's empty model card
        record = {"config": asdict(base.config), "base_digest": base_digest(model)}
        (part / "classifier.json").write_text(json.dumps(record, indent=2) + "\n")
    return Path(folder)


def load_adapter(folder: str | Path) -> PeftModel:
    """Read what `save_adapter` wrote onto a fresh base; eval mode, not merged.

    Raises:
        InputError: no adapter folder, damaged files, or a base with other weights than the
            adapter was trained on.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / "classifier.json").read_text())
        config = config_from_json(record["config"])
        digest = record["base_digest"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{folder}: not an adapter folder of this project ({type(error).__name__} in "
            "classifier.json); pass the adapter folder of a run"
        ) from error
    classifier = create_classifier(config)
    if weights_digest(classifier.backbone) != digest:
        raise InputError(
            f"{folder}: the adapter was trained on other weights than those of "
            f"{config.backbone} ({config.weights}); restore them and load again"
        )
    try:
        return PeftModel.from_pretrained(classifier, str(folder)).eval()
    except Exception as error:  # PEFT, safetensors and JSON readers each raise their own
        raise InputError(
            f"{folder}: PEFT's files are damaged or missing ({type(error).__name__}: {error})"
        ) from error


def base_digest(model: PeftModel) -> str:
    """`weights_digest` of the backbone under an adapter."""
    state = {
        key.replace(".base_layer.", "."): value
        for key, value in model.get_base_model().backbone.state_dict().items()
        if "lora_" not in key
    }
    return state_digest(state)
