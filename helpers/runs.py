"""A training run: its parameters, what it leaves behind, and tables made from that alone."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from sklearn.metrics import confusion_matrix
from torch import Tensor

from helpers import InputError
from helpers.adapters import METHODS, load_adapter, save_adapter
from helpers.features import colour_statistics, logistic_probe
from helpers.fit import Progress
from helpers.load_data import SPLITS, ChipData, DataConfig
from helpers.metrics import METRICS, evaluate, majority_probabilities
from helpers.model import (
    HEAD_INPUTS,
    Classifier,
    backbone_label,
    load_classifier,
    save_classifier,
)
from helpers.records import environment, write_json, written_whole

# The tables of a run, and how the names of their files end.
_TABLES = {"history": "", "candidates": "_candidates", "predictions": "_predictions"}
# Parameters that do not change what a run computes.
WITHOUT_EFFECT = {
    "resume",
    "data_path",
    "cache_path",
    "output_path",
    "history_path",
    "memory_limit_gb",
}


class RunConfig(DataConfig):
    """Everything that decides a training run."""

    backbone: str = Field("example", description="example, dinov2_vit{s,b,l,g}14, each with _reg")
    weights: str = Field("pretrained", description="pretrained, random, or a file of weights")
    image_size: PositiveInt = Field(98, description="pixels, a multiple of 14")
    method: Literal[METHODS] = Field("head_only", description=", ".join(METHODS))
    head_inputs: tuple[Literal[tuple(HEAD_INPUTS)], ...] = Field(
        tuple(HEAD_INPUTS), min_length=1, description=f"to sweep, from {', '.join(HEAD_INPUTS)}"
    )
    learning_rates: tuple[PositiveFloat, ...] = Field(
        (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), min_length=1, description="to sweep, of AdamW"
    )
    weight_decays: tuple[NonNegativeFloat, ...] = Field(
        (0.0, 1.0), min_length=1, description="to sweep, of AdamW"
    )
    head_input: Literal[tuple(HEAD_INPUTS)] = Field(
        "cls+mean", description=f"of lora, dora, full: one of {', '.join(HEAD_INPUTS)}"
    )
    learning_rate: float = Field(1e-3, gt=0, description="of lora, dora, full (AdamW)")
    weight_decay: float = Field(0.0, ge=0, description="of lora, dora, full (AdamW)")
    lora_rank: int = Field(4, description="r, width of the low-rank update")
    lora_alpha: float = Field(8, gt=0, description="the update is scaled by alpha / r")
    lora_dropout: float = Field(0.1, ge=0, lt=1, description="on the input of the update")
    lora_targets: tuple[str, ...] = Field(
        ("qkv",), description="adapted layers of every block: qkv, proj, fc1, fc2"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="of lora, dora, full; auto: bf16 where it is faster (GPU, AMX), else fp32",
    )
    max_grad_norm: float = Field(1.0, gt=0, description="of lora, dora, full: gradient clipping")
    class_weights: Literal["equal", "balanced"] = Field(
        "equal", description="balanced: classes count alike in the loss, however rare"
    )
    train_fraction: float = Field(
        1.0, gt=0, le=1, description="share of the training chips of each class to use"
    )
    memory_limit_gb: float = Field(
        4.0, ge=0, description="decoded chips above this many GB are memory-mapped from a file"
    )
    resume: bool = Field(False, description="go on from the run's last checkpoint")
    epochs: PositiveInt = Field(100, description="at most, passes over the training images")
    patience: PositiveInt = Field(
        20, description="epochs without a lower validation loss before training stops"
    )
    batch_size: PositiveInt = Field(128, description="images per optimizer step")
    augment: bool = Field(False, description="train on the eight flips and rotations")
    seed: int = Field(0, ge=0, description="of initial weights and the order of images")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")
    output_path: str = Field("models", description="folder for classifiers")
    history_path: str = Field("training_history", description="folder for histories and results")
    cache_path: str = Field("cache", description="folder for frozen features")
    run_name: str | None = Field(None, description="name of the run's files; made up by default")

    @property
    def name(self) -> str:
        """Name of the run's files."""
        data = Path(self.data_path).stem
        return self.run_name or f"{self.method}_{data}_{self.backbone}_seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Where the run's classifier, adapter and checkpoint go."""
        return Path(self.output_path) / self.name

    @property
    def label(self) -> str:
        """Backbone and weights as tables and figures must name them."""
        return backbone_label(self.backbone, self.weights)

    @property
    def title(self) -> str:
        """Backbone, weights and data, for the titles of figures."""
        return f"{self.label} on {Path(self.data_path).stem}"

    @property
    def torch_device(self) -> str:
        """`cpu` or `cuda`.

        Raises:
            InputError: cuda was asked for and there is none.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("device: cuda was asked for and no GPU is visible; use cpu or auto")
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device

    @property
    def mixed_precision(self) -> str:
        """Accelerate's word for the precision: no, bf16 or fp16.

        Raises:
            InputError: the device cannot compute in the precision asked for.
        """
        on_gpu = self.torch_device == "cuda"
        cpu = torch.cpu.get_capabilities()
        amx = cpu.get("amx_bf16", False)
        has_bf16 = torch.cuda.is_bf16_supported() if on_gpu else amx or cpu.get("avx512_bf16")
        if self.precision == "auto":
            # AVX-512 BF16 alone made training slower than fp32 (0.6 times, ViT-Ti at 98 px).
            return "bf16" if has_bf16 and (on_gpu or amx) else "no"
        if self.precision == "fp16" and not on_gpu:
            raise InputError("precision: fp16 needs a GPU; use bf16, fp32 or auto")
        if self.precision == "bf16" and not has_bf16:
            raise InputError(f"precision: this {self.torch_device} has no bf16; use fp32 or auto")
        return "no" if self.precision == "fp32" else self.precision

    def data(self) -> ChipData:
        """Load and check the chips, and keep `train_fraction` of the training split.

        A smaller fraction is a subset of a larger one with the same seed. Raises as `load_data`.
        """
        return self.share(super().data())

    def share(self, data: ChipData) -> ChipData:
        """The same chips with `train_fraction` of the training chips of each class."""
        rows = data.manifest[data.manifest.split == "train"].sample(frac=1, random_state=self.seed)
        rank = rows.groupby("target").cumcount()
        size = rows.groupby("target").target.transform("size")
        dropped = rows.index[rank >= (self.train_fraction * size).round().clip(lower=1)]
        return replace(data, manifest=data.manifest.drop(index=dropped).reset_index(drop=True))


class NotebookConfig(RunConfig):
    """Parameters of the training notebooks."""

    figures_path: str = Field("figures", description="folder for plots and their tables")
    show_chips: bool = Field(
        True, description="draw the chips themselves; False where they may not be published"
    )


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Args:
        classifier: holds the weights of the best epoch, an adapter merged into them; None for a
            run read from its records alone.
        adapter: the same unmerged, for lora and dora.
        history: one row per epoch of the chosen candidate (`fit.HISTORY_COLUMNS`).
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


def baselines(data: ChipData, image_size: int) -> dict[str, np.ndarray]:
    """Test probabilities (M, classes) of what a model must beat, by name."""
    train, test = (data.dataset(split, image_size) for split in ("train", "test"))
    targets = train.targets.numpy()
    return {
        "majority class": majority_probabilities(targets, len(test), len(data.classes)),
        "colour statistics": logistic_probe(
            colour_statistics(train), targets, colour_statistics(test)
        ),
    }


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
    rows = baselines(data, config.image_size) | {config.label: probabilities.numpy()}
    history = progress.history(progress.best)
    record = {
        "run": config.name,
        "backbone": config.label,
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
        files.append(save_adapter(run.adapter, config.folder / "adapter"))
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
        adapter=load_adapter(adapter) if adapter.is_dir() else None,
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


def conclusion(record: dict) -> str:
    """What a head-only run's test metrics say, as a Markdown paragraph."""
    (_, majority), (_, colour), (name, own) = record["test"].items()
    ahead = own["auroc"]["low"] > colour["auroc"]["high"]
    behind = own["auroc"]["high"] < colour["auroc"]["low"]
    verdict = (
        "clearly better than colour statistics (the intervals do not touch)"
        if ahead
        else "worse than colour statistics: these features do not suit the task"
        if behind
        else "not clearly apart from colour statistics (the intervals overlap): on this task "
        "much of the answer lies in colour, so it shows little of what a backbone is worth"
    )
    return (
        f"On `{record['data']}` ({record['chips']['train']} training and "
        f"{record['chips']['test']} test chips) a linear head of "
        f"{record['parameters']['trainable']:,} weights on {name} reaches an accuracy of "
        f"**{with_interval(own['accuracy'])}** and an AUROC of "
        f"**{with_interval(own['auroc'])}**. Always answering with the larger class reaches an "
        f"accuracy of {majority['accuracy']['value']:.3f}; a logistic regression on colour "
        f"statistics an accuracy of {with_interval(colour['accuracy'])} and an AUROC of "
        f"{with_interval(colour['auroc'])}. The frozen features are {verdict}."
    )


def with_interval(entry: Mapping[str, float] | pd.Series) -> str:
    """`value [low, high]` of an entry with these names, as tables and sentences show it."""
    return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**entry)
