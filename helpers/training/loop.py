"""The one training loop: any model, on features or on chips, one candidate or a sweep of them.

A *candidate* is a set of parameters with its own learning rate that is trained, judged and stopped
on its own: the heads of a sweep are candidates of one pass over the features; LoRA, DoRA and full
fine-tuning have one. The model maps a batch to logits (candidates, N, classes), or (N, classes)
where there is one candidate.
"""

import copy
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import find_executable_batch_size, gather_object
from torch import Tensor, nn
from torch.nn import functional

from helpers import InputError
from helpers.metrics import weighted_metrics
from helpers.records import peak_memory_bytes, reset_peak_memory
from helpers.training.checkpoints import Checkpoint
from helpers.training.features import dihedral

HISTORY_COLUMNS = (
    "epoch",
    "train_loss",
    "valid_loss",
    "train_acc",
    "valid_acc",
    "valid_auroc",
    "learning_rate",
    "seconds",
    "images_per_second",
    "peak_memory_bytes",
)


@dataclass(frozen=True)
class FitSettings:
    """How to train.

    Args:
        epochs: at most this many passes over the training images.
        patience: epochs without a better validation loss after which a candidate stops.
        batch_size: images per optimizer step, over all processes.
        warmup_fraction: share of all steps with a linearly rising learning rate; a cosine to
            zero follows.
        max_grad_norm: norm that a candidate's gradient is clipped to; None for no clipping.
        class_weights: weight of each class in the training loss; None for equal weights.
        seed: of the order of images and their augmentation.
    """

    epochs: int
    patience: int
    batch_size: int
    warmup_fraction: float = 0.05
    max_grad_norm: float | None = None
    class_weights: tuple[float, ...] | None = None
    seed: int = 0


@dataclass(frozen=True)
class FeatureExamples:
    """Frozen features as training examples.

    Args:
        values: (views, N, F) float32; with several views, training draws one per image and epoch.
        targets: (N,) int64.
    """

    values: Tensor
    targets: Tensor

    @property
    def views(self) -> int:
        """How many versions of each image there are to draw from."""
        return len(self.values)

    def take(self, rows: Tensor, views: Tensor) -> Tensor:
        """Inputs (n, F) of n rows, each in its own view."""
        return self.values[views, rows]


@dataclass(frozen=True)
class ChipExamples:
    """Decoded chips as training examples.

    Args:
        values: (N, bands, S, S) uint8 or float32, in memory or memory-mapped.
        targets: (N,) int64.
        views: 8 to draw one of the flips and rotations per image and epoch, else 1.
    """

    values: Tensor
    targets: Tensor
    views: int = 1

    def take(self, rows: Tensor, views: Tensor) -> Tensor:
        """Chips (n, bands, S, S) of n rows, each flipped and rotated by its own view."""
        chips = self.values[rows]
        for view in views.unique().tolist():
            chosen = views == view
            chips[chosen] = dihedral(chips[chosen], view)
        return chips


@dataclass
class Progress:
    """What a fit knows after `epoch` epochs; the lists have one entry per candidate.

    The learning rate in a history is that of the epoch's last step.
    """

    histories: list[list[dict]]
    best_loss: list[float]
    best_epoch: list[int]
    best_values: list[list[Tensor]]
    stopped: list[bool]
    failures: list[str]
    epoch: int = 0

    @classmethod
    def start(cls, groups: list[dict]) -> "Progress":
        """Before the first epoch."""
        n = len(groups)
        values = [[p.detach().clone() for p in group["params"]] for group in groups]
        return cls([[] for _ in groups], [math.inf] * n, [0] * n, values, [False] * n, [""] * n)

    @property
    def best(self) -> int:
        """Index of the candidate with the lowest validation loss."""
        return int(np.argmin(self.best_loss))

    def history(self, candidate: int) -> pd.DataFrame:
        """One row per epoch that the candidate trained, HISTORY_COLUMNS."""
        return pd.DataFrame(self.histories[candidate], columns=HISTORY_COLUMNS)


