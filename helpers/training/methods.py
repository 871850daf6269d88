"""head_only, lora, dora and full on the one training loop."""

import copy
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel
from torch import Tensor, nn

from helpers.data.dataset import ChipData, band_statistics
from helpers.models.adapters import (
    AdapterSettings,
    adapter_parameters,
    add_adapter,
    merge_adapter,
    transfer_adapter,
)
from helpers.models.backbones import weights_digest
from helpers.models.classifier import (
    HEAD_INPUTS,
    Classifier,
    ClassifierConfig,
    create_classifier,
    head_columns,
)
from helpers.models.export import count_parameters
from helpers.training.checkpoints import Checkpoint
from helpers.training.config import WITHOUT_EFFECT, RunConfig
from helpers.training.features import (
    DIHEDRAL_VIEWS,
    Features,
    cached_features,
    decoded,
    extract_features,
)
from helpers.training.loop import ChipExamples, FeatureExamples, FitSettings, Progress, fit, predict
from helpers.training.runs import Run, finished_run


class HeadSweep(nn.Module):
    """Linear heads side by side on one feature matrix: every combination of a sweep."""

    def __init__(self, candidates: pd.DataFrame, width: int, classes: int):
        """One head per row of candidates (head_input, sorted by it), width of the backbone."""
        super().__init__()
        self.inputs = candidates.head_input.tolist()
        self.heads = nn.ModuleList(
            nn.Linear(width * HEAD_INPUTS[name], classes) for name in self.inputs
        )
        # From zero, so that a head starts alike alone and in any sweep; its loss is convex.
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, 5 * width) -> logits (heads, N, classes)."""
        logits = []
        # Heads with the same input share one matrix product.
        for name, group in itertools.groupby(
            zip(self.inputs, self.heads, strict=True), lambda p: p[0]
        ):
            heads = [head for _, head in group]
            weight = torch.cat([head.weight for head in heads])
            bias = torch.cat([head.bias for head in heads])
            product = nn.functional.linear(head_columns(features, name), weight, bias)
            logits.append(product.unflatten(1, (len(heads), -1)).transpose(0, 1))
        return torch.cat(logits)


def new_classifier(config: RunConfig, data: ChipData) -> Classifier:
    """Build the classifier for a data set, before training.

    8-bit chips of three bands are normalised as the backbone was pretrained; any others with the
    statistics of the training split.
    """
    mean = std = None
    if len(data.bands) != 3 or set(data.manifest.dtype) != {"uint8"}:
        mean, std = (tuple(map(float, s)) for s in band_statistics(data, config.image_size))
    return create_classifier(
        ClassifierConfig(
            backbone=config.backbone,
            weights=config.weights,
            image_size=config.image_size,
            bands=data.bands,
            classes=data.classes,
            head_input=config.head_inputs[0] if config.method == "head_only" else config.head_input,
            mean=mean,
            std=std,
            seed=config.seed,
            **data.chip_facts,
        )
    )


def split_features(
    config: RunConfig, data: ChipData, classifier: Classifier, split: str
) -> Features:
    """Frozen features of a split, from the cache where they are there already."""
    augmented = config.augment and split == "train"
    return cached_features(
        classifier,
        data,
        split,
        cache_path=config.cache_path,
        device=config.torch_device,
        views=DIHEDRAL_VIEWS if augmented else 1,
    )


def sweep(config: RunConfig) -> pd.DataFrame:
    """All candidates of a head-only run: head_input, learning_rate, weight_decay."""
    rows = itertools.product(config.head_inputs, config.learning_rates, config.weight_decays)
    return pd.DataFrame(rows, columns=["head_input", "learning_rate", "weight_decay"])


def fit_heads(
    config: RunConfig, train: Features, valid: Features, classes: int, report=print
) -> tuple[HeadSweep, Progress]:
    """Train every head of the sweep on cached features in one go."""
    candidates = sweep(config)
    heads = HeadSweep(candidates, train.values.shape[-1] // 5, classes)
    heads.to(config.torch_device)
    groups = [
        {
            "params": list(head.parameters()),
            "lr": row.learning_rate,
            "weight_decay": row.weight_decay,
        }
        for head, row in zip(heads.heads, candidates.itertuples(), strict=True)
    ]
    with _one_thread():
        progress = fit(
            heads,
            groups,
            FeatureExamples(train.values, train.targets),
            FeatureExamples(valid.values, valid.targets),
            _settings(config, train.targets),
            accelerator=new_accelerator(config),
            report=report,
        )
    return heads, progress


def _settings(config: RunConfig, targets: Tensor) -> FitSettings:
    weights = None
    if config.class_weights == "balanced":
        counts = targets.bincount()
        weights = tuple((len(targets) / (len(counts) * counts)).tolist())
    return FitSettings(
        config.epochs,
        config.patience,
        config.batch_size,
        max_grad_norm=None if config.method == "head_only" else config.max_grad_norm,
        class_weights=weights,
        seed=config.seed,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Heads are too small to share: threads would spend more time waiting than computing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_head_only(config: RunConfig, data: ChipData, classifier: Classifier, report=print) -> Run:
    """Train the sweep's heads on frozen features, keep the best, test it once.

    Raises:
        InputError: no head trained to a finite loss, or device not there.
    """
    train = split_features(config, data, classifier, "train")
    valid = split_features(config, data, classifier, "valid")
    report(
        f"features of {len(train.targets) + len(valid.targets)} chips: "
        + ("read from the cache" if train.from_cache and valid.from_cache else "computed")
    )
    heads, progress = fit_heads(config, train, valid, len(data.classes), report)
    candidates = sweep(config).assign(
        best_epoch=progress.best_epoch,
        valid_loss=progress.best_loss,
        valid_auroc=[
            history[epoch - 1]["valid_auroc"] if epoch else np.nan
            for history, epoch in zip(progress.histories, progress.best_epoch, strict=True)
        ],
        failure=progress.failures,
    )
    best = classifier.with_head(heads.inputs[progress.best], heads.heads[progress.best])
    test = split_features(config, data, best, "test")
    with torch.inference_mode():
        inputs = head_columns(test.values[0], best.config.head_input).to(best.mean.device)
        probabilities = best.linear_head(inputs).softmax(dim=1).cpu()
    parameters = count_parameters(best) | {"trainable": count_parameters(best.linear_head)["total"]}
    run = finished_run(config, data, best, None, progress, candidates, parameters, probabilities)
    chips = len(train.targets) + len(valid.targets)
    run.record["features_per_second"] = chips / (train.seconds + valid.seconds)
    return run


def train_adapted(config: RunConfig, data: ChipData, report=print) -> Run:
    """Train an adapter, or all weights, on the chips; test the merged fp32 classifier once.

    Raises:
        InputError: a parameter of the method is wrong, the device lacks the precision, the
            checkpoint to resume from is of another run, or no epoch had a finite loss.
    """
    accelerator = new_accelerator(config)
    model, group, train = training_setup(config, data)
    torch.manual_seed(config.seed + accelerator.process_index)  # dropout
    progress = fit(
        model,
        [group],
        train,
        _chips(config, data, "valid"),
        _settings(config, train.targets),
        accelerator=accelerator,
        checkpoint=Checkpoint(
            config.folder / "checkpoint.pt", _identity(config, data, model), config.resume
        ),
        report=report,
    )
    adapter, classifier = None, model
    if config.method != "full":
        adapter = transfer_adapter(model.cpu(), new_classifier(config, data))
        classifier = merge_adapter(copy.deepcopy(adapter))
    test = predict(
        classifier.to(accelerator.device).float(), _chips(config, data, "test"), 64, accelerator
    )
    candidates = pd.DataFrame(
        {
            "head_input": [config.head_input],
            "learning_rate": [config.learning_rate],
            "weight_decay": [config.weight_decay],
            "best_epoch": progress.best_epoch,
            "valid_loss": progress.best_loss,
        }
    )
    parameters = _parameters(config, model, classifier)
    return finished_run(
        config, data, classifier.cpu(), adapter, progress, candidates, parameters, test[0]
    )


def new_accelerator(config: RunConfig) -> Accelerator:
    """Device, precision and processes of a run; heads are trained in fp32."""
    precision = "no" if config.method == "head_only" else config.mixed_precision
    # Accelerate keeps the first precision of a process; a notebook trains in several.
    AcceleratorState._reset_state()
    return Accelerator(cpu=config.torch_device == "cpu", mixed_precision=precision)


def training_setup(
    config: RunConfig, data: ChipData
) -> tuple[Classifier | PeftModel, dict, ChipExamples]:
    """A fresh model for lora, dora or full, its AdamW parameter group, and the training chips."""
    model = _trainable_model(config, data)
    if config.method != "full" and config.mixed_precision == "bf16":
        # Frozen weights in the precision they are used in: no cast in every step, half the bytes.
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    group = {
        "params": [p for p in model.parameters() if p.requires_grad],
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
    }
    return model, group, _chips(config, data, "train")


def _trainable_model(config: RunConfig, data: ChipData) -> Classifier | PeftModel:
    """A fresh classifier, ready for the method; reproducible from the seed."""
    classifier = new_classifier(config, data)
    if config.method == "full":
        return classifier
    return add_adapter(
        classifier,
        AdapterSettings(
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=config.lora_targets,
            method=config.method,
        ),
    )


def _chips(config: RunConfig, data: ChipData, split: str) -> ChipExamples:
    """The chips of a split, each decoded once."""
    dataset = data.dataset(split, config.image_size)
    chips = decoded(
        dataset,
        config.memory_limit_gb * 1e9,
        Path(config.cache_path)
        / f"chips_{data.split_fingerprint(split)}_{config.image_size}_{split}.bin",
    )
    views = DIHEDRAL_VIEWS if config.augment and split == "train" else 1
    return ChipExamples(chips, dataset.targets, views)


def _identity(config: RunConfig, data: ChipData, model: Classifier | PeftModel) -> dict:
    """What must be equal for a run to go on from a checkpoint: all that decides its numbers."""
    return config.model_dump(mode="json", exclude=WITHOUT_EFFECT) | {
        "data_fingerprint": data.fingerprint,
        "weights_digest": weights_digest(model),
    }


def _parameters(config: RunConfig, model, classifier: Classifier) -> dict[str, int]:
    """Parameter counts of a run: `total` at inference, `trainable`, and the adapter's parts."""
    total = count_parameters(classifier)["total"]
    if config.method == "full":
        return {"total": total, "trainable": total}
    parts = adapter_parameters(model)
    return {"total": total, "trainable": sum(parts.values())} | parts


