"""From data and a backbone to a trained classifier, its history and its test metrics.

`python -m helpers.finetune --data_path ./data/ --output_path ./models/` does it from the shell.
"""

import copy
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from peft import PeftModel
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn

from helpers import InputError
from helpers.console import run_command
from helpers.features import (
    DIHEDRAL_VIEWS,
    Features,
    cached_features,
    colour_statistics,
    decoded,
    extract_features,
    logistic_probe,
)
from helpers.fit import (
    Checkpoint,
    ChipExamples,
    FeatureExamples,
    FitSettings,
    Progress,
    fit,
    predict,
)
from helpers.load_data import SPLITS, ChipData, DataConfig, band_statistics
from helpers.metrics import METRICS, evaluate, majority_probabilities
from helpers.model import (
    HEAD_INPUTS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    METHODS,
    AdapterSettings,
    Classifier,
    ClassifierConfig,
    adapter_parameters,
    add_adapter,
    backbone_label,
    count_parameters,
    create_classifier,
    head_columns,
    merge_adapter,
    save_adapter,
    save_classifier,
    transfer_adapter,
    weights_digest,
)
from helpers.records import environment, write_json, written_whole


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
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), min_length=1, description="to sweep, of AdamW"
    )
    weight_decays: tuple[NonNegativeFloat, ...] = Field(
        (0.0, 0.1), min_length=1, description="to sweep, of AdamW"
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
        "auto", description="of lora, dora, full; auto: bf16 where the hardware has it"
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
        has_bf16 = torch.cuda.is_bf16_supported() if on_gpu else _cpu_has_bf16()
        if self.precision == "auto":
            return "bf16" if has_bf16 else "no"
        if self.precision == "fp16" and not on_gpu:
            raise InputError("precision: fp16 needs a GPU; use bf16, fp32 or auto")
        if self.precision == "bf16" and not has_bf16:
            raise InputError(f"precision: this {self.torch_device} has no bf16; use fp32 or auto")
        return "no" if self.precision == "fp32" else self.precision

    def data(self) -> ChipData:
        """Load and check the chips, and keep `train_fraction` of the training split.

        A smaller fraction is a subset of a larger one with the same seed. Raises as `load_data`.
        """
        data = super().data()
        rows = data.manifest[data.manifest.split == "train"].sample(frac=1, random_state=self.seed)
        rank = rows.groupby("target").cumcount()
        size = rows.groupby("target").target.transform("size")
        dropped = rows.index[rank >= (self.train_fraction * size).round().clip(lower=1)]
        return replace(data, manifest=data.manifest.drop(index=dropped).reset_index(drop=True))


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AVX-512 BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


class NotebookConfig(RunConfig):
    """Parameters of the training notebooks."""

    figures_path: str = Field("figures", description="folder for plots and their tables")


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Args:
        classifier: holds the weights of the best epoch, an adapter merged into them.
        adapter: the same unmerged, for lora and dora.
        history: one row per epoch of the chosen candidate (`fit.HISTORY_COLUMNS`).
        candidates: one row per candidate of the sweep.
        predictions: one row per test chip: img_path, label, target, predicted and the
            probability of each class, `p_<class>`.
        record: what the run's JSON holds.
    """

    classifier: Classifier
    adapter: PeftModel | None
    history: pd.DataFrame
    candidates: pd.DataFrame
    predictions: pd.DataFrame
    record: dict


# --- Head only -----------------------------------------------------------------------------------


class HeadSweep(nn.Module):
    """Linear heads side by side on one feature matrix: every combination of a sweep."""

    def __init__(self, candidates: pd.DataFrame, width: int, classes: int):
        """One head per row of candidates (head_input, sorted by it), width of the backbone."""
        super().__init__()
        self.inputs = candidates.head_input.tolist()
        self.heads = nn.ModuleList(
            nn.Linear(width * HEAD_INPUTS[name], classes) for name in self.inputs
        )
        # From zero, so that a head starts alike alone and in any sweep; its loss is convex.
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, 5 * width) -> logits (heads, N, classes)."""
        logits = []
        # Heads with the same input share one matrix product.
        for name, group in itertools.groupby(
            zip(self.inputs, self.heads, strict=True), lambda p: p[0]
        ):
            heads = [head for _, head in group]
            weight = torch.cat([head.weight for head in heads])
            bias = torch.cat([head.bias for head in heads])
            product = nn.functional.linear(head_columns(features, name), weight, bias)
            logits.append(product.unflatten(1, (len(heads), -1)).transpose(0, 1))
        return torch.cat(logits)


def new_classifier(config: RunConfig, data: ChipData) -> Classifier:
    """Build the classifier for a data set, before training.

    8-bit chips of three bands are normalised with ImageNet's statistics, as DINOv2 was trained;
    any others with those of the training split.
    """
    if len(data.bands) == 3 and set(data.manifest.dtype) == {"uint8"}:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    else:
        mean, std = (tuple(map(float, s)) for s in band_statistics(data, config.image_size))
    torch.manual_seed(config.seed)
    return create_classifier(
        ClassifierConfig(
            backbone=config.backbone,
            weights=config.weights,
            image_size=config.image_size,
            bands=data.bands,
            classes=data.classes,
            head_input=config.head_inputs[0] if config.method == "head_only" else config.head_input,
            mean=mean,
            std=std,
        )
    )


def split_features(
    config: RunConfig, data: ChipData, classifier: Classifier, split: str
) -> Features:
    """Frozen features of a split, from the cache where they are there already."""
    augmented = config.augment and split == "train"
    return cached_features(
        classifier,
        data,
        split,
        cache_path=config.cache_path,
        device=config.torch_device,
        views=DIHEDRAL_VIEWS if augmented else 1,
    )


def sweep(config: RunConfig) -> pd.DataFrame:
    """All candidates of a head-only run: head_input, learning_rate, weight_decay."""
    rows = itertools.product(config.head_inputs, config.learning_rates, config.weight_decays)
    return pd.DataFrame(rows, columns=["head_input", "learning_rate", "weight_decay"])


def fit_heads(
    config: RunConfig, train: Features, valid: Features, classes: int, report=print
) -> tuple[HeadSweep, Progress]:
    """Train every head of the sweep on cached features in one go."""
    candidates = sweep(config)
    heads = HeadSweep(candidates, train.values.shape[-1] // 5, classes)
    heads.to(config.torch_device)
    groups = [
        {
            "params": list(head.parameters()),
            "lr": row.learning_rate,
            "weight_decay": row.weight_decay,
        }
        for head, row in zip(heads.heads, candidates.itertuples(), strict=True)
    ]
    with _one_thread():
        progress = fit(
            heads,
            groups,
            FeatureExamples(train.values, train.targets),
            FeatureExamples(valid.values, valid.targets),
            _settings(config, train.targets),
            accelerator=new_accelerator(config),
            report=report,
        )
    return heads, progress


def _settings(config: RunConfig, targets: Tensor) -> FitSettings:
    weights = None
    if config.class_weights == "balanced":
        counts = targets.bincount()
        weights = tuple((len(targets) / (len(counts) * counts)).tolist())
    return FitSettings(
        config.epochs,
        config.patience,
        config.batch_size,
        max_grad_norm=None if config.method == "head_only" else config.max_grad_norm,
        class_weights=weights,
        seed=config.seed,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Heads are too small to share: threads would spend more time waiting than computing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_head_only(config: RunConfig, data: ChipData, classifier: Classifier, report=print) -> Run:
    """Train the sweep's heads on frozen features, keep the best, test it once.

    Raises:
        InputError: no head trained to a finite loss, or device not there.
    """
    train = split_features(config, data, classifier, "train")
    valid = split_features(config, data, classifier, "valid")
    report(
        f"features of {len(train.targets) + len(valid.targets)} chips: "
        + ("read from the cache" if train.from_cache and valid.from_cache else "computed")
    )
    heads, progress = fit_heads(config, train, valid, len(data.classes), report)
    candidates = sweep(config).assign(
        best_epoch=progress.best_epoch,
        valid_loss=progress.best_loss,
        valid_auroc=[
            history[epoch - 1]["valid_auroc"] if epoch else np.nan
            for history, epoch in zip(progress.histories, progress.best_epoch, strict=True)
        ],
        failure=progress.failures,
    )
    best = classifier.with_head(heads.inputs[progress.best], heads.heads[progress.best])
    test = split_features(config, data, best, "test")
    with torch.inference_mode():
        inputs = head_columns(test.values[0], best.config.head_input).to(best.mean.device)
        probabilities = best.linear_head(inputs).softmax(dim=1).cpu()
    parameters = count_parameters(best) | {"trainable": count_parameters(best.linear_head)["total"]}
    run = finished_run(config, data, best, None, progress, candidates, parameters, probabilities)
    chips = len(train.targets) + len(valid.targets)
    run.record["features_per_second"] = chips / (train.seconds + valid.seconds)
    return run


# --- LoRA, DoRA and full fine-tuning --------------------------------------------------------------


def train_adapted(config: RunConfig, data: ChipData, report=print) -> Run:
    """Train an adapter, or all weights, on the chips; test the merged fp32 classifier once.

    Raises:
        InputError: a parameter of the method is wrong, the device lacks the precision, the
            checkpoint to resume from is of another run, or no epoch had a finite loss.
    """
    accelerator = new_accelerator(config)
    model, group, train = training_setup(config, data)
    torch.manual_seed(config.seed + accelerator.process_index)  # dropout
    progress = fit(
        model,
        [group],
        train,
        _chips(config, data, "valid"),
        _settings(config, train.targets),
        accelerator=accelerator,
        checkpoint=Checkpoint(
            config.folder / "checkpoint.pt", _identity(config, data, model), config.resume
        ),
        report=report,
    )
    adapter, classifier = None, model
    if config.method != "full":
        adapter = transfer_adapter(model.cpu(), new_classifier(config, data))
        classifier = merge_adapter(copy.deepcopy(adapter))
    test = predict(
        classifier.to(accelerator.device).float(), _chips(config, data, "test"), 64, accelerator
    )
    candidates = pd.DataFrame(
        {
            "head_input": [config.head_input],
            "learning_rate": [config.learning_rate],
            "weight_decay": [config.weight_decay],
            "best_epoch": progress.best_epoch,
            "valid_loss": progress.best_loss,
        }
    )
    parameters = _parameters(config, model, classifier)
    return finished_run(
        config, data, classifier.cpu(), adapter, progress, candidates, parameters, test[0]
    )


def new_accelerator(config: RunConfig) -> Accelerator:
    """Device, precision and processes of a run; heads are trained in fp32."""
    precision = "no" if config.method == "head_only" else config.mixed_precision
    # Accelerate keeps the first precision of a process; a notebook trains in several.
    AcceleratorState._reset_state()
    return Accelerator(cpu=config.torch_device == "cpu", mixed_precision=precision)


def training_setup(
    config: RunConfig, data: ChipData
) -> tuple[Classifier | PeftModel, dict, ChipExamples]:
    """A fresh model for lora, dora or full, its AdamW parameter group, and the training chips."""
    model = _trainable_model(config, data)
    if config.method != "full" and config.mixed_precision == "bf16":
        # Frozen weights in the precision they are used in: no cast in every step, half the bytes.
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    group = {
        "params": [p for p in model.parameters() if p.requires_grad],
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
    }
    return model, group, _chips(config, data, "train")


def _trainable_model(config: RunConfig, data: ChipData) -> Classifier | PeftModel:
    """A fresh classifier, ready for the method; reproducible from the seed."""
    classifier = new_classifier(config, data)
    if config.method == "full":
        return classifier
    return add_adapter(
        classifier,
        AdapterSettings(
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=config.lora_targets,
            dora=config.method == "dora",
        ),
    )


def _chips(config: RunConfig, data: ChipData, split: str) -> ChipExamples:
    """The chips of a split, each decoded once."""
    dataset = data.dataset(split, config.image_size)
    chips = decoded(
        dataset,
        config.memory_limit_gb * 1e9,
        Path(config.cache_path) / f"chips_{data.fingerprint}_{config.image_size}_{split}.bin",
    )
    views = DIHEDRAL_VIEWS if config.augment and split == "train" else 1
    return ChipExamples(chips, dataset.targets, views)


def _identity(config: RunConfig, data: ChipData, model: Classifier | PeftModel) -> dict:
    """What must be equal for a run to go on from a checkpoint: all that decides its numbers."""
    places = {"resume", "cache_path", "output_path", "history_path", "figures_path"}
    return config.model_dump(mode="json", exclude=places | {"data_path", "memory_limit_gb"}) | {
        "data_fingerprint": data.fingerprint,
        "weights_digest": weights_digest(model),
    }


def _parameters(config: RunConfig, model, classifier: Classifier) -> dict[str, int]:
    """Parameter counts of a run: `total` at inference, `trainable`, and the adapter's parts."""
    total = count_parameters(classifier)["total"]
    if config.method == "full":
        return {"total": total, "trainable": total}
    parts = adapter_parameters(model)
    return {"total": total, "trainable": sum(parts.values())} | parts


def train(config: RunConfig, data: ChipData, report=print) -> Run:
    """Train by `config.method`; raises as `train_head_only` and `train_adapted`."""
    if config.method == "head_only":
        return train_head_only(config, data, new_classifier(config, data), report)
    return train_adapted(config, data, report)


def caching_benefit(config: RunConfig, data: ChipData, classifier: Classifier) -> pd.DataFrame:
    """Measure what caching buys: one pass of the frozen backbone against epochs of one head.

    Measured without reading the cache; only `uncached` is computed from the other two.

    Returns:
        One column, `seconds`; rows `forward` (decoding and forward pass over the training and
        validation images), `heads` (config.epochs epochs of one head on those features), `cached`
        (both together) and `uncached` (a forward pass in every epoch).
    """
    train, valid = (
        extract_features(
            classifier, data.dataset(split, config.image_size), device=config.torch_device
        )
        for split in ("train", "valid")
    )
    one_head = config.model_copy(
        update={
            "head_inputs": config.head_inputs[:1],
            "learning_rates": config.learning_rates[:1],
            "weight_decays": config.weight_decays[:1],
            "patience": config.epochs,
        }
    )
    start = time.perf_counter()
    fit_heads(one_head, train, valid, len(data.classes), report=lambda line: None)
    heads = time.perf_counter() - start
    forward = train.seconds + valid.seconds
    seconds = {
        "forward": forward,
        "heads": heads,
        "cached": forward + heads,
        "uncached": config.epochs * forward + heads,
    }
    return pd.DataFrame({"seconds": seconds})


# --- Results -------------------------------------------------------------------------------------


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
    predictions = test[["img_path", "label", "target"]].assign(
        predicted=probabilities.argmax(dim=1).numpy(),
        **{f"p_{name}": probabilities[:, i].numpy() for i, name in enumerate(data.classes)},
    )
    predictions = predictions.reset_index(drop=True)
    return Run(classifier, adapter, history, candidates, predictions, record)


def save_run(config: RunConfig, run: Run) -> list[Path]:
    """Write the classifier, history, sweep, predictions and record; return the files."""
    history_path = Path(config.history_path)
    tables = {"": run.history, "_candidates": run.candidates, "_predictions": run.predictions}
    files = [save_classifier(run.classifier, config.folder / "model_final.safetensors", run.record)]
    if run.adapter:
        files.append(save_adapter(run.adapter, config.folder / "adapter"))
    for suffix, table in tables.items():
        files.append(history_path / f"{config.name}{suffix}.csv")
        with written_whole(files[-1]) as part:
            table.to_csv(part, index=False, float_format="%.6g")
    files.append(history_path / f"{config.name}.json")
    write_json(files[-1], run.record)
    return files


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
            name: {m: _with_interval(values[m]) for m in METRICS}
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
        f"**{_with_interval(own['accuracy'])}** and an AUROC of "
        f"**{_with_interval(own['auroc'])}**. Always answering with the larger class reaches an "
        f"accuracy of {majority['accuracy']['value']:.3f}; a logistic regression on colour "
        f"statistics an accuracy of {_with_interval(colour['accuracy'])} and an AUROC of "
        f"{_with_interval(colour['auroc'])}. The frozen features are {verdict}."
    )


def _with_interval(entry: dict) -> str:
    return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**entry)


def main() -> None:
    """Train from the shell and print the test table."""
    config = RunConfig.from_arguments(main.__doc__)
    run = train(config, config.data())
    if not PartialState().is_main_process:
        return
    files = save_run(config, run)
    print(f"\nTest split, {len(run.predictions)} chips, 95 % bootstrap intervals\n")
    print(test_table(run.record).T.to_string())
    print("\nwrote " + ", ".join(map(str, files)))


if __name__ == "__main__":
    run_command(main)