def fit(
    model: nn.Module,
    groups: list[dict],
    train: FeatureExamples | ChipExamples,
    valid: FeatureExamples | ChipExamples,
    settings: FitSettings,
    *,
    accelerator: Accelerator,
    checkpoint: Checkpoint | None = None,
    report: Callable[[str], None] = print,
) -> Progress:
    """Train every candidate until its validation loss stops falling, and restore its best epoch.

    Where a device's memory does not hold a process's share of a batch, the share is reduced and
    its gradients are accumulated; the optimizer still steps once per `settings.batch_size` images.

    Args:
        model: maps a batch to logits (candidates, N, classes) or (N, classes).
        groups: one AdamW parameter group per candidate (`params`, `lr`, `weight_decay`).
        train: examples to train on.
        valid: examples that choose the epoch and the candidate.
        settings: see FitSettings.
        accelerator: device, precision and processes; each process trains on its part of a batch.
        checkpoint: where to keep the state after every epoch; None for no checkpoints.
        report: receives one line at about ten epochs spread over the fit.

    Returns:
        The progress at the end; the model holds each candidate's parameters of its best epoch.

    Raises:
        InputError: no candidate finished an epoch with a finite loss; the message names the epoch
            and the batch. A loss that breaks later stops its candidate, which keeps its best
            epoch, and is noted in `Progress.failures`.
    """
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(groups, fused=True))
    loop = _Loop(model, optimizer, groups, train, valid, settings, accelerator)
    initial = Progress.start(groups)

    # Accelerate calls it again with a smaller size when the device runs out of memory.
    @find_executable_batch_size(
        starting_batch_size=math.ceil(settings.batch_size / accelerator.num_processes)
    )
    def attempt(micro_batch: int) -> Progress:
        loop.restart(initial, micro_batch, checkpoint)
        return loop.run(checkpoint, report)

    progress = attempt()
    if math.isinf(min(progress.best_loss)):
        raise InputError(f"{progress.failures[0]}; lower the learning rate or check the chips")
    _copy_into(groups, progress.best_values)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # no autocast outside of training
    return progress


