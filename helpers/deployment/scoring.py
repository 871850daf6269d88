"""From chips or a scene to answers, with any form of a trained classifier."""

import glob
import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pandas as pd
import torch
from pydantic import Field, PositiveFloat, PositiveInt

from helpers import InputError
from helpers.config import Config
from helpers.console import progress_bar
from helpers.data.chips import FORMATS, StoredChip, check_bands, filled, read_stored
from helpers.data.dataset import resize
from helpers.data.scenes import SUFFIXES, open_raster
from helpers.deployment.runtimes import Predict, Variant, load, torch_predict
from helpers.evaluation.calibration import (
    UNSURE,
    AnswerRule,
    check_threshold,
    fit_rule,
    read_validation,
)
from helpers.models.classifier import ClassifierConfig, config_from_json, torch_device
from helpers.models.files import PREDICTIONS, load_model
from helpers.records import written_whole

T = TypeVar("T")
READ_AHEAD = 4  # batches that are read while one is predicted
SCENE_SIDE = 2  # a TIFF with a side of so many training chips or more is a scene
_SUFFIXES = (".csv", ".parquet", ".tif", ".png", ".json")  # of results


class ModelConfig(Config):
    """A trained classifier, and how its logits become answers."""

    model_path: str = Field(
        description="a model_final.safetensors, an adapter folder, or the JSON of a built variant"
    )
    threshold: str = Field(
        "0.5", description="of the positive class: a number, f1, or recall=0.95 (validation split)"
    )
    error_rate: float | None = Field(
        None, gt=0, lt=1, description="share of wrong answers; others are `unsure` (conformal)"
    )
    temperature: PositiveFloat | None = Field(
        None, description="of the probabilities; the validation split's by default, else 1"
    )
    threads: PositiveInt | None = Field(None, description="of one prediction; all cores by default")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")


class PredictConfig(ModelConfig):
    """Everything that decides a prediction."""

    input: str = Field(
        description="a chip, a folder, a CSV with img_path, a glob, a scene (GeoTIFF, COG, VRT)"
    )
    output: str = Field(description="name of the results, with or without a suffix")
    kind: Literal["auto", "chips", "scene"] = Field(
        "auto", description="what the input is; auto: TIFFs of twice a training chip are scenes"
    )
    window: PositiveInt | None = Field(
        None, description="side of a scene's windows, pixels; that of a training chip by default"
    )
    stride: PositiveInt | None = Field(
        None, description="side of a scene's cells, pixels; the window by default"
    )
    resample: bool = Field(
        False, description="take windows as large on the ground as a training chip"
    )
    min_data: float = Field(
        0.5, gt=0, le=1, description="share of a cell and of its window that must have data"
    )
    on_unreadable: Literal["skip", "error"] = Field(
        "skip", description="chips that cannot be read: list them, or stop"
    )
    overwrite: bool = Field(False, description="replace results that are there")
    batch_size: PositiveInt = Field(32, description="windows or chips per prediction")
    engine: Literal["local", "ray"] = Field("local", description="of scenes: this process, or Ray")
    ray_address: str | None = Field(None, description="of a Ray cluster; None: started here")


@dataclass(frozen=True)
class Scorer:
    """A trained classifier in any form, ready to predict."""

    name: str  # of its file or folder
    classifier: ClassifierConfig
    logits_of: Predict
    digest: str  # SHA-256 of its files
    predictions: Path  # where its run keeps the predictions on the validation split

    @property
    def chip_size(self) -> int:
        """Side of a training chip in pixels."""
        return self.classifier.chip_size or self.classifier.image_size

    def check_pixels(self, name: str, n_bands: int, dtype: str) -> None:
        """Raise InputError for files of another band count or type than the training chips."""
        config = self.classifier
        if config.chip_bands is None:
            check_bands(config.bands, n_bands)
        elif n_bands != config.chip_bands:
            raise InputError(
                f"{name}: has {n_bands} bands, the classifier was trained on files of "
                f"{config.chip_bands}; give the same bands in the same order"
            )
        if config.chip_dtype not in (None, dtype):
            raise InputError(
                f"{name}: has values of type {dtype}, the classifier was trained on "
                f"{config.chip_dtype}; convert it to the same values"
            )

    def logits(self, chips: np.ndarray) -> np.ndarray:
        """Square chips (N, bands, S, S) of the classifier's size -> finite logits (N, classes)."""
        return self.finite(self.logits_of(chips))

    def finite(self, logits: np.ndarray) -> np.ndarray:
        """The same logits; raises InputError for NaN or infinity among them."""
        if not np.isfinite(logits).all():
            raise InputError(f"{self.name}: answers with NaN or infinity; use another form of it")
        return logits

    def prepared(self, stored: StoredChip) -> np.ndarray:
        """A stored chip as `logits` takes several; InputError if a band of it has no data."""
        chip = filled(stored, self.classifier.bands)
        chip = chip if chip.dtype == np.uint8 else chip.astype(np.float32)
        return self.fitted(chip[None])[0]

    def fitted(self, chips: np.ndarray) -> np.ndarray:
        """Chips (N, bands, H, W) of any size as `logits` takes them, resized as in training."""
        size = self.classifier.image_size
        return resize(torch.from_numpy(np.ascontiguousarray(chips)), size).numpy()


