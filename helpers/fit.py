"""The one training loop: any model, on features or on chips, one candidate or a sweep of them.

A *candidate* is a set of parameters with its own learning rate that is trained, judged and stopped
on its own: the heads of a sweep are candidates of one pass over the features; LoRA, DoRA and full
fine-tuning have one. The model maps a batch to logits (candidates, N, classes), or (N, classes)
where there is one candidate.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from helpers import InputError
from helpers.metrics import weighted_metrics
from helpers.records import peak_memory_bytes, reset_peak_memory

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
        batch_size: images per optimizer step.
        warmup_fraction: share of all steps with a linearly rising learning rate; a cosine to
            zero follows.
        seed: of the order of images and their augmentation.
    """

    epochs: int
    patience: int
    batch_size: int
    warmup_fraction: float = 0.05
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


@dataclass
class Progress:
    """What a fit knows after `epoch` epochs; the lists have one entry per candidate."""

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
    train: FeatureExamples,
    valid: FeatureExamples,
    settings: FitSettings,
    *,
    accelerator: Accelerator,
    report: Callable[[str], None] = print,
) -> Progress:
    """Train every candidate until its validation loss stops falling, and restore its best epoch.

    Args:
        model: maps a batch to logits (candidates, N, classes) or (N, classes).
        groups: one AdamW parameter group per candidate (`params`, `lr`, `weight_decay`).
        train: examples to train on.
        valid: examples that choose the epoch and the candidate.
        settings: see FitSettings.
        accelerator: device and precision.
        report: receives one line at about ten epochs spread over the fit.

    Returns:
        The progress at the end; the model holds each candidate's parameters of its best epoch.

    Raises:
        InputError: no candidate finished an epoch with a finite loss; the message names the epoch
            and the batch. A loss that breaks later stops its candidate, which keeps its best
            epoch, and is noted in `Progress.failures`.
    """
    optimizer = torch.optim.AdamW(groups, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    schedule = _warmup_cosine(optimizer.optimizer, len(train.targets), settings)
    progress = Progress.start(groups)
    reset_peak_memory()
    while progress.epoch < settings.epochs and not all(progress.stopped):
        progress.epoch += 1
        start = time.perf_counter()
        row = {"epoch": progress.epoch, "learning_rate": schedule.get_last_lr()}
        row |= _train_epoch(model, optimizer, schedule, train, settings, accelerator, progress)
        row["seconds"] = time.perf_counter() - start
        row["images_per_second"] = len(train.targets) / row["seconds"]
        row["peak_memory_bytes"] = peak_memory_bytes(accelerator.device)
        row |= _validate(predict(model, valid, settings.batch_size, accelerator), valid.targets)
        _record(progress, groups, row, settings)
        if _is_reported(progress, settings):
            report(_line(progress, settings))
    if math.isinf(min(progress.best_loss)):
        raise InputError(f"{progress.failures[0]}; lower the learning rate or check the chips")
    _restore_best(progress, groups)
    return progress


def _warmup_cosine(optimizer, n: int, settings: FitSettings):
    """Learning-rate factor per step: linear rise, then a cosine to zero."""
    steps = settings.epochs * math.ceil(n / settings.batch_size)
    warmup = max(1, round(settings.warmup_fraction * steps))

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _train_epoch(model, optimizer, schedule, train, settings, accelerator, progress) -> dict:
    """One pass over the training images; return loss and accuracy per candidate.

    The order and the views come from (seed, epoch) alone, so that an epoch can be repeated.
    """
    model.train()
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + progress.epoch)
    n = len(train.targets)
    order = torch.randperm(n, generator=generator)
    views = torch.randint(train.views, (n,), generator=generator)
    losses, correct = [], []
    for rows in order.split(settings.batch_size):
        inputs = train.take(rows, views[rows]).to(accelerator.device, non_blocking=True)
        targets = train.targets[rows].to(accelerator.device, non_blocking=True)
        with accelerator.autocast():
            logits = _by_candidate(model(inputs))
        loss = _losses(logits, targets)
        accelerator.backward(loss.mean(dim=1).sum())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        # Kept on the device: asking for a number here would make the device wait every batch.
        losses.append(loss.detach().sum(dim=1))
        correct.append((logits.detach().argmax(dim=2) == targets).sum(dim=1))
    losses = torch.stack(losses).cpu()
    _note_failures(progress, losses)
    return {
        "train_loss": (losses.sum(dim=0) / n).tolist(),
        "train_acc": (torch.stack(correct).sum(dim=0) / n).tolist(),
    }


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
    """Class probabilities on the CPU, (candidates, N, classes) float32."""
    model.eval()
    rows = torch.arange(len(examples.targets))
    parts = []
    for chunk in rows.split(batch_size):
        inputs = examples.take(chunk, torch.zeros_like(chunk)).to(accelerator.device)
        with accelerator.autocast():
            logits = model(inputs)
        parts.append(_by_candidate(logits).softmax(dim=2))
    return torch.cat(parts, dim=1).cpu()


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


def _restore_best(progress: Progress, groups: list[dict]) -> None:
    with torch.no_grad():
        for group, values in zip(groups, progress.best_values, strict=True):
            for parameter, value in zip(group["params"], values, strict=True):
                parameter.copy_(value)


def _is_reported(progress: Progress, settings: FitSettings) -> bool:
    every = max(1, settings.epochs // 10)
    return progress.epoch == 1 or progress.epoch % every == 0 or all(progress.stopped)


def _line(progress: Progress, settings: FitSettings) -> str:
    """The state of the best candidate in one line."""
    row = progress.histories[progress.best][-1]
    running = progress.stopped.count(False)
    line = (
        f"epoch {progress.epoch:3d}/{settings.epochs}  "
        f"train loss {row['train_loss']:.4f}  valid loss {row['valid_loss']:.4f}  "
        f"valid accuracy {row['valid_acc']:.3f}  valid AUROC {row['valid_auroc']:.3f}"
    )
    return line + (f"  {running} of {len(progress.stopped)} running" if running > 1 else "")
