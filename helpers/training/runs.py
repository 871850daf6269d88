"""What a training run leaves behind, and reading it again."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import confusion_matrix
from torch import Tensor

from helpers import InputError
from helpers.data.dataset import ChipData
from helpers.data.splits import SPLITS
from helpers.metrics import METRICS, evaluate, weighted_metrics, with_interval
from helpers.models.adapters import load_adapter, merge_adapter, save_adapter
from helpers.models.architectures import weights_licence
from helpers.models.backbones import create_backbone, weights_digest
from helpers.models.classifier import Classifier
from helpers.models.files import PREDICTIONS, load_classifier, save_classifier
from helpers.records import environment, write_json, written_whole
from helpers.training.card import CARD, shareable, write_card
from helpers.training.config import RunConfig
from helpers.training.progress import Progress

if TYPE_CHECKING:
    from peft import PeftModel

MERGED_LIMIT_BYTES = 500e6
"""A merged copy of a larger backbone is only kept on demand: its adapter is a thousandth of it."""

WEIGHTS, ADAPTER = "model_final.safetensors", "adapter"


@dataclass(frozen=True)
class Run:
    """A finished training run; without classifier and adapter where records alone were read.

    Predictions have a row per validation and test chip: split, img_path, group, label, target,
    predicted and the probability of each class, `p_<class>` (float32).
    """

    classifier: Classifier | None  # on the CPU, of the best epoch, an adapter merged
    adapter: PeftModel | None  # the same unmerged, for the methods of PEFT
    history: pd.DataFrame  # an epoch of the chosen candidate a row (`progress.HISTORY_COLUMNS`)
    predictions: pd.DataFrame
    record: dict[str, Any]  # what the run's JSON holds

    @property
    def candidates(self) -> pd.DataFrame:
        """One row per candidate of the sweep."""
        return pd.DataFrame(self.record["candidates"])

    @property
    def test_predictions(self) -> pd.DataFrame:
        """The predictions of the test split, one row a chip in the order of the manifest."""
        return self.predictions[self.predictions.split == "test"].reset_index(drop=True)


def predictions_table(
    data: ChipData, probabilities: dict[str, Tensor | np.ndarray]
) -> pd.DataFrame:
    """`Run.predictions` from the probabilities (n, classes) of each split."""
    tables = []
    for split, values in probabilities.items():
        values = np.asarray(values, dtype=np.float32)
        rows = data.manifest.loc[
            data.manifest.split == split, ["split", "img_path", "group", "label", "target"]
        ]
        columns = {f"p_{name}": values[:, i] for i, name in enumerate(data.classes)}
        tables.append(rows.assign(predicted=values.argmax(axis=1), **columns))
    return pd.concat(tables, ignore_index=True)


def class_probabilities(predictions: pd.DataFrame) -> np.ndarray:
    """The columns `p_<class>` as (N, classes)."""
    return predictions.filter(regex="^p_").to_numpy()


def metric_entries(predictions: pd.DataFrame) -> dict[str, dict[str, float]]:
    """`metrics.evaluate` of predictions, as records hold it: metric -> value, low, high, ..."""
    table = evaluate(
        predictions.target.to_numpy(),
        class_probabilities(predictions),
        groups=predictions.group.to_numpy(),
    )
    return table.round(6).to_dict("index")


def metric_values(predictions: pd.DataFrame) -> dict[str, dict[str, float]]:
    """The same without intervals: metric -> value."""
    values = weighted_metrics(predictions.target.to_numpy(), class_probabilities(predictions))
    return {name: {"value": round(float(values[name][0]), 6)} for name in METRICS}


def finished_run(
    config: RunConfig,
    data: ChipData,
    classifier: Classifier,
    adapter: PeftModel | None,
    progress: Progress,
    candidates: pd.DataFrame,
    parameters: dict[str, int],
    probabilities: dict[str, Tensor],
    digest: str,
) -> Run:
    """Gather what a run with a resolved configuration leaves behind.

    The classifier, of the best epoch, is moved to the CPU, where an adapter is. `candidates` are
    the sweep's parameters, one row each; how each ended is added. `probabilities` (n, classes) are
    those of the splits valid and test, `digest` is of the backbone's weights before training.
    """
    predictions = predictions_table(data, probabilities)
    history = progress.history(progress.best)
    candidates = candidates.assign(
        best_epoch=progress.best_epoch,
        valid_loss=progress.best_loss,
        valid_auroc=[
            rows[epoch - 1]["valid_auroc"] if epoch else None
            for rows, epoch in zip(progress.histories, progress.best_epoch, strict=True)
        ],
        failure=progress.failures,
    )
    record = {
        "run": config.name,
        "backbone": config.label,
        "method": config.method,
        "data": Path(config.data_path).name,
        "config": config.deciding(),
        "classifier": asdict(classifier.config),
        "parameters": parameters,
        "weights_digest": digest,
        "licence": weights_licence(config.backbone, config.weights),
        "data_fingerprint": data.fingerprint,
        "leaks": list(data.leaks),
        "skipped": data.skipped.to_dict("records"),
        "chips": {split: int((data.manifest.split == split).sum()) for split in SPLITS},
        "best_epoch": progress.best_epoch[progress.best],
        "epochs_trained": len(history),
        "failure": _worse_than_chance(config, data, progress),
        "candidates": candidates.replace([np.inf, np.nan], None).to_dict("records"),
        "valid": metric_values(predictions[predictions.split == "valid"]),
        "test": metric_entries(predictions[predictions.split == "test"]),
        "confusion_matrix": confusion_matrix(
            *predictions.loc[predictions.split == "test", ["target", "predicted"]].to_numpy().T,
            labels=range(len(data.classes)),
        ).tolist(),
        "environment": environment(),
    }
    return Run(classifier.cpu(), adapter, history, predictions, record)


def _worse_than_chance(config: RunConfig, data: ChipData, progress: Progress) -> str:
    """Why the best epoch is not worth keeping; empty where it is.

    The bar is the validation loss of always answering with the classes' frequencies in training
    (with balanced class weights: equal ones).
    """
    train, valid = (
        data.manifest.target[data.manifest.split == split].value_counts().sort_index()
        for split in ("train", "valid")
    )
    if config.class_weights == "balanced":
        chance = np.log(len(train))
    else:
        chance = -(valid * np.log(train / train.sum())).sum() / valid.sum()
    lowest = progress.best_loss[progress.best]
    if lowest < chance:
        return ""
    return (
        f"no better than chance: the lowest validation loss, {lowest:.4g}, is not below the "
        f"{chance:.4g} of always answering with the frequencies of the classes"
    )


def save_run(config: RunConfig, run: Run) -> None:
    """Write classifier, adapter, model card, predictions, history and, last, the record.

    The record gains `bytes_to_keep`, what one more task needs on disk beside the shared backbone
    (the adapter folder, the head's numbers, or a full copy), and `files`, the digest of each but
    the card, by which reading finds files of two runs. The run's checkpoint is deleted.
    """
    provenance = shareable(run.record)
    weights, files = config.folder / WEIGHTS, []
    small = sum(p.nbytes for p in run.classifier.parameters()) < MERGED_LIMIT_BYTES
    merged = small if config.save_merged is None else config.save_merged
    if merged or run.adapter is None:
        files.append(save_classifier(run.classifier, weights, provenance))
    else:
        weights.unlink(missing_ok=True)
    if run.adapter:
        digest = run.record["weights_digest"]
        files.append(save_adapter(run.adapter, config.folder / ADAPTER, digest, provenance))
        needed = sum(file.stat().st_size for file in files[-1].iterdir())
    elif config.method == "full":
        needed = weights.stat().st_size
    else:
        needed = sum(p.nbytes for p in run.classifier.linear_head.parameters())
    write_card(config.folder, provenance, files[0].name)
    files.append(config.folder / PREDICTIONS)
    with written_whole(files[-1]) as part:
        run.predictions.to_parquet(part, index=False)
    files.append(_record_file(config).with_suffix(".csv"))
    with written_whole(files[-1]) as part:
        # Nine digits hold a 32-bit number exactly: a run that is read is the run that was.
        run.history.to_csv(part, index=False, float_format="%.9g")
    run.record["bytes_to_keep"] = needed
    run.record["files"] = {file.name: _digest(file) for file in files}
    write_json(_record_file(config), run.record)
    checkpoint_path(config).unlink(missing_ok=True)


def saved_files(config: RunConfig) -> list[Path]:
    """What there is of a run on disk: weights, adapter, card, predictions, history and record."""
    files = [config.folder / name for name in (WEIGHTS, ADAPTER, CARD, PREDICTIONS)]
    files += [_record_file(config).with_suffix(".csv"), _record_file(config)]
    return [file for file in files if file.exists()]


def checkpoint_path(config: RunConfig) -> Path:
    """Where a run keeps its state while it trains."""
    return config.folder / "checkpoint.pt"


def read_record(config: RunConfig) -> dict[str, Any] | None:
    """The record under a run's name, whatever its parameters; None where there is none.

    Raises:
        InputError: the file is not a record of this project.
    """
    path = _record_file(config)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        return record | {"config": dict(record["config"]), "files": dict(record["files"])}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not a record of this project ({error}); remove it, or use another run_name"
        ) from error


def differences(
    config: RunConfig, record: dict[str, Any], data: ChipData | None = None
) -> list[str]:
    """In words, what a record has other than a run with these parameters would have.

    `auto` stands for any value. With data, their fingerprint and the digest of the backbone's
    weights, which may lie under the same path as others did, are compared too.
    """
    wanted = {n: v for n, v in config.deciding().items() if v != "auto"}
    found = {name: record["config"].get(name) for name in wanted}
    if data is not None:
        wanted |= {
            "data_fingerprint": data.fingerprint,
            "weights_digest": starting_digest(config, data),
        }
        found |= {name: record.get(name) for name in ("data_fingerprint", "weights_digest")}
    return [
        f"{name} was {found[name]!r} and is {value!r}"
        for name, value in wanted.items()
        if found[name] != value
    ]


def starting_digest(config: RunConfig, data: ChipData) -> str:
    """Digest of the backbone that a run starts from, as the files of the weights are now."""
    file, new_stem = Path(config.weights), config.stem == "new"
    return _backbone_digest(
        config.seed if config.weights == "random" or new_stem else 0,
        file.stat().st_mtime_ns if file.is_file() else 0,
        *(config.backbone, config.weights, config.image_size, len(data.bands), new_stem),
    )


@lru_cache(4)  # a comparison asks for every run, and a large backbone takes seconds
def _backbone_digest(seed: int, _, *backbone) -> str:
    torch.manual_seed(seed)
    return weights_digest(create_backbone(*backbone))


def read_run(config: RunConfig) -> Run | None:
    """A run that `save_run` wrote, or None where none has these parameters.

    Classifier and adapter are None where their files are not there: records are published more
    often than weights. Predictions come from the run's folder, or else from a file in which a
    report's were gathered (`gather_predictions`).

    Raises:
        InputError: a file is damaged, missing or of another run than the record.
    """
    record = read_record(config)
    if record is None or differences(config, record):
        return None
    history = _record_file(config).with_suffix(".csv")
    weights, adapter = config.folder / WEIGHTS, config.folder / ADAPTER
    if not history.is_file():
        raise InputError(f"{history} is missing beside its record; train the run again")
    predictions = config.folder / PREDICTIONS
    for file in (history, weights, adapter, predictions):
        if file.exists() and _digest(file) != record["files"].get(file.name):
            raise InputError(
                f"{file} is not the one that {_record_file(config)} was written with, perhaps "
                "since a later run was interrupted; train the run again"
            )
    peft = load_adapter(adapter)[0] if adapter.is_dir() else None
    classifier = merge_adapter(copy.deepcopy(peft)) if peft else None
    if weights.is_file():
        classifier = load_classifier(weights)[0]
    return Run(classifier, peft, pd.read_csv(history), _read_predictions(config), record)


def _read_predictions(config: RunConfig) -> pd.DataFrame:
    path = config.folder / PREDICTIONS
    if path.is_file():
        return pd.read_parquet(path)
    for gathered in sorted(Path(config.history_path).glob("*.parquet")):
        rows = pd.read_parquet(gathered, filters=[("run", "==", config.name)])
        if len(rows):  # runs of other classes have columns that are empty here
            return rows.drop(columns="run").dropna(axis=1, how="all")
    raise InputError(
        f"{path} is missing, and no .parquet file in {config.history_path} holds its predictions; "
        "train the run again"
    )


def gather_predictions(runs: Iterable[Run], path: str | Path) -> Path:
    """Write the predictions of a report's runs into one file, with the column `run`."""
    with written_whole(path) as part:
        pd.concat(
            [run.predictions.assign(run=run.record["run"]) for run in runs], ignore_index=True
        ).to_parquet(part, index=False)
    return Path(path)


def _record_file(config: RunConfig) -> Path:
    return Path(config.history_path) / f"{config.name}.json"


def _digest(path: Path) -> str:
    """Short SHA-256 of a file, or of the adapter's weights in its folder."""
    with open(path / "adapter_model.safetensors" if path.is_dir() else path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def metric_rows(entries: dict[str, dict], metrics: tuple[str, ...] = METRICS) -> pd.DataFrame:
    """Test metrics by model name, one row a metric: `model`, `metric`, `value`, `low`, `high`."""
    return pd.DataFrame(
        {"model": name, "metric": metric}
        | {column: values[metric][column] for column in ("value", "low", "high")}
        for name, values in entries.items()
        for metric in metrics
    )


def test_table(entries: dict[str, dict]) -> pd.DataFrame:
    """Test metrics by model name as text, `value [low, high]`, one row a metric."""
    return pd.DataFrame(
        {name: {m: with_interval(values[m]) for m in METRICS} for name, values in entries.items()}
    )
