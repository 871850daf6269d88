"""All runs that answer the project's questions on one task, from one configuration file.

Every method gets a learning rate, chosen on validation with as many trials as any other method,
and then its other seeds, smaller shares of the training chips and a split that mixes places; after
all methods come other ranks and layers. Finished runs are read, so that it goes on where it was
stopped.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helpers import InputError
from helpers.data.dataset import ChipData, DataConfig
from helpers.data.manifest import check_pixels
from helpers.evaluation.task import Task, Trial, grid, planned, run_config
from helpers.training.config import RunConfig
from helpers.training.jobs import FINISHED_BEFORE, Job, locally
from helpers.training.runs import Run
from helpers.training.setup import new_classifier

MOST_EXTENSIONS = 2  # of a grid whose best learning rate lies on its edge
EPOCHS_TO_BEST = 8  # of adapters on the tasks here, for the estimate alone
START_SECONDS = 5  # of a run beside its passes: start, decoding, saving
BACKWARD = 3  # a training step takes about three forward passes
NOT_FINITE = "is not finite at epoch"  # what a diverged run says


@dataclass(frozen=True)
class Choice:
    """A learning rate: how often its grid was extended, and whether it still lies on the edge."""

    rate: float
    extended: int
    on_edge: bool


def random_split(data: ChipData, seed: int) -> ChipData:
    """The same chips, with as many of each class in each split, drawn chip by chip.

    So places lie in several splits, as where nobody took care; the chips have no group any more,
    since an interval over places asks for other places, which this split has none of. (A manifest
    of its own would have to lie beside the images.)
    """
    manifest, generator = data.manifest.assign(group=""), np.random.default_rng(seed)
    splits = manifest["split"].to_numpy(copy=True)
    for rows in manifest.groupby("target").indices.values():
        splits[rows] = generator.permutation(splits[rows])
    leaks = ["the split was drawn chip by chip, so that places lie in several splits"]
    return replace(data, manifest=manifest.assign(split=splits), leaks=leaks)


@torch.inference_mode()
def forward_seconds(config: RunConfig, data: ChipData) -> tuple[float, int]:
    """Seconds that a chip takes through the backbone on this machine, and its number of blocks."""
    classifier = new_classifier(config, data).to(config.torch_device).eval()
    size = (16, len(data.bands), config.image_size, config.image_size)
    chips = torch.zeros(size, device=config.torch_device)
    classifier(chips).cpu()
    start = time.perf_counter()
    classifier(chips).cpu()
    return (time.perf_counter() - start) / len(chips), len(classifier.backbone.blocks)


class Collection:
    """The runs of one task: what is planned, what is done, and how long the rest takes."""

    def __init__(self, task: Task, output: str | Path, report: Callable[[str], None] = print):
        """Check every row's parameters and the data; runs will go to `<output>/<task>`.

        Raises:
            InputError: a parameter or the data cannot be used.
        """
        self.task, self.report = task, report
        self.folder = Path(output) / task.name
        self.left = [*grid(task), *(trial for stage in planned(task).values() for trial in stage)]
        shapes = [Trial(name, task.seeds[0]) for name in task.shapes]
        configs = [self.config(trial).resolved() for trial in (*grid(task), *shapes)]
        self.data = DataConfig.data(configs[0])
        for config in configs:
            self._data(config)  # the bands of every row are there
        self.runs: dict[Trial, Run] = {}
        self.trials: list[dict[str, Any]] = []
        self.choices: dict[str, Choice] = {}
        self.expected = self.seconds = 0.0
        self._forward_seconds, self._depth = forward_seconds(configs[0], self.data)

    def config(self, trial: Trial) -> RunConfig:
        """Parameters of a run."""
        return run_config(self.task, trial, self.folder)

    def _data(self, config: RunConfig) -> ChipData:
        """The chips with the bands of a row."""
        return replace(self.data, bands=check_pixels(self.data.manifest, config.bands))

    def is_measured(self, trial: Trial) -> bool:
        """Whether a run trains in a process of its own, for its seconds and memory."""
        full = trial.fraction == 1 and not trial.random_split
        return full and trial.seed == self.task.seeds[0]

    def announce(self) -> None:
        """Say how many runs are planned, and about how long they take."""
        chips = self.data.manifest["split"].value_counts()
        edges = MOST_EXTENSIONS * len(self.task.methods)
        seconds = sum(map(self._expected, self.left))
        self.report(
            f"{self.task.name}: {len(self.left)} runs planned on {chips['train']} training, "
            f"{chips['valid']} validation and {chips['test']} test chips, at most {edges} more "
            f"where a best learning rate lies on the edge of its grid; about {spoken(seconds)} on "
            "this machine, less what is finished already"
        )

    def _expected(self, trial: Trial) -> float:
        """Seconds that a run may take."""
        return START_SECONDS + self._forward_seconds * self._passes(trial)

    def _passes(self, trial: Trial) -> float:
        """A run in chips that pass the whole backbone forward."""
        config, splits = self.config(trial), self.data.manifest["split"].value_counts()
        train = splits["train"] * trial.fraction
        once = train + splits["valid"] + splits["test"]
        if config.method == "head_only":
            return once
        share = min(1, (config.adapted_blocks or self._depth) / self._depth)
        epochs = min(config.epochs, config.patience + EPOCHS_TO_BEST)
        return once + epochs * share * (BACKWARD * train + splits["valid"])

    def run(self, trial: Trial) -> Run:
        """Train, test and save a run, or read it, and say so."""
        self.run_all([trial])
        return self.runs[trial]

    def run_all(self, trials: list[Trial]) -> None:
        """The same with several; those that are not measured train side by side."""
        jobs = [self._job(trial) for trial in trials]
        trial_of = {job.config.name: trial for job, trial in zip(jobs, trials, strict=True)}
        start = time.perf_counter()
        for job, run, took in locally(jobs):
            trial = trial_of[job.config.name]
            self.runs[trial] = replace(run, classifier=None, adapter=None)  # memory
            if took != FINISHED_BEFORE:
                self.expected += self._expected(trial)
                self.seconds += time.perf_counter() - start
            failure = run.record["failure"] and f"; WARNING: {run.record['failure']}"
            epochs = f"best epoch {run.record['best_epoch']} of {run.record['epochs_trained']}"
            self._say(trial, f"{epochs}, {took}{failure}")
            start = time.perf_counter()

    def _job(self, trial: Trial) -> Job:
        config = self.config(trial)
        data = self._data(config)
        if trial.random_split:
            data = random_split(data, trial.seed)
        return Job(config, config.share(data), self.is_measured(trial))

    def _say(self, trial: Trial, said: str) -> None:
        """Strike a run off the plan and say how it ended and how long the others take."""
        done = len(self.runs) + sum(row["failure"] != "" for row in self.trials)
        plan = [trial, replace(trial, rate=None)]
        self.left = [other for other in self.left if other not in plan]
        left = ""
        if self.expected and self.left:
            seconds = self.seconds / self.expected * sum(map(self._expected, self.left))
            left = f"; about {spoken(seconds)} left"
        self.report(f"[{done}/{done + len(self.left)}] {trial.name}: {said}{left}")

    def choose(self, method: str) -> Choice:
        """The learning rate with the lowest validation loss, first seed.

        Where the best one lies on the edge of the grid, the grid gets another one beyond it, at
        its own factor.

        Raises:
            InputError: no learning rate trains, or as `jobs.finished`.
        """
        rates = sorted(self.task.methods[method].learning_rates)
        factor = (rates[-1] / rates[0]) ** (1 / (len(rates) - 1))
        losses = {rate: self._tried(method, rate) for rate in rates}
        extended = 0
        while True:
            best, rates = min(losses, key=losses.get), sorted(losses)
            if math.isinf(losses[best]):
                raise InputError(f"{self.task.name}, {method}: no learning rate trains; lower them")
            on_edge = best in (rates[0], rates[-1])
            if not on_edge or extended == MOST_EXTENSIONS:
                break
            beyond = best / factor if best == rates[0] else best * factor
            beyond = float(f"{beyond:.3g}")
            self.left.append(Trial(method, self.task.seeds[0], beyond))
            losses[beyond] = self._tried(method, beyond)
            extended += 1
        return Choice(best, extended, on_edge)

    def _tried(self, method: str, rate: float) -> float:
        """Validation loss of a trial, infinite where it diverged; adds its row to `trials`."""
        trial = Trial(method, self.task.seeds[0], rate)
        row = {"method": method, "learning_rate": rate, "failure": ""}
        try:
            run = self.run(trial)
        except InputError as error:
            if NOT_FINITE not in str(error):
                raise
            self.trials.append(row | {"failure": str(error)})
            self._say(trial, str(error))
            return math.inf
        candidate = run.record["candidates"][0]
        numbers = {name: candidate[name] for name in ("valid_loss", "valid_auroc", "best_epoch")}
        self.trials.append(row | numbers | {"epochs": run.record["epochs_trained"]})
        return candidate["valid_loss"]

    def rate(self, name: str) -> float:
        """The chosen learning rate of a row, or of the row that a shape changes."""
        shape = self.task.shapes.get(name)
        return self.choices[shape.of if shape else name].rate

    def published(self) -> dict[Trial, Run]:
        """Finished runs with the chosen learning rates."""
        return {t: run for t, run in self.runs.items() if self.rate(t.method) == t.rate}

    def collect(self, gather: Callable[["Collection"], None]) -> None:
        """Do all runs that are missing; after each stage `gather` writes what is done.

        Raises:
            InputError: as `choose` and `jobs.finished`.
        """
        for stage, trials in planned(self.task).items():
            if stage in self.task.methods:
                self.choices[stage] = self.choose(stage)
            self.run_all([replace(trial, rate=self.rate(trial.method)) for trial in trials])
            if trials or stage in self.task.methods:
                gather(self)


def spoken(seconds: float) -> str:
    """A duration in the unit that a person would say it in."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
