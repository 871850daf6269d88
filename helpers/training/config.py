"""The parameters of a training run."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from helpers import InputError
from helpers.data.dataset import ChipData, DataConfig
from helpers.models.adapters import METHODS
from helpers.models.architectures import BACKBONE_HELP, backbone_label
from helpers.models.classifier import HEAD_INPUTS

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

    backbone: str = Field("example", description=BACKBONE_HELP)
    weights: str = Field("pretrained", description="pretrained, random, or a file of weights")
    image_size: PositiveInt = Field(98, description="pixels, a multiple of the patch size")
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
