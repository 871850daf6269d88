"""What a training run leaves behind, and reading it again."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from peft import PeftModel
from sklearn.metrics import confusion_matrix
from torch import Tensor

from helpers import InputError
from helpers.data.dataset import ChipData
from helpers.data.splits import SPLITS
from helpers.metrics import METRICS, evaluate, with_interval
from helpers.models.adapters import load_adapter, save_adapter
from helpers.models.architectures import weights_licence
from helpers.models.classifier import Classifier
from helpers.models.files import load_classifier, save_classifier
from helpers.records import environment, write_json, written_whole
from helpers.training.config import WITHOUT_EFFECT, RunConfig
from helpers.training.loop import Progress

# The tables of a run, and how the names of their files end.
_TABLES = {"history": "", "candidates": "_candidates", "predictions": "_predictions"}


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Args:
        classifier: holds the weights of the best epoch, an adapter merged into them; None for a
            run read from its records alone.
        adapter: the same unmerged, for lora and dora.
        history: one row per epoch of the chosen candidate (`loop.HISTORY_COLUMNS`).
        candidates: one row per candidate of the sweep.
        predictions: one row per test chip: img_path, group, label, target, predicted and the
            probability of each class, `p_<class>`.
        record: what the run's JSON holds.
    """

    classifier: Classifier | None
    adapter: PeftModel | None
    history: pd.DataFrame
    candidates: pd.DataFrame
    predictions: pd.DataFrame
    record: dict


def finished_run(
    config: RunConfig,
    data: ChipData,
    classifier: Classifier,
    adapter: PeftModel | None,
    progress: Progress,
    candidates: pd.DataFrame,
    parameters: dict[str, int],
    probabilities: Tensor,
) -> Run:
    """Gather what a run leaves behind; test metrics come from probabilities (M, classes)."""
    test = data.manifest[data.manifest.split == "test"]
    targets = test.target.to_numpy()
    from helpers.evaluation.baselines import baselines  # evaluation stands on training

    rows = baselines(data, config.image_size) | {config.label: probabilities.numpy()}
    history = progress.history(progress.best)
    record = {
        "run": config.name,
        "backbone": config.label,
        "licence": weights_licence(config.backbone, config.weights),
        "method": config.method,
        "data": Path(config.data_path).name,
        "config": config.model_dump(),
        "classifier": asdict(classifier.config),
        "parameters": parameters,
        "data_fingerprint": data.fingerprint,
        "chips": {split: int((data.manifest.split == split).sum()) for split in SPLITS},
        "best_epoch": progress.best_epoch[progress.best],
        "epochs_trained": len(history),
        "failure": progress.failures[progress.best],
        "test": {name: evaluate(targets, p).round(6).to_dict("index") for name, p in rows.items()},
        "confusion_matrix": confusion_matrix(
            targets, probabilities.argmax(dim=1), labels=range(len(data.classes))
        ).tolist(),
        "environment": environment(),
    }
    predictions = test[["img_path", "group", "label", "target"]].assign(
        predicted=probabilities.argmax(dim=1).numpy(),
        **{f"p_{name}": probabilities[:, i].numpy() for i, name in enumerate(data.classes)},
    )
    predictions = predictions.reset_index(drop=True)
    return Run(classifier, adapter, history, candidates, predictions, record)


def save_run(config: RunConfig, run: Run) -> list[Path]:
    """Write the classifier, history, sweep, predictions and record; return the files.

    The record gains `bytes_to_keep`: what one more task needs on disk beside the shared backbone,
    which is the adapter folder, the head's numbers, or a full copy.
    """
    files = [save_classifier(run.classifier, config.folder / "model_final.safetensors", run.record)]
    if run.adapter:
        files.append(save_adapter(run.adapter, config.folder / "adapter", run.record))
        kept = sum(file.stat().st_size for file in files[-1].iterdir())
    elif config.method == "full":
        kept = files[-1].stat().st_size
    else:
        kept = sum(p.nbytes for p in run.classifier.linear_head.parameters())
    run.record["bytes_to_keep"] = kept
    for name, suffix in _TABLES.items():
        files.append(_record_file(config, f"{suffix}.csv"))
        with written_whole(files[-1]) as part:
            # Nine digits hold a 32-bit number exactly: a run that is read is the run that was.
            getattr(run, name).to_csv(part, index=False, float_format="%.9g")
    files.append(_record_file(config, ".json"))
    write_json(files[-1], run.record)
    return files


def read_run(config: RunConfig) -> Run | None:
    """A run that `save_run` wrote, or None where none has these parameters.

    Classifier and adapter are None where the files of the weights are not there: records are
    published more often than weights.

    Raises:
        InputError: a file of the weights is damaged, or a table of the record is missing.
    """
    record_file = _record_file(config, ".json")
    if not record_file.is_file():
        return None
    record = json.loads(record_file.read_text())
    parameters = config.model_dump(mode="json", exclude=WITHOUT_EFFECT)
    if any(record["config"].get(name) != value for name, value in parameters.items()):
        return None
    try:
        tables = {
            name: pd.read_csv(
                _record_file(config, f"{suffix}.csv"),
                dtype=dict.fromkeys(("img_path", "group", "label"), str),
                keep_default_na=name != "predictions",
            )
            for name, suffix in _TABLES.items()
        }
    except FileNotFoundError as error:
        raise InputError(
            f"{error.filename} is missing beside {record_file}; run it again"
        ) from error
    weights, adapter = config.folder / "model_final.safetensors", config.folder / "adapter"
    return Run(
        classifier=load_classifier(weights)[0] if weights.is_file() else None,
        adapter=load_adapter(adapter)[0] if adapter.is_dir() else None,
        record=record,
        **tables,
    )


def _record_file(config: RunConfig, ending: str) -> Path:
    return Path(config.history_path) / f"{config.name}{ending}"


def confident_errors(predictions: pd.DataFrame, count: int) -> pd.DataFrame:
    """The wrong test predictions with the highest probability, `confidence`, highest first."""
    probabilities = predictions.filter(like="p_")
    wrong = predictions.assign(
        confidence=probabilities.max(axis=1),
        predicted_label=[
            probabilities.columns[i].removeprefix("p_") for i in predictions.predicted
        ],
    ).query("predicted != target")
    return wrong.nlargest(count, "confidence")


def metric_rows(record: dict, metrics: tuple[str, ...] = METRICS) -> pd.DataFrame:
    """Test metrics of a run and its baselines: `model`, `metric`, `value`, `low`, `high`."""
    return pd.DataFrame(
        {"model": name, "metric": metric, **values[metric]}
        for name, values in record["test"].items()
        for metric in metrics
    )


def test_table(record: dict) -> pd.DataFrame:
    """Test metrics of a run and its baselines as text, `value [low, high]`, one row a model."""
    return pd.DataFrame(
        {
            name: {m: with_interval(values[m]) for m in METRICS}
            for name, values in record["test"].items()
        }
    ).T
