"""Frozen features: one forward pass over the chips, kept on disk, so that heads train on a matrix.

The cache is keyed by what decides the numbers (pixels and labels, backbone weights, image size,
normalisation, views), so a stale entry cannot be read by accident.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from helpers import InputError
from helpers.console import progress_bar
from helpers.data.dataset import ChipData, ChipDataset
from helpers.models.backbones import weights_digest
from helpers.models.classifier import Classifier
from helpers.records import written_whole, written_whole_folder
from helpers.training.cache import entry_folder, held, read_seconds, write_record
from helpers.training.examples import FeatureExamples, batches, dihedral
from helpers.training.processes import fast_products, several

_BATCH_SIZES = {"cpu": 64, "cuda": 256}


@dataclass(frozen=True)
class Features(FeatureExamples):
    """Features (views, N, 5 * width) float32 of one split, see `Classifier.features`."""

    seconds: float  # of the forward pass that computed them, decoding included
    from_cache: bool  # whether this call read them instead of computing them


@contextmanager
def evaluated_on(module: nn.Module, device: str | torch.device) -> Iterator[None]:
    """Move a module to a device and into evaluation mode; both are undone at the end."""
    before = next(itertools.chain(module.parameters(), module.buffers())).device
    was_training = module.training
    module.to(device).eval()
    try:
        yield
    finally:
        module.to(before).train(was_training)


@torch.inference_mode()
def extract_features(
    classifier: Classifier,
    dataset: ChipDataset,
    *,
    device: str = "cpu",
    batch_size: int | None = None,
    precision: str = "fp32",
    views: int = 1,
    file: Path | None = None,
) -> Features:
    """Run the frozen backbone once over a split.

    Args:
        classifier: its head is not used; it stays where it is.
        dataset: N chips of the classifier's image size.
        device: where the forward pass runs; the result is on the CPU.
        batch_size: chips at a time; it does not change the result beyond rounding.
        precision: fp32, which a GPU multiplies in TF32, or, on a GPU alone, bf16.
        views: 1, or 8 for all flips and rotations (`dihedral`).
        file: a .npy file to keep the result in, memory-mapped; None for memory.

    Raises:
        InputError: a feature is not finite.
    """
    start = time.perf_counter()
    shape = (views, len(dataset), 5 * classifier.backbone.embed_dim)
    if file:
        values = torch.from_numpy(np.lib.format.open_memmap(file, "w+", np.float32, shape))
    else:
        values = torch.empty(shape)
    bar, done = progress_bar(total=len(dataset), desc="features", unit="chip"), 0

    def keep(features: list[Tensor]) -> None:
        nonlocal done
        here = slice(done, done + len(features[0]))
        values[:, here] = torch.stack(features).float().cpu()
        if not values[:, here].isfinite().all():
            raise InputError(
                f"weights: features of chips {here.start} to {here.stop - 1} are not finite; "
                "check the weights of the backbone and the values of these chips"
            )
        done = here.stop
        bar.update(len(features[0]))

    on_gpu = torch.device(device).type == "cuda"
    size = batch_size or _BATCH_SIZES["cuda" if on_gpu else "cpu"]
    half = torch.autocast("cuda", torch.bfloat16, enabled=on_gpu and precision == "bf16")
    with bar, evaluated_on(classifier, device), half, fast_products(device):
        before = None
        for chips, _ in batches(dataset, size, device):
            chips = chips.to(device, non_blocking=True)
            features = [classifier.features(dihedral(chips, view)) for view in range(views)]
            if before:  # copied while a GPU computes these
                keep(before)
            before = features
        if before:
            keep(before)
    return Features(values, dataset.targets.clone(), time.perf_counter() - start, False)


def cached_features(
    classifier: Classifier,
    data: ChipData,
    split: str,
    *,
    cache_path: str | Path,
    memory_limit_bytes: float = 4e9,
    **options,
) -> Features:
    """`extract_features` of one split, read from cache_path if it holds them already.

    An entry is a folder with the values and a JSON that holds their digest; one that is damaged in
    any way is computed again. Several processes compute a part each, and share the folder. Values
    above `memory_limit_bytes` are memory-mapped. Other options are those of `extract_features`.
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
    if options.get("device") == "cuda":  # rounded otherwise
        key["precision"] = options.get("precision", "fp32").replace("fp32", "tf32")
    entry = entry_folder(cache_path, "features", key)
    shape = (key["views"], len(dataset), 5 * classifier.backbone.embed_dim)
    mapped = 4 * np.prod(shape) > memory_limit_bytes
    with held(entry):
        found = _read_entry(entry, shape, dataset.targets, mapped)
        processes = several()
        complete = all(gather_object([found is not None])) if processes else found is not None
        if complete:
            return found
        if processes:
            _share_out(classifier, dataset, entry, shape, processes, **options)
        else:
            if entry.is_file():
                entry.unlink()
            with written_whole_folder(entry) as part:
                file = part / "values.npy"
                seconds = extract_features(classifier, dataset, file=file, **options).seconds
                write_record(file, seconds)
        # What is computed is read as it would be the next time, so that both give the same bits.
        return replace(_read_entry(entry, shape, dataset.targets, mapped), from_cache=False)


def _share_out(
    classifier: Classifier,
    dataset: ChipDataset,
    entry: Path,
    shape: tuple,
    processes: PartialState,
    **options,
) -> None:
    """Each process computes a part into a file of its own; the main one joins them."""
    parts = np.array_split(np.arange(len(dataset)), processes.num_processes)
    files = [entry.with_name(f"{entry.name}_{rank}.npy") for rank in range(len(parts))]
    rows, seconds = parts[processes.process_index], 0.0
    if len(rows):
        of_rows = ChipDataset(
            [dataset.paths[row] for row in rows],
            dataset.targets[rows],
            dataset.bands,
            dataset.image_size,
        )
        with written_whole(files[processes.process_index]) as part:
            seconds = extract_features(classifier, of_rows, file=part, **options).seconds
    seconds = max(gather_object([seconds]))  # which also waits for all
    if processes.is_main_process:
        with written_whole_folder(entry) as folder:
            values = np.lib.format.open_memmap(folder / "values.npy", "w+", np.float32, shape)
            for rows, file in zip(parts, files, strict=True):
                if len(rows):
                    values[:, rows] = np.load(file, mmap_mode="r")
                    file.unlink()
            values.flush()
            write_record(folder / "values.npy", seconds)
    processes.wait_for_everyone()


def _read_entry(entry: Path, shape: tuple, targets: Tensor, mapped: bool) -> Features | None:
    file = entry / "values.npy"
    if (seconds := read_seconds(file)) is None:
        return None
    try:
        values = np.load(file, mmap_mode="c" if mapped else None, allow_pickle=False)
    except (OSError, ValueError):
        return None
    if values.shape != shape or values.dtype != np.float32:
        return None
    return Features(torch.from_numpy(values), targets.clone(), seconds, True)
