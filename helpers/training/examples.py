"""What training takes its batches from: chips or features of a split, and their views."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from helpers.console import progress_bar
from helpers.data.dataset import ChipDataset
from helpers.training.processes import moved, several

DIHEDRAL_VIEWS = 8


_WORKERS_FROM = 2000  # chips; below it, starting decoding processes costs more than it saves


def dihedral(chips: Tensor, view: int) -> Tensor:
    """One of the eight flips and rotations of square chips (..., S, S); view 0 is the identity."""
    rotated = torch.rot90(chips, view % 4, dims=(-2, -1))
    return rotated.flip(-1) if view >= 4 else rotated


def batches(dataset: ChipDataset, batch_size: int, device: str = "cpu") -> DataLoader:
    """Chips and targets in order, decoded in worker processes when there are many.

    For a GPU every core decodes, into pinned memory.
    """
    on_gpu = torch.device(device).type == "cuda"
    most = os.cpu_count() if on_gpu else min(4, torch.get_num_threads())
    workers = most if len(dataset) >= _WORKERS_FROM else 0
    # As everywhere on Linux. A process that was spawned would spawn its workers too, and import
    # all that they need: 8 s instead of a moment.
    start = "fork" if workers and sys.platform == "linux" else None
    return DataLoader(
        dataset, batch_size, num_workers=workers, pin_memory=on_gpu, multiprocessing_context=start
    )


def decoded(dataset: ChipDataset, memory_limit_bytes: float, path: Path) -> Tensor:
    """All chips of a split as one tensor (N, bands, S, S), each file decoded once.

    A tensor above the limit is kept in the file, which is overwritten, and memory-mapped. Of
    several processes on a machine one decodes into the file, and all map it.
    """
    processes = several()
    waits = processes is not None and not processes.is_local_main_process
    if waits:
        processes.wait_for_everyone()
    first, _ = dataset[0]
    shape = (len(dataset), *first.shape)
    size = len(dataset) * first.numel()
    if processes or size * first.element_size() > memory_limit_bytes:
        path.parent.mkdir(parents=True, exist_ok=True)
        chips = torch.from_file(str(path), shared=True, size=size, dtype=first.dtype).view(shape)
    else:
        chips = torch.empty(shape, dtype=first.dtype)
    if waits:
        return chips
    done = 0
    with progress_bar(total=len(dataset), desc="decoding", unit="chip") as bar:
        for batch, _ in batches(dataset, 256):
            chips[done : done + len(batch)] = batch
            done += len(batch)
            bar.update(len(batch))
    if processes:
        processes.wait_for_everyone()
    return chips


@dataclass(frozen=True)
class FeatureExamples:
    """What frozen blocks made of the chips as training examples: features or tokens.

    With several views, training draws one per image and epoch.
    """

    values: Tensor  # features (views, N, F) float32, or tokens (views, N, T, width) of 16 bits
    targets: Tensor  # (N,) int64

    @property
    def views(self) -> int:
        """How many versions of each image there are to draw from."""
        return len(self.values)

    def take(self, rows: Tensor, views: Tensor, device: str | torch.device = "cpu") -> Tensor:
        """Inputs (n, F) or (n, T, width) of n rows, each in its own view."""
        return moved(self.values[views, rows], device)


@dataclass(frozen=True)
class ChipExamples:
    """Decoded chips as training examples."""

    values: Tensor  # (N, bands, S, S) uint8 or float32, in memory or memory-mapped
    targets: Tensor  # (N,) int64
    views: int = 1  # 8 to draw one of the flips and rotations per image and epoch

    def take(self, rows: Tensor, views: Tensor, device: str | torch.device = "cpu") -> Tensor:
        """Chips (n, bands, S, S) of n rows, each flipped and rotated there by its own view."""
        chips = moved(self.values[rows], device)
        for view in views.unique().tolist():
            chosen = (views == view).nonzero().flatten()
            chips[chosen] = dihedral(chips[chosen], view)
        return chips


def beside_the_model(
    examples: FeatureExamples | ChipExamples, device: torch.device
) -> FeatureExamples | ChipExamples:
    """The same examples in a GPU's memory, where a quarter of what is free holds them."""
    if device.type == "cuda" and examples.values.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        return replace(examples, values=examples.values.to(device))
    return examples
