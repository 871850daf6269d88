"""The parameters of a training run."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from helpers import InputError
from helpers.config import Config, Places, folder_field
from helpers.data.dataset import ChipData, DataConfig
from helpers.models.adapters import METHODS, PEFT_METHODS, first_adapted
from helpers.models.architectures import BACKBONE_HELP, backbone_label
from helpers.models.backbones import build_backbone
from helpers.models.classifier import HEAD_INPUTS, torch_device
from helpers.records import check_plain_name
from helpers.training.precision import LoraStep, fastest, step_seconds

_ADAPTED = {"epochs": 12, "patience": 4, "batch_size": 32, "learning_rate": 1e-3}
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    # Epochs on cached features cost next to nothing; the learning rate is swept.
    "head_only": {"epochs": 100, "patience": 20, "batch_size": 128},
    **dict.fromkeys(PEFT_METHODS, _ADAPTED),
    "full": _ADAPTED | {"learning_rate": 1e-4},
}
"""What a method decides where a parameter is None; sources in the README's table of defaults."""

# Parameters that do not change what a run computes, or say where its data lie.
WITHOUT_EFFECT = {
    "data_path",
    "output_path",
    "history_path",
    "cache_path",
    "figures_path",
    "show_chips",
    "prevalence",
    "memory_limit_gb",
    "resume",
    "overwrite",
    "save_merged",
    "tracker",
}
_by_method = "; None: the method decides"


class TrainingConfig(Places, DataConfig):
    """What every run of a comparison shares."""

    backbone: str = Field("example", description=BACKBONE_HELP)
    weights: str = Field("pretrained", description="pretrained, random, or a file of weights")
    image_size: int = Field(98, gt=0, le=4096, description="pixels, a multiple of the patch size")
    head_input: Literal[tuple(HEAD_INPUTS)] = Field(
        "cls+mean", description=f"of all but head_only: one of {', '.join(HEAD_INPUTS)}"
    )
    learning_rates: tuple[PositiveFloat, ...] = Field(
        (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), min_length=1, description="of head_only, to sweep (AdamW)"
    )
    weight_decays: tuple[NonNegativeFloat, ...] = Field(
        (0.0, 1.0), min_length=1, description="of head_only, to sweep (AdamW)"
    )
    learning_rate: PositiveFloat | None = Field(
        None, description=f"of all but head_only (AdamW){_by_method}"
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="of all but head_only (AdamW)")
    lora_rank: int = Field(4, le=4096, description="r, width of the low-rank update")
    lora_alpha: float = Field(8, gt=0, description="the update is scaled by alpha / r")
    lora_dropout: float = Field(0.1, ge=0, lt=1, description="on the input of the update")
    lora_targets: tuple[str, ...] = Field(
        ("qkv",), description="adapted layers of every block: qkv, proj, fc1, fc2"
    )
    adapted_blocks: PositiveInt | None = Field(
        None,
        description="of all but head_only: train the last k blocks, on kept tokens of the others; "
        "by default all, in finetune_lora.ipynb the last 6",
    )
    epochs: PositiveInt | None = Field(
        None, le=10**6, description=f"at most, passes over the training images{_by_method}"
    )
    patience: PositiveInt | None = Field(
        None, description=f"epochs without a lower validation loss before it stops{_by_method}"
    )
    batch_size: PositiveInt | None = Field(
        None, le=2**20, description=f"images per optimizer step{_by_method}"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="of all but head_only; auto: the fastest of a few timed steps",
    )
    max_grad_norm: float = Field(1.0, gt=0, description="of all but head_only: gradient clipping")
    class_weights: Literal["equal", "balanced"] = Field(
        "equal", description="balanced: classes count alike in the loss, however rare"
    )
    augment: bool = Field(False, description="train on the eight flips and rotations")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")
    memory_limit_gb: float = Field(
        4.0, ge=0, description="chips or features above this many GB are memory-mapped from a file"
    )
    resume: bool = Field(False, description="read finished runs, go on from checkpoints")
    overwrite: bool = Field(
        False, description="replace a finished run of the same name with other parameters or data"
    )
    save_merged: bool | None = Field(
        None, description="of an adapter: also one merged file; None: where it is below 500 MB"
    )
    tracker: Literal["none", "tensorboard", "mlflow", "wandb"] = Field(
        "none", description="also send every epoch to tensorboard, mlflow or wandb"
    )
    history_path: str | None = folder_field("history_path", "histories and records")
    cache_path: str | None = folder_field("cache_path", "frozen features and decoded chips")

    @property
    def data_name(self) -> str:
        """Name of the data set in file names and titles."""
        path = Path(self.data_path)
        return path.stem if path.suffix.lower() == ".csv" else path.name

    @property
    def label(self) -> str:
        """Backbone and weights as tables and figures must name them."""
        return backbone_label(self.backbone, self.weights)

    @property
    def title(self) -> str:
        """Backbone, weights and data, for the titles of figures."""
        return f"{self.label} on {self.data_name}"

    @property
    def torch_device(self) -> str:
        """`classifier.torch_device`."""
        return torch_device(self.device)


