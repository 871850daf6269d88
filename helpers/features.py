"""Frozen features: one forward pass over the chips, kept on disk, so that heads train on a matrix.

The cache is keyed by what decides the numbers (pixels and labels, backbone weights, image size,
normalisation, views), so a stale entry cannot be read by accident.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from helpers.console import progress_bar
from helpers.load_data import ChipData, ChipDataset
from helpers.model import Classifier, weights_digest
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
        "data": data.fingerprint,
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


def colour_statistics(dataset: ChipDataset) -> np.ndarray:
    """Mean, standard deviation and 10/50/90 % quantiles per band of each chip, (N, 5 * bands).

    What a classifier can know without looking at any shape: the baseline that says whether a
    task is easier than it looks.
    """
    rows = []
    for chips, _ in batches(dataset, 256):
        pixels = chips.flatten(2).double().numpy()
        quantiles = np.quantile(pixels, [0.1, 0.5, 0.9], axis=2)
        rows.append(np.concatenate([pixels.mean(2), pixels.std(2), *quantiles], axis=1))
    return np.concatenate(rows)


def logistic_probe(train: np.ndarray, targets: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Class probabilities of a logistic regression on standardised features.

    Args:
        train: (N, F).
        targets: (N,).
        test: (M, F).

    Returns:
        (M, classes).
    """
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return probe.fit(train, targets).predict_proba(test)


@torch.inference_mode()
def token_components(classifier: Classifier, chips: Tensor) -> np.ndarray:
    """First three principal components of all patch tokens, as colours at chip size.

    The picture that DINOv2 is known for (Oquab et al. 2023, figure 1), here with one common PCA
    over all chips, so that equal colours mean similar tokens. The mean token of each position is
    taken off first: it says where a patch lies in the chip, not what it shows.

    Args:
        classifier: its head is not used.
        chips: (N, bands, S, S).

    Returns:
        (N, S, S, 3) float in 0..1.
    """
    classifier.eval()
    tokens = classifier.backbone.forward_features(classifier.normalize(chips))
    patches = tokens[:, classifier.backbone.num_prefix_tokens :].cpu()
    side = classifier.backbone.patch_embed.grid_size[0]
    patches = patches - patches.mean(dim=0)
    components = PCA(3, random_state=0).fit_transform(patches.flatten(0, 1).numpy())
    low, high = np.percentile(components, [1, 99], axis=0)
    colours = torch.from_numpy(((components - low) / (high - low)).clip(0, 1))
    maps = colours.view(len(chips), side, side, 3).permute(0, 3, 1, 2)
    large = functional.interpolate(maps, size=chips.shape[-1], mode="bicubic").clamp(0, 1)
    return large.permute(0, 2, 3, 1).numpy()