def open_model(path: str | Path, threads: int | None = None, device: str = "auto") -> Scorer:
    """Load a `model_final.safetensors`, an adapter folder, or a variant by its JSON.

    Raises:
        InputError: no such file, a damaged one, a runtime that is not installed, or no GPU where
            one was asked for.
    """
    path, device = Path(path), torch_device(device)
    threads = threads or os.cpu_count()
    if path.suffix == ".json" and path.is_file():
        try:
            variant = Variant.read(path)
            config = config_from_json(variant.options["classifier"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: not the description of a variant that the benchmark built "
                f"({type(error).__name__}: {error}); give the JSON beside its files"
            ) from error
        logits_of = load(variant, threads, device)
        files = [path, *(path.parent / name for name in variant.files)]
    else:
        classifier, _, _ = load_model(path)
        config = classifier.config
        torch.set_num_threads(threads)
        logits_of = torch_predict(classifier.to(device), device)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    predictions = path.parent / PREDICTIONS
    return Scorer(path.name, config, logits_of, digest.hexdigest(), predictions)


def answer_rule(scorer: Scorer, config: ModelConfig) -> AnswerRule:
    """How logits become answers, from the parameters and the run's validation split.

    Raises:
        InputError: a threshold of no known form, or the validation split is needed and the model
            has no predictions on it beside its file.
    """
    classes = scorer.classifier.classes
    needed = check_threshold(config.threshold, len(classes)) or config.error_rate is not None
    validation = read_validation(scorer.predictions, classes)
    if validation is not None:
        return fit_rule(
            *validation,
            temperature=config.temperature,
            threshold=config.threshold,
            error_rate=config.error_rate,
        )
    if needed:
        what = "threshold" if config.error_rate is None else "error_rate"
        raise InputError(
            f"{what}: {getattr(config, what)} needs predictions on the validation split, and there "
            f"is no {scorer.predictions}; train again, or take the default"
        )
    return AnswerRule(config.temperature or 1.0, float(config.threshold))


@dataclass(frozen=True)
class Inputs:
    """What shall be answered."""

    kind: str  # `chips` or `scene`
    paths: list[Path]
    names: list[str]  # as the results call them
    several: bool  # whether a folder or a glob was given, whatever it holds


def find_inputs(scorer: Scorer, config: PredictConfig) -> Inputs:
    """List the files that `config.input` names and tell chips from scenes.

    Raises:
        InputError: nothing there, a CSV without img_path, or chips beside scenes.
    """
    given = Path(config.input)
    if given.is_dir():
        found = sorted(p for p in given.rglob("*") if not _hidden(p.relative_to(given)))
        root = given
    elif given.suffix.lower() == ".csv":
        names = _listed(given)
        return Inputs("chips", [given.parent / name for name in names], names, several=True)
    elif given.exists():
        found, root = [given], given.parent
    else:
        found = sorted(map(Path, glob.glob(config.input, recursive=True)))
        root = Path(os.path.commonpath([p.parent for p in found])) if found else given
    suffixes = (*FORMATS, *SUFFIXES)
    paths = [p for p in found if p.suffix.lower() in suffixes and not p.is_dir()]
    if not paths:
        raise InputError(
            f"input: {config.input} names no image; give a chip, a folder, a CSV with img_path, "
            f"a glob, or a scene ({', '.join(suffixes)})"
        )
    kinds = dict.fromkeys(paths, config.kind)
    if config.kind == "auto":
        kinds = {path: _kind(path, scorer.chip_size) for path in paths}
    if len(set(kinds.values())) > 1:
        examples = {kind: path for path, kind in reversed(kinds.items())}
        raise InputError(
            f"input: chips ({examples['chips']}) beside scenes ({examples['scene']}); "
            "separate them, or say --kind chips or --kind scene"
        )
    names = [path.relative_to(root).as_posix() for path in paths]
    return Inputs(kinds[paths[0]], paths, names, several=given not in paths)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _listed(csv: Path) -> list[str]:
    try:
        table = pd.read_csv(csv, dtype=str, keep_default_na=False, skipinitialspace=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{csv}: not a readable CSV file ({str(error).strip()})") from error
    if "img_path" not in table or table.empty:
        raise InputError(f"{csv}: needs a column img_path and a row for each chip")
    return table["img_path"].str.strip().tolist()


def _kind(path: Path, chip_size: int) -> str:
    """`scene` for a VRT or a TIFF much larger than a training chip; all else are chips."""
    if path.suffix.lower() not in SUFFIXES:
        return "chips"
    try:
        with open_raster(path) as raster:
            large = max(raster.shape) >= SCENE_SIDE * chip_size
    except InputError:
        return "scene" if path.suffix.lower() == ".vrt" else "chips"
    return "scene" if large or path.suffix.lower() == ".vrt" else "chips"


def prefetched(items: Iterable[T]) -> Iterator[T]:
    """The same items, made in a thread while the caller works on those before."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, source, end) for _ in range(READ_AHEAD))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, source, end))
            yield item


def without_suffix(output: str) -> Path:
    """The name that all results share: `output` without a suffix that results have."""
    path = Path(output)
    return path.with_suffix("") if path.suffix.lower() in _SUFFIXES else path


def score_chips(
    scorer: Scorer, rule: AnswerRule, inputs: Inputs, config: PredictConfig
) -> list[Path]:
    """Answer chips and write `<output>.csv`, or Parquet where the suffix says so.

    One row a chip in the order of the input: img_path, label (the class), the probability of each
    class, `p_<class>`, and answer (the class, or `unsure`). Chips that cannot be read are listed
    with the reason in `<output>_skipped.csv`. Returns the files.

    Raises:
        InputError: results that are there, no readable chip, or, with `on_unreadable="error"`, one
            that is not; a chip of other bands or another type than the training chips.
    """
    stem, parquet = without_suffix(config.output), config.output.lower().endswith(".parquet")
    file = Path(f"{stem}.parquet" if parquet else f"{stem}.csv")
    skipped_file = Path(f"{stem}_skipped.csv")
    for path in (file, skipped_file):
        if path.exists() and not config.overwrite:
            raise InputError(f"output: {path} is there; give another name, or --overwrite")
    logits, reasons = [], {}
    with progress_bar(total=len(inputs.paths), desc="chips", unit="chip") as bar:
        for chips, unreadable in prefetched(_chip_batches(scorer, inputs, config)):
            if len(chips):
                logits.append(scorer.logits(chips))
            reasons |= unreadable
            bar.update(len(chips) + len(unreadable))
    skipped = pd.DataFrame(reasons.items(), columns=["position", "reason"])
    skipped.insert(0, "img_path", [inputs.names[i] for i in skipped.pop("position")])
    if not logits:
        first = skipped.iloc[0]
        raise InputError(
            f"{config.input}: none of {len(skipped)} chips can be read, such as {first.img_path}: "
            f"{first.reason}"
        )
    probabilities, classes, unsure = rule(np.concatenate(logits))
    names = np.array(scorer.classifier.classes)
    table = pd.DataFrame(
        {
            "img_path": [name for i, name in enumerate(inputs.names) if i not in reasons],
            "label": names[classes],
            **{f"p_{name}": probabilities[:, i] for i, name in enumerate(names)},
            "answer": np.where(unsure, UNSURE, names[classes]),
        }
    )
    with written_whole(file) as part:
        if parquet:
            table.to_parquet(part, index=False)
        else:
            table.to_csv(part, index=False, float_format="%.6g")
    skipped_file.unlink(missing_ok=True)
    if reasons:
        with written_whole(skipped_file) as part:
            skipped.to_csv(part, index=False)
    return [file, skipped_file] if reasons else [file]


def _chip_batches(
    scorer: Scorer, inputs: Inputs, config: PredictConfig
) -> Iterator[tuple[np.ndarray, dict[int, str]]]:
    """Readable chips in batches (N, bands, S, S), and position -> reason for the others."""

    def unreadable(path: Path, error: InputError) -> str:
        if config.on_unreadable == "error":
            raise InputError(f"{path}: {error}") from error
        return str(error)

    def read(position: int) -> np.ndarray | str:
        path = inputs.paths[position]
        try:
            stored = read_stored(path)
        except InputError as error:
            return unreadable(path, error)
        scorer.check_pixels(str(path), len(stored.values), str(stored.values.dtype))
        try:
            return scorer.prepared(stored)
        except InputError as error:
            return unreadable(path, error)

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(inputs.paths), config.batch_size):
            positions = range(start, min(start + config.batch_size, len(inputs.paths)))
            found = dict(zip(positions, pool.map(read, positions), strict=True))
            reasons = {i: what for i, what in found.items() if isinstance(what, str)}
            chips = [what for what in found.values() if not isinstance(what, str)]
            yield (np.stack(chips) if chips else np.empty(0)), reasons
