"""Frozen features: one forward pass over the chips, kept on disk, so that heads train on a matrix.

The cache is keyed by what decides the numbers (pixels and labels, backbone weights, image size,
normalisation, views), so a stale entry cannot be read by accident.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from helpers.console import progress_bar
from helpers.data.dataset import ChipData, ChipDataset
from helpers.models.backbones import weights_digest
from helpers.models.classifier import Classifier
from helpers.records import written_whole

DIHEDRAL_VIEWS = 8


_WORKERS_FROM = 2000  # chips; below it, starting decoding processes costs more than it saves


@dataclass(frozen=True)
class Features:
    """Features of one split.

    Args:
        values: (views, N, 5 * width) float32, see `Classifier.features`.
        targets: (N,) int64.
        seconds: wall time of the forward pass that computed them, decoding included.
        from_cache: whether this call read them instead of computing them.
    """

    values: Tensor
    targets: Tensor
    seconds: float
    from_cache: bool


def dihedral(chips: Tensor, view: int) -> Tensor:
    """One of the eight flips and rotations of square chips (..., S, S); view 0 is the identity."""
    rotated = torch.rot90(chips, view % 4, dims=(-2, -1))
    return rotated.flip(-1) if view >= 4 else rotated


def batches(dataset: ChipDataset, batch_size: int) -> DataLoader:
    """Chips and targets in order, decoded in worker processes when there are many."""
    workers = min(4, torch.get_num_threads()) if len(dataset) >= _WORKERS_FROM else 0
    return DataLoader(dataset, batch_size=batch_size, num_workers=workers)


def decoded(dataset: ChipDataset, memory_limit_bytes: float, path: Path) -> Tensor:
    """All chips of a split as one tensor (N, bands, S, S), each file decoded once.

    Args:
        dataset: N chips.
        memory_limit_bytes: a larger tensor is kept in a file and memory-mapped.
        path: that file; it is overwritten.
    """
    first, _ = dataset[0]
    shape = (len(dataset), *first.shape)
    size = len(dataset) * first.numel()
    if size * first.element_size() > memory_limit_bytes:
        path.parent.mkdir(parents=True, exist_ok=True)
        chips = torch.from_file(str(path), shared=True, size=size, dtype=first.dtype).view(shape)
    else:
        chips = torch.empty(shape, dtype=first.dtype)
    done = 0
    with progress_bar(total=len(dataset), desc="decoding", unit="chip") as bar:
        for batch, _ in batches(dataset, 256):
            chips[done : done + len(batch)] = batch
            done += len(batch)
            bar.update(len(batch))
    return chips


@torch.inference_mode()
def extract_features(
    classifier: Classifier,
    dataset: ChipDataset,
    *,
    device: str = "cpu",
    batch_size: int = 64,
    views: int = 1,
) -> Features:
    """Run the frozen backbone once over a split.

    Args:
        classifier: its head is not used.
        dataset: N chips of the classifier's image size.
        device: where the forward pass runs; the result is on the CPU.
        batch_size: chips at a time; it does not change the result beyond rounding.
        views: 1, or 8 for all flips and rotations (`dihedral`).
    """
    start = time.perf_counter()
    classifier = classifier.to(device).eval()
    width = 5 * classifier.backbone.embed_dim
    values = torch.empty(views, len(dataset), width)
    with progress_bar(total=len(dataset), desc="features", unit="chip") as bar:
        done = 0
        for chips, _ in batches(dataset, batch_size):
            chips = chips.to(device, non_blocking=True)
            for view in range(views):
                features = classifier.features(dihedral(chips, view))
                values[view, done : done + len(chips)] = features.float().cpu()
            done += len(chips)
            bar.update(len(chips))
    return Features(values, dataset.targets.clone(), time.perf_counter() - start, False)


def cached_features(
    classifier: Classifier, data: ChipData, split: str, *, cache_path: str | Path, **options
) -> Features:
    """`extract_features` of one split, read from cache_path if it holds them already.

    A damaged entry is computed again. Options are those of `extract_features`.
    """
    dataset = data.dataset(split, classifier.config.image_size)
    key = {
        "data": data.split_fingerprint(split),
        "split": split,
        "backbone": weights_digest(classifier.backbone),
        "image_size": classifier.config.image_size,
        "mean": classifier.config.mean,
        "std": classifier.config.std,
        "views": options.get("views", 1),
    }
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    path = Path(cache_path) / f"features_{name}.safetensors"
    if path.is_file():
        try:
            return _read_features(path)
        except (SafetensorError, KeyError):
            path.unlink()
    features = extract_features(classifier, dataset, **options)
    with written_whole(path) as part:
        save_file(
            {"values": features.values, "targets": features.targets},
            part,
            metadata={"seconds": str(features.seconds)},
        )
    return features


def _read_features(path: Path) -> Features:
    with safe_open(path, framework="pt") as file:
        return Features(
            file.get_tensor("values"),
            file.get_tensor("targets"),
            float(file.metadata()["seconds"]),
            from_cache=True,
        )
