"""Two ways to train the same adapter: as a plain notebook does, and as this project does.

The third, Hugging Face's Trainer, is in `hugging_face`. All take the same chips, batch, epochs,
warm-up, schedule and clipping, and validate after each epoch; the epoch with the lowest validation
loss is tested.
"""

import copy
from unittest import mock

import numpy as np
import peft.optimizers  # noqa: F401  loaded when an adapter is made; here before the clock starts
import torch
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from benchmarks.clock import Clock
from helpers.data.dataset import ChipData
from helpers.metrics import weighted_metrics
from helpers.models.adapters import add_adapter
from helpers.training.config import RunConfig
from helpers.training.loop import FitSettings, Loop, warmup_and_cosine
from helpers.training.methods import adapter_settings, train
from helpers.training.progress import Progress
from helpers.training.runs import class_probabilities
from helpers.training.setup import new_classifier


def auroc(targets: np.ndarray, probabilities: np.ndarray) -> float:
    """AUROC of probabilities (N, classes)."""
    return float(weighted_metrics(targets, probabilities)["auroc"][0])


def optimizer_and_schedule(model: torch.nn.Module, config: RunConfig, images: int):
    """AdamW on what is trained, and the schedule of this project's loop."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    steps = config.epochs * -(-images // config.batch_size)
    factor = warmup_and_cosine(steps, FitSettings.warmup_fraction)
    return optimizer, LambdaLR(optimizer, factor)


def plain(config: RunConfig, data: ChipData, clock: Clock) -> np.ndarray:
    """A plain notebook loop: every chip decoded in every epoch, the loss fetched in every step.

    Returns:
        Probabilities (N, classes) of the test chips.
    """
    torch.manual_seed(config.seed)
    model = add_adapter(new_classifier(config, data), adapter_settings(config))
    splits = {s: data.dataset(s, config.image_size) for s in ("train", "valid", "test")}
    loaders = {s: DataLoader(d, config.batch_size, s == "train") for s, d in splits.items()}
    optimizer, schedule = optimizer_and_schedule(model, config, len(splits["train"]))
    trained = optimizer.param_groups[0]["params"]
    lowest, best = np.inf, None
    clock.mark("once")
    for _ in range(config.epochs):
        model.train()
        total = 0.0
        for chips, targets in loaders["train"]:
            clock.mark("data")
            loss = functional.cross_entropy(model(chips), targets)
            clock.mark("forward")
            optimizer.zero_grad()
            loss.backward()
            clock.mark("backward")
            torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()
            schedule.step()
            total += loss.item()
            clock.mark("optimizer")
        probabilities, targets = _predicted(model, loaders["valid"])
        clock.epoch(auroc(targets, probabilities))
        loss = -np.log(probabilities[np.arange(len(targets)), targets].clip(1e-12)).mean()
        if loss < lowest:
            lowest, best = loss, copy.deepcopy([p.detach() for p in trained])
    with torch.no_grad():
        for parameter, value in zip(trained, best, strict=True):
            parameter.copy_(value)
    return _predicted(model, loaders["test"])[0]


@torch.inference_mode()
def _predicted(model: torch.nn.Module, loader: DataLoader) -> tuple[np.ndarray, np.ndarray]:
    model.eval()
    parts = [(model(chips).softmax(1), targets) for chips, targets in loader]
    return tuple(torch.cat(tensors).numpy() for tensors in zip(*parts, strict=True))


def project(config: RunConfig, data: ChipData, clock: Clock) -> np.ndarray:
    """A run of this project, with its checkpoint after every epoch; returns as `plain`."""
    record, train_epoch, step = Progress.record, Loop._train_epoch, Loop.step

    def recorded(progress: Progress, *arguments) -> None:
        record(progress, *arguments)
        clock.epoch(progress.histories[0][-1]["valid_auroc"])

    def trained(loop: Loop) -> dict:
        clock.mark("checkpoint" if clock.epochs else "once")
        row = train_epoch(loop)
        clock.mark("optimizer")
        return row

    with (
        mock.patch.object(Progress, "record", recorded),
        mock.patch.object(Loop, "_train_epoch", trained),
        mock.patch.object(Loop, "step", lambda *given: step(*given, clock.mark)),
    ):
        run = train(config, data, report=lambda line: None)
    return class_probabilities(run.test_predictions)
