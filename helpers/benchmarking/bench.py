"""What is benchmarked, on what, and how; and where the results go."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt

from helpers import InputError
from helpers.benchmarking.load_generator import LoadSettings
from helpers.benchmarking.percentiles import check_percentiles
from helpers.config import Places, folder_field
from helpers.data.dataset import ChipData
from helpers.deployment.variants.build import BUILDERS, DEFAULT
from helpers.deployment.variants.source import CONTROL, REFERENCE, Source, calibration_rows
from helpers.models.classifier import Classifier, torch_device
from helpers.models.files import EXAMPLE_MODEL, PREDICTIONS, load_model
from helpers.records import check_plain_name
from helpers.training.config import RunConfig

_MAX_BATCH = {"cpu": 8, "cuda": 64}


class BenchmarkConfig(Places):
    """Everything that decides a benchmark."""

    model_path: str = Field(
        EXAMPLE_MODEL,
        description="a model_final.safetensors, or the adapter folder of a LoRA run",
    )
    data_path: str = Field(
        "example", description="folder, CSV manifest, `eurosat`, or `example` (embedded)"
    )
    variants: tuple[Literal[tuple(BUILDERS)], ...] | None = Field(
        None,
        description=f"to build; {', '.join(DEFAULT)} by default; also "
        f"{', '.join(name for name in BUILDERS if name not in DEFAULT)}",
    )
    gate_points: float = Field(
        0.5,
        ge=0,
        description="accuracy that a deployable variant may lose, in percentage points: upper end "
        "of the 95 % interval on the validation split",
    )
    calibration_chips: PositiveInt = Field(
        64,
        description="training chips that static quantization is calibrated on, of all classes "
        "and groups",
    )
    recovery_epochs: PositiveInt = Field(
        3, description="epochs of distillation after structured pruning"
    )
    batch_sizes: tuple[PositiveInt, ...] = Field(
        (1, 8, 32), min_length=1, description="chips per prediction, ascending"
    )
    latency_samples: tuple[PositiveInt, ...] = Field(
        (30, 5, 5),
        description="least timed predictions of every variant, one number per batch size; more "
        "until its ratio to the reference is certain to 5 %",
    )
    percentiles: tuple[float, ...] = Field(
        (50.0, 90.0), description="of latency; shown where the samples carry them"
    )
    load_variants: tuple[Literal[tuple(BUILDERS)], ...] | None = Field(
        None, description="to put under load; the reference and the fastest that passes by default"
    )
    load_seconds: PositiveFloat = Field(0.5, description="least duration of one LoadGen run, s")
    start_qps: PositiveFloat | None = Field(
        None, description="first rate of the Server search; half the Offline rate by default"
    )
    latency_bound_ms: PositiveFloat = Field(
        100.0, description="what the p99 of the Server scenario must stay under, ms"
    )
    max_batch: PositiveInt | None = Field(
        None, description="most queries in one prediction under load; None: 8, on a GPU 64"
    )
    max_wait_ms: float = Field(
        0.0, ge=0, description="how long a query may wait for others to share its batch, ms"
    )
    queue_limit: PositiveInt = Field(
        256, description="waiting queries above which the next is refused"
    )
    load_fractions: tuple[PositiveFloat, ...] = Field(
        (0.3, 0.5, 0.7, 0.9, 1.1),
        description="of the measured capacity, offered in the load curve",
    )
    competing: tuple[int, ...] = Field(
        (0, 2), description="numbers of competing CPU-bound processes"
    )
    processes: tuple[PositiveInt, ...] = Field((1, 2), description="numbers of model processes")
    mlperf: bool = Field(False, description="MLPerf's durations: 600 s for every LoadGen run")
    threads: PositiveInt | None = Field(None, description="of one prediction; all cores by default")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="of PyTorch variants")
    seed: int = Field(
        0, ge=0, lt=2**32, description="of calibration chips, bootstrap draws and recovery"
    )
    results_path: str = folder_field("results_path", "tables and records")
    figures_path: str = folder_field("figures_path", "figures")
    run_name: str | None = Field(None, description="name of the results; the model's by default")

    @property
    def variant_names(self) -> tuple[str, ...]:
        """What to build; the control always, right after the reference."""
        return with_control(self.variants or DEFAULT)

    @property
    def load_settings(self) -> LoadSettings:
        """How to put a system under load."""
        return LoadSettings(
            seconds=self.load_seconds,
            latency_bound_ms=self.latency_bound_ms,
            max_batch=self.max_batch,
            max_wait_ms=self.max_wait_ms,
            queue_limit=self.queue_limit,
            mlperf=self.mlperf,
        )


def with_control(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once, and right after the reference its control."""
    pairs = [(name, CONTROL) if name == REFERENCE else (name,) for name in names]
    return tuple(dict.fromkeys(name for pair in pairs for name in pair))


