"""What every method needs before its first step: classifier, features, settings, accelerator."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn

from helpers.data.dataset import ChipData, band_statistics
from helpers.models.classifier import Classifier, ClassifierConfig, create_classifier
from helpers.training.config import RunConfig
from helpers.training.examples import DIHEDRAL_VIEWS, ChipExamples, decoded
from helpers.training.features import Features, cached_features
from helpers.training.loop import FitSettings
from helpers.training.processes import fast_products, fresh_accelerator, processes


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
            new_stem=config.stem == "new",
            **data.chip_facts,
        )
    )


def split_features(
    config: RunConfig, data: ChipData, classifier: Classifier, split: str
) -> Features:
    """Frozen features of a split, from the cache where they are there already."""
    processes(config.torch_device)
    augmented = config.augment and split == "train"
    return cached_features(
        classifier,
        data,
        split,
        cache_path=config.cache_path,
        memory_limit_bytes=config.memory_limit_gb * 1e9,
        device=config.torch_device,
        precision=config.features_precision,
        views=DIHEDRAL_VIEWS if augmented else 1,
    )


def split_chips(config: RunConfig, data: ChipData, split: str) -> ChipExamples:
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


def fit_settings(config: RunConfig, targets: Tensor) -> FitSettings:
    """How to train; balanced class weights come from the targets (N,) of the training split."""
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
def tracked_accelerator(config: RunConfig) -> Iterator[Accelerator]:
    """Device, precision and processes of a run; its tracker is open until the end."""
    accelerator = fresh_accelerator(
        config.torch_device,
        config.mixed_precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=Path(config.output_path) / "tracking",
    )
    if config.tracker != "none":
        parameters = {
            name: value if isinstance(value, bool | int | float) else str(value)
            for name, value in config.deciding().items()
        }
        accelerator.init_trackers(config.name, parameters)
    try:
        with fast_products(accelerator.device):
            yield accelerator
    finally:
        for tracker in accelerator.trackers:  # `end_training` would end the processes' group too
            tracker.finish()


def check_space(config: RunConfig, model: nn.Module) -> None:
    """Raise OSError where the disk does not hold a copy of the model and of its checkpoint."""
    # A checkpoint holds parameters, their best values and AdamW's two moments.
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    needed = sum(p.nbytes for p in model.parameters()) + (
        0 if config.method == "head_only" else 4 * trained
    )
    folder = next(p for p in config.folder.absolute().parents if p.exists())
    if shutil.disk_usage(folder).free < needed:
        message = f"a run of {needed / 1e6:,.0f} MB does not fit on the disk"
        raise OSError(errno.ENOSPC, message, str(folder))