def train(config: RunConfig, data: ChipData, report=print) -> Run:
    """Train by `config.method`; raises as `train_head_only` and `train_adapted`."""
    if config.method == "head_only":
        return train_head_only(config, data, new_classifier(config, data), report)
    return train_adapted(config, data, report)


def caching_benefit(config: RunConfig, data: ChipData, classifier: Classifier) -> pd.DataFrame:
    """Measure what caching buys: one pass of the frozen backbone against epochs of one head.

    Measured without reading the cache; only `uncached` is computed from the other two.

    Returns:
        One column, `seconds`; rows `forward` (decoding and forward pass over the training and
        validation images), `heads` (config.epochs epochs of one head on those features), `cached`
        (both together) and `uncached` (a forward pass in every epoch).
    """
    train, valid = (
        extract_features(
            classifier, data.dataset(split, config.image_size), device=config.torch_device
        )
        for split in ("train", "valid")
    )
    one_head = config.model_copy(
        update={
            "head_inputs": config.head_inputs[:1],
            "learning_rates": config.learning_rates[:1],
            "weight_decays": config.weight_decays[:1],
            "patience": config.epochs,
        }
    )
    start = time.perf_counter()
    fit_heads(one_head, train, valid, len(data.classes), report=lambda line: None)
    heads = time.perf_counter() - start
    forward = train.seconds + valid.seconds
    seconds = {
        "forward": forward,
        "heads": heads,
        "cached": forward + heads,
        "uncached": config.epochs * forward + heads,
    }
    return pd.DataFrame({"seconds": seconds})