@dataclass(frozen=True)
class Bench:
    """What is benchmarked, on what, and how.

    Args:
        config: the parameters.
        name: of the results' files.
        calibration: path in the data set of every chip that static quantization is calibrated on.
        label: backbone, weights and data, as they must stand beside every number.
        source: the classifier and what its variants are made of.
        data: the checked data set.
        chips: the test chips (N, bands, S, S).
        targets: their classes (N,).
        threads: of one prediction.
        device: `cpu` or `cuda`.
    """

    config: BenchmarkConfig
    name: str
    label: str
    source: Source
    calibration: tuple[str, ...]
    data: ChipData
    chips: np.ndarray
    targets: np.ndarray
    threads: int
    device: str

    def split(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Chips (N, bands, S, S) and targets (N,) of `valid`, which decides, or of `test`."""
        if name == "test":
            return self.chips, self.targets
        chips, targets = self.source.valid
        return chips.numpy(), targets.numpy()

    @property
    def test_paths(self) -> list[Path]:
        """The files of the test chips."""
        return self.data.dataset("test", self.source.classifier.config.image_size).paths


def open_bench(config: BenchmarkConfig) -> Bench:
    """Load the classifier and its data.

    Raises:
        InputError: no such model, damaged or of another architecture; data with other classes;
            percentiles that no batch size has the samples for; no GPU where one was asked for.
    """
    if len(config.latency_samples) != len(config.batch_sizes):
        raise InputError(
            f"latency_samples: {len(config.latency_samples)} numbers for "
            f"{len(config.batch_sizes)} batch_sizes; give one for each"
        )
    check_percentiles(config.percentiles, max(config.latency_samples))
    if config.run_name:
        check_plain_name("run_name", config.run_name)
    if REFERENCE not in config.variant_names:
        raise InputError(f"variants: {REFERENCE} is the reference and must be among them")
    if config.model_path == EXAMPLE_MODEL and not Path(EXAMPLE_MODEL).exists():
        raise InputError(
            f"model_path: no such file: {EXAMPLE_MODEL}; run setup_finetune.ipynb first, which "
            "trains it"
        )
    classifier, provenance, adapted = load_model(config.model_path)
    trained = {k: v for k, v in provenance["config"].items() if k in RunConfig.model_fields}
    data = RunConfig.checked(**trained | {"data_path": config.data_path}).data()
    if data.classes != classifier.config.classes:
        raise InputError(
            f"data_path: {config.data_path} has the classes {', '.join(data.classes)}, the model "
            f"was trained on {', '.join(classifier.config.classes)}; pass data with those"
        )
    name = config.run_name or f"benchmark_{provenance['run']}"
    check_plain_name("model_path", name)
    device = torch_device(config.device)
    config = config.model_copy(update={"max_batch": config.max_batch or _MAX_BATCH[device]})
    train, valid, test = (_chips(data, split, classifier) for split in ("train", "valid", "test"))
    rows = data.manifest[data.manifest.split == "train"]
    calibration = calibration_rows(rows, config.calibration_chips, config.seed)
    folder = Path(config.output_path) / name
    predictions = Path(config.model_path).parent / PREDICTIONS
    if predictions.is_file():  # so that a variant's answers have the thresholds of its model
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(predictions, folder / predictions.name)
    source = Source(
        classifier,
        train,
        valid,
        train[0][calibration],
        folder,
        adapted=adapted,
        device=device,
        recovery_epochs=config.recovery_epochs,
        seed=config.seed,
    )
    return Bench(
        config,
        name,
        f"{provenance['backbone']}, {classifier.config.image_size} px, "
        f"data {Path(config.data_path).name}",
        source,
        tuple(rows.img_path.iloc[calibration]),
        data,
        test[0].numpy(),
        test[1].numpy(),
        config.threads or os.cpu_count(),
        device,
    )


def _chips(data: ChipData, split: str, classifier: Classifier):
    dataset = data.dataset(split, classifier.config.image_size)
    return torch.stack([chip for chip, _ in dataset]), dataset.targets
