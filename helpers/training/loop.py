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
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size, gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from helpers import InputError
from helpers.console import progress_bar
from helpers.records import peak_memory_bytes
from helpers.training.checkpoints import Checkpoint
from helpers.training.examples import ChipExamples, FeatureExamples, beside_the_model
from helpers.training.precision import attention_precision
from helpers.training.processes import moved
from helpers.training.progress import Progress
from helpers.training.validation import by_candidate, candidate_losses, predict, validated

STEP_PARTS = ("data", "forward", "backward", "optimizer")

Losses = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Model, inputs, targets (n,), rows (n,) of the examples -> logits (candidates, n, classes) and
losses (candidates, n)."""


def by_labels(model: nn.Module, inputs: Tensor, targets: Tensor, rows: Tensor):
    """The cross entropy to the labels: `Losses` of everything but a distillation."""
    logits = by_candidate(model(inputs))
    return logits, candidate_losses(logits, targets)


@dataclass(frozen=True)
class FitSettings:
    """How to train.

    With weights of the classes in the training loss, the validation loss is the mean of the
    classes' losses; without, all images count alike in both.
    """

    epochs: int  # passes over the training images, at most
    patience: int  # epochs without a better validation loss after which a candidate stops
    batch_size: int  # images per optimizer step, over all processes
    warmup_fraction: float = 0.05  # of all steps, at a rising rate; a cosine to zero follows
    max_grad_norm: float | None = None  # that a candidate's gradient is clipped to
    class_weights: tuple[float, ...] | None = None
    seed: int = 0  # of the order of images and their augmentation


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
    losses: Losses = by_labels,
) -> Progress:
    """Train every candidate until its validation loss stops falling, and restore its best epoch.

    Where a device's memory does not hold a process's share of a batch, the share is reduced and
    its gradients are accumulated; the optimizer still steps once per `settings.batch_size` images.

    Args:
        model: maps a batch to logits (candidates, N, classes) or (N, classes).
        groups: one per candidate: `params`, `lr`, `weight_decay` of AdamW and, where its parameters
            have rates of their own, `factors`, by which the rate of each is multiplied.
        train: examples to train on.
        valid: examples that choose the epoch and the candidate.
        settings: see FitSettings.
        accelerator: device, precision and processes; each process trains on its part of a batch.
            Its trackers receive every epoch of the candidate that leads.
        checkpoint: where to keep the state after every epoch; None for no checkpoints.
        report: receives one line at about ten epochs spread over the fit.
        losses: what is made smaller in training; validation is by the labels.

    Returns:
        The progress at the end; the model holds each candidate's parameters of its best epoch.

    Raises:
        InputError: every candidate's loss broke, at whatever epoch; the message names the first's
            epoch and batch, and the checkpoint is gone. Where some break, they are out of the
            race, and `Progress.failures` says why.
    """
    loop = Loop(model, groups, train, settings, accelerator, losses)
    valid = beside_the_model(valid, accelerator.device)
    initial, random = copy.deepcopy(loop.progress), _random_state()
    if accelerator.num_processes > 1:
        loop.fit_micro_batch()

    # Accelerate calls it again with a smaller size when the device runs out of memory.
    @find_executable_batch_size(starting_batch_size=loop.micro_batch)
    def attempt(micro_batch: int) -> None:
        loop.micro_batch = micro_batch
        loop.restart(initial, random, checkpoint)
        loop.run(valid, checkpoint, report)

    attempt()
    progress = loop.progress
    _copy_into(groups, progress.best_values)
    accelerator.unwrap_model(loop.model, keep_fp32_wrapper=False)  # no autocast outside of training
    return progress


class Loop:
    """A model and its optimizer, ready for steps on training examples."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict],
        train: FeatureExamples | ChipExamples,
        settings: FitSettings,
        accelerator: Accelerator,
        losses: Losses = by_labels,
    ):
        """Prepare the model for the accelerator's device; arguments as of `fit`."""
        self.groups, self.settings, self.losses = groups, settings, losses
        self.train = beside_the_model(train, accelerator.device)
        self.accelerator = accelerator
        optimizer = torch.optim.AdamW(_groups_by_rate(groups), fused=True)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        equal = [1.0] * (int(train.targets.max()) + 1)
        self.weights = torch.tensor(settings.class_weights or equal)
        self.micro_batch = math.ceil(settings.batch_size / accelerator.num_processes)
        self.progress = Progress.start(groups)
        self._schedule_from(0)

    def restart(self, initial: Progress, random: dict, checkpoint: Checkpoint | None) -> None:
        """Go back to the checkpoint, or to the initial values where there is none."""
        self.progress = copy.deepcopy(initial)
        _copy_into(self.groups, initial.best_values)
        self.optimizer.state.clear()
        self.optimizer.zero_grad()  # an attempt that ran out of memory left gradients
        _set_random_state(random)
        state = checkpoint and checkpoint.read(self.accelerator.num_processes)
        if state:
            try:
                self._restore(state)
            except Exception as error:  # whatever odd contents can raise
                raise checkpoint.damaged(error) from error
        self._schedule_from(self.progress.epoch * self._steps_per_epoch)

    def _restore(self, state: dict) -> None:
        progress = Progress(**state["progress"])
        lengths = {len(value) for value in vars(progress).values() if isinstance(value, list)}
        if lengths != {len(self.groups)} or progress.epoch not in range(self.settings.epochs + 1):
            raise ValueError("progress of another fit")
        _copy_into(self.groups, state["values"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        _set_random_state(state["random"][self.accelerator.process_index])
        self.progress = progress

    @property
    def _steps_per_epoch(self) -> int:
        return math.ceil(len(self.train.targets) / self.settings.batch_size)

    def _schedule_from(self, step: int) -> None:
        """Schedule what follows; `step` counts from 0 over all epochs."""
        steps = self.settings.epochs * self._steps_per_epoch
        self.factor = warmup_and_cosine(steps, self.settings.warmup_fraction)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["initial_lr"] = rate
        self.schedule = LambdaLR(self.optimizer, self.factor, last_epoch=step - 1)

    def run(
        self,
        valid: FeatureExamples | ChipExamples,
        checkpoint: Checkpoint | None,
        report: Callable[[str], None],
    ) -> None:
        """Train epoch by epoch until every candidate has stopped."""
        progress, n = self.progress, len(self.train.targets)
        while progress.epoch < self.settings.epochs and not all(progress.stopped):
            progress.epoch += 1
            start = time.perf_counter()
            row = {"epoch": progress.epoch} | self._train_epoch()
            row["seconds"] = time.perf_counter() - start
            row["images_per_second"] = n / row["seconds"]
            row["peak_memory_bytes"] = peak_memory_bytes(self.accelerator.device)
            probabilities = predict(self.model, valid, self.micro_batch, self.accelerator)
            row |= validated(probabilities, valid.targets, bool(self.settings.class_weights))
            progress.record(self.groups, row, self.settings.patience)
            if all(progress.failures):
                if checkpoint:
                    checkpoint.path.unlink(missing_ok=True)  # it leads here again
                raise InputError(
                    f"{progress.failures[0]}; lower the learning rate or check the chips"
                )
            leader = progress.histories[progress.best][-1]
            if leader["epoch"] == progress.epoch:
                self.accelerator.log(leader, step=progress.epoch)
            if checkpoint:
                self._write(checkpoint)
            if progress.is_reported(self.settings.epochs):
                report(progress.line(self.settings.epochs))

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
        epoch = f"epoch {self.progress.epoch} of {self.settings.epochs}"
        for rows in progress_bar(batches, desc=epoch, unit="step"):
            factor = self.factor(self.schedule.last_epoch)
            sums.append(self.step(rows, views[rows]))
        # One reduction for the epoch; asking earlier would make the device wait every batch.
        losses, correct = self.accelerator.reduce(torch.stack(sums)).cpu().unbind(dim=1)
        self.progress.note_failures(losses)
        return {
            "learning_rate": [group["lr"] * factor for group in self.groups],
            "train_loss": (losses.sum(dim=0) / n).tolist(),
            "train_acc": (correct.sum(dim=0) / n).tolist(),
        }

    def fit_micro_batch(self) -> None:
        """Reduce the share of a batch together until every process holds it, before any step.

        Later each process would wait in a gradient's reduction for one that has to begin again.
        """
        together = self.model.train()
        self.model = together.module  # in which no process waits for another
        try:
            while self._too_large():
                if self.micro_batch == 1:
                    raise InputError("batch_size: a device's memory does not hold one image")
                self.micro_batch = math.ceil(self.micro_batch / 2)
        finally:
            self.model = together

    def _too_large(self) -> bool:
        """Whether any process lacks the memory for its share of a batch."""
        rows = torch.arange(len(self.train.targets))[: self.micro_batch]
        short = torch.zeros(1, device=self.accelerator.device)
        try:
            self._backward(rows, torch.zeros_like(rows), 1.0, lambda part: None)
        except Exception as error:  # of the kinds that Accelerate takes for too little memory
            if not should_reduce_batch_size(error):
                raise
            short += 1
        self.optimizer.zero_grad()
        clear_device_cache(garbage_collection=True)
        return bool(self.accelerator.reduce(short).item())

    def random_batch(self) -> tuple[Tensor, Tensor]:
        """Rows and views of a batch for measurements, from torch's global generator."""
        rows = torch.randint(len(self.train.targets), (self.settings.batch_size,))
        return rows, torch.randint(self.train.views, rows.shape)

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    def step(
        self, rows: Tensor, views: Tensor, mark: Callable[[str], None] = lambda part: None
    ) -> Tensor:
        """One optimizer step on a batch; the model must be in training mode.

        Args:
            rows: (n,) of the batch's images, over all processes.
            views: (n,) the view of each.
            mark: called after each of `STEP_PARTS`, for who measures.

        Returns:
            Summed losses and hits of this process's images, (2, candidates).
        """
        total = self.weights[self.train.targets[rows]].sum().item()
        here = torch.arange(len(rows)).tensor_split(self.accelerator.num_processes)
        chunks = here[self.accelerator.process_index].split(self.micro_batch)
        sums = torch.zeros(2, len(self.groups), device=self.accelerator.device)
        for i, chunk in enumerate(chunks):
            last = i == len(chunks) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                sums += self._backward(rows[chunk], views[chunk], total, mark)
        if self.settings.max_grad_norm:
            for group in self.groups:
                self.accelerator.clip_grad_norm_(group["params"], self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        mark("optimizer")
        return sums

    def _backward(self, rows: Tensor, views: Tensor, total: float, mark) -> Tensor:
        """Add the gradients of some images of a batch whose weights sum to total."""
        device = self.accelerator.device
        inputs = self.train.take(rows, views, device)
        targets = self.train.targets[rows]
        weights, targets = (moved(tensor, device) for tensor in (self.weights[targets], targets))
        mark("data")
        with attention_precision(device.type, self.accelerator.mixed_precision):
            logits, losses = self.losses(self.model, inputs, targets, rows)
        mark("forward")
        # Processes average their gradients, so each scales its sum by their number.
        scale = self.accelerator.num_processes / total
        self.accelerator.backward((losses * weights).sum() * scale)
        mark("backward")
        hits = logits.detach().argmax(dim=2) == targets
        return torch.stack([losses.detach().sum(dim=1), hits.sum(dim=1)])

    def _write(self, checkpoint: Checkpoint) -> None:
        random, scaler = gather_object([_random_state()]), self.accelerator.scaler
        if self.accelerator.is_main_process:
            checkpoint.write(
                {
                    "progress": vars(self.progress),
                    "values": [[p.detach() for p in group["params"]] for group in self.groups],
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": scaler.state_dict() if scaler else None,
                    "random": random,
                },
                self.accelerator.num_processes,
            )


def warmup_and_cosine(steps: int, warmup_fraction: float) -> Callable[[int], float]:
    """Step -> factor of the learning rate: linear rise, then a cosine to zero.

    In closed form, unlike torch's chained schedules, so that going on gives the same bits.
    """
    warmup = max(1, round(warmup_fraction * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        falling = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 0.5 * (1 + math.cos(math.pi * falling))

    return factor


def _groups_by_rate(groups: list[dict]) -> list[dict]:
    """AdamW's groups: of every candidate one for each factor of its rate."""
    found: dict[tuple[int, float], dict] = {}
    for candidate, group in enumerate(groups):
        factors = group.get("factors", [1.0] * len(group["params"]))
        for parameter, factor in zip(group["params"], factors, strict=True):
            options = {"lr": group["lr"] * factor, "weight_decay": group["weight_decay"]}
            with_this = found.setdefault((candidate, factor), options | {"params": []})
            with_this["params"].append(parameter)
    return list(found.values())


def _copy_into(groups: list[dict], values: list[list[Tensor]]) -> None:
    with torch.no_grad():
        for group, of_group in zip(groups, values, strict=True):
            for parameter, value in zip(group["params"], of_group, strict=True):
                parameter.copy_(value.view_as(parameter))


def _random_state() -> dict:
    """State of the generators that dropout draws from."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
