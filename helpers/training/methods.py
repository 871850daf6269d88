"""head_only, the methods of PEFT and full on the one training loop."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pandas as pd
import torch
from accelerate import Accelerator
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from helpers.data.dataset import ChipData
from helpers.models.adapters import (
    AdapterSettings,
    adapter_parameters,
    add_adapter,
    first_adapted,
    merge_adapter,
    rate_factors,
    transfer_adapter,
)
from helpers.models.backbones import drop_patches, weights_digest
from helpers.models.classifier import Classifier, head_columns
from helpers.models.export import count_parameters
from helpers.records import reset_peak_memory
from helpers.training.checkpoints import Checkpoint
from helpers.training.config import RunConfig
from helpers.training.examples import ChipExamples, FeatureExamples
from helpers.training.features import Features
from helpers.training.heads import fit_heads, sweep
from helpers.training.loop import Loop, fit, predict
from helpers.training.runs import Run, checkpoint_path, finished_run
from helpers.training.setup import (
    check_space,
    fit_settings,
    new_classifier,
    split_chips,
    split_features,
    tracked_accelerator,
)
from helpers.training.tokens import FromTokens, bare, cached_tokens

if TYPE_CHECKING:
    from peft import PeftModel


def train_head_only(config: RunConfig, data: ChipData, report=print) -> Run:
    """Train the sweep's heads on frozen features, keep the best, test it once.

    Raises:
        InputError: no head trained to a finite loss, or device not there.
    """
    config = config.resolved()
    classifier = new_classifier(config, data)
    check_space(config, classifier)
    digest = weights_digest(classifier.backbone)
    train, valid = (split_features(config, data, classifier, s) for s in ("train", "valid"))
    report(
        f"features of {len(train.targets) + len(valid.targets)} chips: "
        + ("read from the cache" if train.from_cache and valid.from_cache else "computed")
    )
    heads, progress = fit_heads(config, train, valid, len(data.classes), report)
    best = classifier.with_head(heads.inputs[progress.best], heads.heads[progress.best])
    test = split_features(config, data, best, "test")
    probabilities = {
        "valid": _head_probabilities(best, valid),
        "test": _head_probabilities(best, test),
    }
    parameters = count_parameters(best) | {"trainable": count_parameters(best.linear_head)["total"]}
    run = finished_run(
        config, data, best, None, progress, sweep(config), parameters, probabilities, digest
    )
    chips = len(train.targets) + len(valid.targets)
    run.record["features_per_second"] = chips / (train.seconds + valid.seconds)
    return run


@torch.inference_mode()
def _head_probabilities(classifier: Classifier, features: Features) -> Tensor:
    """Probabilities (N, classes) of a classifier from frozen features."""
    # A copy, since a product's last bit can depend on where in memory its rows begin.
    inputs = head_columns(features.values[0], classifier.config.head_input).clone()
    return classifier.linear_head(inputs).softmax(dim=1)


def train_adapted(config: RunConfig, data: ChipData, report=print) -> Run:
    """Train an adapter, or all weights, on the chips; test the merged fp32 classifier once.

    Raises:
        InputError: a parameter of the method is wrong, the device lacks the precision, the
            checkpoint to resume from is of another run, or no epoch had a finite loss.
    """
    measured = config.precision == "auto" and config.precision_seconds()
    config = config.resolved()
    if measured:
        ratio = measured["fp32"] / measured[config.precision]
        report(f"precision: {config.precision}, {ratio:.2f} times as fast as fp32")
    model, group, digest = training_setup(config, data)
    check_space(config, model)
    identity = config.deciding() | {
        "data_fingerprint": data.fingerprint,
        "weights_digest": weights_digest(model),
    }
    with tracked_accelerator(config) as accelerator:
        module, (train, valid), token_record = _inputs(
            config, data, model, digest, accelerator, ("train", "valid"), report
        )
        torch.manual_seed(config.seed + accelerator.process_index)  # dropout
        progress = fit(
            module,
            [group],
            train,
            valid,
            fit_settings(config, train.targets),
            accelerator=accelerator,
            checkpoint=Checkpoint(checkpoint_path(config), identity, config.resume),
            report=report,
        )
    adapter, classifier = None, new_classifier(config, data)
    if config.method == "full":
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        classifier.load_state_dict(trained, strict=False)
    else:
        adapter = transfer_adapter(model.cpu(), classifier)
        classifier = merge_adapter(copy.deepcopy(adapter))
    classifier = classifier.to(accelerator.device).float()
    if not isinstance(valid, ChipExamples):  # tokens: of the chips nothing is decoded yet
        valid = split_chips(config, data, "valid")
    examples = {"valid": valid, "test": split_chips(config, data, "test")}
    probabilities = {
        split: predict(classifier, chips, 64, accelerator)[0] for split, chips in examples.items()
    }
    candidate = pd.DataFrame(
        {name: [getattr(config, name)] for name in ("head_input", "learning_rate", "weight_decay")}
    )
    parameters = _parameters(config, model, classifier)
    run = finished_run(
        config, data, classifier, adapter, progress, candidate, parameters, probabilities, digest
    )
    run.record["tokens"] = token_record
    run.record["precision_seconds_per_step"] = measured or None
    return run


def training_loop(config: RunConfig, data: ChipData) -> Loop:
    """A fresh run of any method but head_only before its first step, for who measures steps."""
    config = config.resolved()
    model, group, digest = training_setup(config, data)
    with tracked_accelerator(config) as accelerator:
        module, (train,), _ = _inputs(config, data, model, digest, accelerator, ("train",))
        loop = Loop(module, [group], train, fit_settings(config, train.targets), accelerator)
    loop.model.train()
    return loop


def _inputs(
    config: RunConfig,
    data: ChipData,
    model: Classifier | PeftModel,
    digest: str,
    accelerator: Accelerator,
    splits: tuple[str, ...],
    report=print,
) -> tuple[nn.Module, list[ChipExamples | FeatureExamples], dict | None]:
    """The module to train, what each split feeds it, and what the record says of kept tokens."""
    record = None
    if block := first_adapted(config.adapted_blocks, len(bare(model).backbone.blocks)):
        tokens, record = cached_tokens(config, data, model, block, digest, accelerator, splits)
        if tokens:
            came = "read from the cache" if record["was_read"] else f"{record['seconds']:.1f} s"
            report(f"tokens of {block} frozen blocks, {record['bytes'] / 1e6:,.0f} MB: {came}")
            return FromTokens(model, block), [tokens[split] for split in splits], record
        report(f"{block} frozen blocks are computed in every epoch: {record['not_kept']}")
    return model, [split_chips(config, data, split) for split in splits], record


def training_setup(config: RunConfig, data: ChipData) -> tuple[Classifier | PeftModel, dict, str]:
    """A fresh model for any method but head_only, reproducible from the seed.

    Returns:
        The model, its parameter group for `fit`, and the digest of the backbone's weights.
    """
    model = new_classifier(config, data)
    digest = weights_digest(model.backbone)
    if config.patch_drop_rate:
        drop_patches(model.backbone, config.patch_drop_rate)
    factors: dict[nn.Parameter, float] = {}
    if config.method == "full":
        if first := first_adapted(config.adapted_blocks, len(model.backbone.blocks)):
            model.backbone.requires_grad_(False)
            model.backbone.blocks[first:].requires_grad_(True)
            model.backbone.norm.requires_grad_(True)
        if config.layer_decay:
            layers = param_groups_layer_decay(model.backbone, layer_decay=config.layer_decay)
            factors = {p: layer["lr_scale"] for layer in layers for p in layer["params"]}
    else:
        model = add_adapter(model, adapter_settings(config))
        factors = rate_factors(model)
    if config.mixed_precision == "bf16":
        # Frozen weights in the precision they are used in: no cast in every step, half the bytes.
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    trained = [p for p in model.parameters() if p.requires_grad]
    group = {
        "params": trained,
        "factors": [factors.get(p, 1.0) for p in trained],
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
    }
    return model, group, digest


def adapter_settings(config: RunConfig) -> AdapterSettings:
    """The adapter that a run asks for."""
    return AdapterSettings(
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=config.lora_targets,
        method=config.method,
        blocks=config.adapted_blocks,
        stem=config.stem is not None,
    )


def _parameters(config: RunConfig, model, classifier: Classifier) -> dict[str, int]:
    """Parameter counts of a run: `total` at inference, `trainable`, and the adapter's parts."""
    if config.method == "full":
        return count_parameters(model)
    parts = adapter_parameters(model)
    total = count_parameters(classifier)["total"]
    return {"total": total, "trainable": sum(parts.values())} | parts


def train(config: RunConfig, data: ChipData, report=print) -> Run:
    """Train by `config.method`; raises as `train_head_only` and `train_adapted`.

    The peak memory in its history is the most since here: features are part of a training.
    """
    reset_peak_memory()
    method = train_head_only if config.method == "head_only" else train_adapted
    return method(config, data, report)