@dataclass
class _Loop:
    """The state of one fit."""

    model: nn.Module
    optimizer: AcceleratedOptimizer
    groups: list[dict]
    train: FeatureExamples | ChipExamples
    valid: FeatureExamples | ChipExamples
    settings: FitSettings
    accelerator: Accelerator
    rates: list[float] = field(init=False)
    weights: Tensor = field(init=False)
    progress: Progress = field(init=False)
    micro_batch: int = field(init=False)

    def __post_init__(self):
        self.rates = [group["lr"] for group in self.groups]
        equal = [1.0] * (int(self.train.targets.max()) + 1)
        self.weights = torch.tensor(self.settings.class_weights or equal)

    def restart(self, initial: Progress, micro_batch: int, checkpoint: Checkpoint | None) -> None:
        """Go back to the checkpoint, or to the initial values where there is none."""
        self.micro_batch = micro_batch
        self.progress = copy.deepcopy(initial)
        _copy_into(self.groups, initial.best_values)
        self.optimizer.state.clear()
        state = checkpoint and checkpoint.read(self.accelerator.num_processes)
        if state:
            self.progress = Progress(**state["progress"])
            _copy_into(self.groups, state["values"])
            self.optimizer.load_state_dict(state["optimizer"])
            _set_random_state(state["random"][self.accelerator.process_index])

    def run(self, checkpoint: Checkpoint | None, report: Callable[[str], None]) -> Progress:
        """Train epoch by epoch until every candidate has stopped."""
        progress, n = self.progress, len(self.train.targets)
        reset_peak_memory()
        while progress.epoch < self.settings.epochs and not all(progress.stopped):
            progress.epoch += 1
            start = time.perf_counter()
            row = {"epoch": progress.epoch} | self._train_epoch()
            row["seconds"] = time.perf_counter() - start
            row["images_per_second"] = n / row["seconds"]
            row["peak_memory_bytes"] = peak_memory_bytes(self.accelerator.device)
            probabilities = predict(self.model, self.valid, self.micro_batch, self.accelerator)
            row |= _validate(probabilities, self.valid.targets)
            _record(progress, self.groups, row, self.settings)
            if checkpoint:
                self._write(checkpoint)
            if _is_reported(progress, self.settings):
                report(_line(progress, self.settings))
        return progress

    def _train_epoch(self) -> dict:
        """One pass over the training images; return rate, loss and accuracy per candidate.

        Order and views come from (seed, epoch) alone, so that any epoch can be repeated, and
        every process draws the same before it takes its part.
        """
        self.model.train()
        seed = self.settings.seed * 1_000_003 + self.progress.epoch
        generator = torch.Generator().manual_seed(seed)
        n = len(self.train.targets)
        order = torch.randperm(n, generator=generator)
        views = torch.randint(self.train.views, (n,), generator=generator)
        sums = []
        batches = order.split(self.settings.batch_size)
        first = (self.progress.epoch - 1) * len(batches)
        for step, rows in enumerate(batches, start=first):
            rates = self._set_rates(step, len(batches))
            sums.append(self._step(rows, views))
        # One reduction for the epoch; asking earlier would make the device wait every batch.
        losses, correct = self.accelerator.reduce(torch.stack(sums)).cpu().unbind(dim=1)
        _note_failures(self.progress, losses)
        return {
            "learning_rate": rates,
            "train_loss": (losses.sum(dim=0) / n).tolist(),
            "train_acc": (correct.sum(dim=0) / n).tolist(),
        }

    def _set_rates(self, step: int, steps_per_epoch: int) -> list[float]:
        """Linear rise, then a cosine to zero; step counts from 0 over all epochs."""
        steps = self.settings.epochs * steps_per_epoch
        warmup = max(1, round(self.settings.warmup_fraction * steps))
        factor = (step + 1) / warmup
        if step >= warmup:
            factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
        rates = [factor * rate for rate in self.rates]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return rates

    def _step(self, rows: Tensor, views: Tensor) -> Tensor:
        """One optimizer step on a batch; return summed losses and hits, (2, candidates)."""
        total = self.weights[self.train.targets[rows]].sum().item()
        parts = rows.tensor_split(self.accelerator.num_processes)
        own = parts[self.accelerator.process_index]
        chunks = own.split(self.micro_batch)
        sums = torch.zeros(2, len(self.groups), device=self.accelerator.device)
        for i, chunk in enumerate(chunks):
            last = i == len(chunks) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                sums += self._backward(chunk, views, total)
        if self.settings.max_grad_norm:
            for group in self.groups:
                self.accelerator.clip_grad_norm_(group["params"], self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sums

    def _backward(self, chunk: Tensor, views: Tensor, total: float) -> Tensor:
        """Add the gradients of some images of a batch whose weights sum to total."""
        device = self.accelerator.device
        inputs = self.train.take(chunk, views[chunk]).to(device, non_blocking=True)
        targets = self.train.targets[chunk]
        weights, targets = (
            t.to(device, non_blocking=True) for t in (self.weights[targets], targets)
        )
        logits = _by_candidate(self.model(inputs))
        losses = _losses(logits, targets)
        # Processes average their gradients, so each scales its sum by their number.
        scale = self.accelerator.num_processes / total
        self.accelerator.backward((losses * weights).sum() * scale)
        hits = logits.detach().argmax(dim=2) == targets
        return torch.stack([losses.detach().sum(dim=1), hits.sum(dim=1)])

    def _write(self, checkpoint: Checkpoint) -> None:
        random = gather_object([_random_state()])
        if self.accelerator.is_main_process:
            checkpoint.write(
                {
                    "progress": vars(self.progress),
                    "values": [[p.detach() for p in group["params"]] for group in self.groups],
                    "optimizer": self.optimizer.state_dict(),
                    "random": random,
                },
                self.accelerator.num_processes,
            )


def _copy_into(groups: list[dict], values: list[list[Tensor]]) -> None:
    with torch.no_grad():
        for group, own in zip(groups, values, strict=True):
            for parameter, value in zip(group["params"], own, strict=True):
                parameter.copy_(value)


def _random_state() -> dict:
    """State of the generators that dropout draws from."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def _by_candidate(logits: Tensor) -> Tensor:
    """Logits (candidates, N, classes) in fp32, also of a model without candidates."""
    return (logits if logits.ndim == 3 else logits[None]).float()


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy per candidate and image, (candidates, N)."""
    return functional.cross_entropy(
        logits.movedim(2, 1), targets.expand(len(logits), -1), reduction="none"
    )


def _note_failures(progress: Progress, losses: Tensor) -> None:
    """Stop candidates with a loss that is not finite; losses (batches, candidates)."""
    for candidate in (~losses.isfinite()).any(dim=0).nonzero().flatten().tolist():
        if not progress.stopped[candidate]:
            batch = int((~losses[:, candidate].isfinite()).nonzero()[0]) + 1
            progress.failures[candidate] = (
                f"the training loss is not finite at epoch {progress.epoch}, batch {batch}"
            )


@torch.inference_mode()
def predict(model: nn.Module, examples, batch_size: int, accelerator: Accelerator) -> Tensor:
    """Class probabilities on the CPU, (candidates, N, classes) float32, the same on every process.

    Each process computes its part; the parts are then added up into one table.
    """
    model.eval()
    n = len(examples.targets)
    own = torch.arange(n).tensor_split(accelerator.num_processes)[accelerator.process_index]
    parts = []
    for chunk in own.split(batch_size):
        inputs = examples.take(chunk, torch.zeros_like(chunk)).to(accelerator.device)
        parts.append(_by_candidate(model(inputs)).softmax(dim=2))
    rows = torch.cat(parts, dim=1)
    table = rows.new_zeros(len(rows), n, rows.shape[2])
    table[:, own] = rows
    return accelerator.reduce(table).cpu()


def _validate(probabilities: Tensor, targets: Tensor) -> dict:
    """Validation loss, accuracy and AUROC per candidate."""
    log = probabilities.clamp_min(1e-12).log()
    rows = [
        weighted_metrics(
            targets.numpy(), candidate.nan_to_num().numpy(), np.ones((1, len(targets)))
        )
        for candidate in probabilities
    ]
    return {
        "valid_loss": [float(functional.nll_loss(candidate, targets)) for candidate in log],
        "valid_acc": [float(row["accuracy"][0]) for row in rows],
        "valid_auroc": [float(row["auroc"][0]) for row in rows],
    }


def _record(progress: Progress, groups: list[dict], row: dict, settings: FitSettings) -> None:
    """Append the epoch to the history of every candidate that still runs; keep the best values."""
    for candidate, group in enumerate(groups):
        if progress.stopped[candidate]:
            continue
        own = {k: v[candidate] if isinstance(v, list) else v for k, v in row.items()}
        progress.histories[candidate].append(own)
        if own["valid_loss"] < progress.best_loss[candidate] and not progress.failures[candidate]:
            progress.best_loss[candidate] = own["valid_loss"]
            progress.best_epoch[candidate] = progress.epoch
            progress.best_values[candidate] = [p.detach().clone() for p in group["params"]]
        waited = progress.epoch - progress.best_epoch[candidate]
        progress.stopped[candidate] = bool(progress.failures[candidate]) or (
            waited >= settings.patience
        )


def _is_reported(progress: Progress, settings: FitSettings) -> bool:
    every = max(1, settings.epochs // 10)
    return progress.epoch == 1 or progress.epoch % every == 0 or all(progress.stopped)


def _line(progress: Progress, settings: FitSettings) -> str:
    """The state of the best candidate in one line."""
    best, row = progress.best, progress.histories[progress.best][-1]
    if row["epoch"] < progress.epoch:
        state = (
            f"best candidate stopped, valid loss {progress.best_loss[best]:.4f} "
            f"at epoch {progress.best_epoch[best]}"
        )
    else:
        state = (
            f"train loss {row['train_loss']:.4f}  valid loss {row['valid_loss']:.4f}  "
            f"valid accuracy {row['valid_acc']:.3f}  valid AUROC {row['valid_auroc']:.3f}"
        )
    running = progress.stopped.count(False)
    others = f"  {running} of {len(progress.stopped)} running" if len(progress.stopped) > 1 else ""
    return f"epoch {progress.epoch:3d}/{settings.epochs}  {state}{others}"