class RunConfig(TrainingConfig):
    """Everything that decides a training run."""

    method: Literal[METHODS] = Field("head_only", description=", ".join(METHODS))
    head_inputs: tuple[Literal[tuple(HEAD_INPUTS)], ...] = Field(
        tuple(HEAD_INPUTS), min_length=1, description=f"of head_only: from {', '.join(HEAD_INPUTS)}"
    )
    train_fraction: float = Field(
        1.0, gt=0, le=1, description="share of the training chips of each class to use"
    )
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="of full: each layer's rate in units of the next one's"
    )
    patch_drop_rate: float | None = Field(
        None, gt=0, lt=1, description="of all but head_only: share of patches to train without"
    )
    stem: Literal["trained", "new"] | None = Field(
        None,
        description="of all but head_only, for other bands than RGB: trained beside the adapter, "
        "from the pretrained patch embedding or a new one; None: frozen (full trains it anyway)",
    )
    seed: int = Field(0, ge=0, description="of initial weights and the order of images")
    run_name: str | None = Field(None, description="name of the run's files; made up by default")

    @model_validator(mode="before")
    @classmethod
    def _the_method_decides(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Fill in `METHOD_DEFAULTS` where a parameter is None."""
        method = values.get("method", cls.model_fields["method"].default)
        defaults = METHOD_DEFAULTS.get(method, {}) if isinstance(method, str) else {}
        return values | {n: v for n, v in defaults.items() if values.get(n) is None}

    @property
    def name(self) -> str:
        """Name of the run's files."""
        return self.run_name or (
            f"{self.method}_{self.data_name}_{self.backbone}_seed{self.seed}".replace(":", "-")
        )

    @property
    def folder(self) -> Path:
        """Where the run's classifier, adapter, predictions and checkpoint go."""
        return Path(self.output_path) / self.name

    @property
    def mixed_precision(self) -> str:
        """Accelerate's word for the precision: no, bf16 or fp16.

        Raises:
            InputError: the device cannot compute in the precision asked for.
        """
        if self.method == "head_only":
            return "no"
        precision, available = self.precision, self._precisions()
        if precision == "auto":
            seconds = self.precision_seconds()
            precision = fastest(seconds) if seconds else "fp32"
        if precision == "fp16" and precision not in available:
            raise InputError("precision: fp16 needs a GPU; use bf16, fp32 or auto")
        if precision not in available:
            raise InputError(f"precision: this {self.torch_device} has no bf16; use fp32 or auto")
        return "no" if precision == "fp32" else precision

    def _precisions(self) -> list[str]:
        """What the device computes in without emulating it, fp32 first."""
        cpu = torch.cpu.get_capabilities()
        if self.torch_device == "cuda":
            return ["fp32", *["bf16"] * torch.cuda.is_bf16_supported(), "fp16"]
        return ["fp32", *["bf16"] * bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16"))]

    def precision_seconds(self) -> dict[str, float]:
        """Seconds of a training step in each precision here; empty where there is but one."""
        timed = LoraStep(
            self.backbone,
            self.image_size,
            len(self.bands or (0, 1, 2)),
            self.lora_targets,
            self.batch_size,
            self.torch_device,
        )
        return step_seconds(timed, self._precisions(), self.cache_path)

    @property
    def features_precision(self) -> str:
        """What the frozen backbone of head_only computes in: bf16 on a GPU unless fp32 is asked."""
        has_bf16 = self.torch_device == "cuda" and torch.cuda.is_bf16_supported()
        return "bf16" if has_bf16 and self.precision in ("auto", "bf16") else "fp32"

    def resolved(self) -> "RunConfig":
        """The same run with every `auto` replaced by what it means on this machine.

        Raises:
            InputError: a device, precision, name or number of blocks that cannot be used.
        """
        check_plain_name("run_name", self.name)
        if self.tracker != "none" and find_spec(self.tracker) is None:
            raise InputError(
                f"tracker: {self.tracker} is not installed; pip install {self.tracker}, or use none"
            )
        if self.stem and self.method == "head_only":
            raise InputError(
                "stem: head_only trains no stem; use lora, dora or full, or leave it out"
            )
        self._check_adapted_blocks()
        precision = self.mixed_precision.replace("no", "fp32")
        if self.method == "head_only":
            precision = self.features_precision
        return self.model_copy(update={"device": self.torch_device, "precision": precision})

    def _check_adapted_blocks(self) -> None:
        if self.adapted_blocks is None:
            return
        if self.method == "head_only":
            raise InputError(
                "adapted_blocks: head_only trains no block; use lora, dora or full, or leave it out"
            )
        if self.patch_drop_rate:
            raise InputError(
                "patch_drop_rate: tokens of frozen blocks are kept of all patches; leave it or "
                "adapted_blocks out"
            )
        if self.stem:
            raise InputError(
                "stem: tokens of frozen blocks are kept as a frozen stem made them; leave it or "
                "adapted_blocks out"
            )
        with torch.device("meta"):
            depth = len(build_backbone(self.backbone).blocks)
        first_adapted(self.adapted_blocks, depth)
        if self.head_input == "4xcls+mean" and self.adapted_blocks < 4:
            raise InputError(
                "adapted_blocks: head_input 4xcls+mean reads the last four blocks; use 4 or more, "
                "or another head_input"
            )

    def deciding(self) -> dict[str, Any]:
        """All parameters that decide what the run computes, as JSON has them."""
        return self.model_dump(mode="json", exclude=WITHOUT_EFFECT | {"run_name"})

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


class ReportConfig(Config):
    """What a notebook offers beside the parameters of its runs."""

    figures_path: str | None = folder_field("figures_path", "plots and their tables")
    show_chips: bool = Field(
        True, description="draw the chips themselves; False where they may not be published"
    )


class NotebookConfig(ReportConfig, RunConfig):
    """Parameters of setup_finetune.ipynb."""

    prevalence: float = Field(
        0.05, gt=0, lt=1, description="share of positive chips where the classifier will work"
    )
