"""What the builders of variants need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.deployment.runtimes import Variant
from helpers.deployment.variants.importance import taylor_terms, weight_norms
from helpers.deployment.variants.structure import Unavailable, remove_heads_and_units
from helpers.models.classifier import Classifier
from helpers.models.export import export_onnx
from helpers.records import written_whole

if TYPE_CHECKING:
    from peft import PeftModel

REFERENCE = "eager_fp32"
CONTROL = "eager_fp32_again"
"""The reference under another name: what differs between the two is noise of the measurement."""

STRUCTURED = (25, 40, 50, 60)
"""Percent of the parameters of heads and MLP units that structured pruning removes."""

T = TypeVar("T")


@dataclass(frozen=True)
class Removal:
    """Which heads and MLP units structured pruning removes.

    Args:
        percent: of their parameters.
        taylor: the least important by `taylor_terms` on the training chips, not by `weight_norms`.
    """

    percent: int
    taylor: bool = False

    @property
    def name(self) -> str:
        """Of the form that lacks them, and how the names of those that are made of it begin."""
        return f"structured_{self.percent}{'_taylor' if self.taylor else ''}"


@dataclass
class Source:
    """What the builders need.

    Args:
        classifier: fp32, in eval mode; LoRA merged where there was one.
        train: chips (N, bands, S, S) and targets (N,) to recover with.
        valid: the same, to choose the epoch of a recovery by.
        calibration: chips that static quantization is calibrated on, see `calibration_rows`.
        folder: where the variants' files go.
        adapted: the classifier as a PeftModel; None for one with a new adapter of zero update,
            which costs the same time and memory as a trained one.
        device: `cpu` or `cuda`, where PyTorch variants will run.
        recovery_epochs: of the distillation after structured pruning.
        seed: of the recovery.
        graph: name of the classifier's exported file.
        kept: what `once` has made.
    """

    classifier: Classifier
    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    calibration: Tensor
    folder: Path
    adapted: PeftModel | None = None
    device: str = "cpu"
    recovery_epochs: int = 3
    seed: int = 0
    graph: str = "onnx_fp32.onnx"
    kept: dict = field(default_factory=dict, repr=False)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What several variants are made of: made when it is first asked for by its name."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    @property
    def calibration_batches(self) -> list[np.ndarray]:
        """The calibration chips in batches of eight."""
        return [batch.numpy() for batch in self.calibration.split(8)]

    def check_exported(self) -> None:
        """Raise Unavailable where no exported graph is compared."""
        if self.device != "cpu":
            raise Unavailable("served from the CPU, which a comparison on a GPU leaves out")
        if self.train[0].dtype != torch.uint8:
            raise Unavailable("the exported graph takes 8-bit chips, and these are not")

    @cached_property
    def onnx(self) -> Path:
        """The classifier as an ONNX file."""
        self.check_exported()
        return export_onnx(self.classifier, self.folder / self.graph)

    @cached_property
    def simplified_onnx(self) -> Path:
        """The ONNX file as ONNX Runtime's quantizers want it: shapes inferred, constants folded."""
        from onnxruntime.quantization.shape_inference import quant_pre_process

        path = self.folder / "simplified.onnx"
        quant_pre_process(self.onnx, path)
        return path

    def structured(self, removal: Removal) -> Classifier:
        """The classifier without these heads and MLP units."""

        def removed() -> Classifier:
            if removal.taylor:
                importance = self.once(
                    "taylor", lambda: taylor_terms(self.classifier, *self.train, self.device)
                )
            else:
                importance = weight_norms(self.classifier)
            return remove_heads_and_units(self.classifier, removal.percent / 100, importance)

        return self.once(removal.name, removed)

    def torch_variant(
        self, name: str, made: str, model: nn.Module, precision: str = "fp32", **options
    ) -> Variant:
        """Write the state of a model that `Classifier` describes."""
        path = self.folder / f"{name}.safetensors"
        with written_whole(path) as part:
            save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, part)
        return self.described(name, made, "torch", (path.name,), precision, options)

    def torchao_variant(
        self, name: str, made: str, model: nn.Module, precision: str, **options
    ) -> Variant:
        """Write a state whose tensors are torchao's; only their own loader reads them."""
        path = self.folder / f"{name}.pt"
        with written_whole(path) as part:
            torch.save(model.state_dict(), part)
        return self.described(name, made, "torchao", (path.name,), precision, options)

    def described(
        self,
        name: str,
        made: str,
        runtime: str,
        files: tuple[str, ...],
        precision: str = "fp32",
        options: dict | None = None,
    ) -> Variant:
        """A variant that carries the classifier's configuration, whatever its runtime."""
        options = {"classifier": asdict(self.classifier.config)} | (options or {})
        return Variant(name, made, runtime, self.folder, files, options, precision)


def calibration_rows(train: pd.DataFrame, count: int, seed: int) -> np.ndarray:
    """Which training chips to calibrate on: classes in turn, within a class its groups in turn.

    The first rows of a manifest that is sorted by class or place would be of one kind only.

    Args:
        train: rows of the training chips, with `target` and `group`.
        count: how many; all of them where there are fewer.
        seed: of the choice within a group.

    Returns:
        Positions in `train`, ascending.
    """
    rows = train.reset_index(drop=True).sample(frac=1, random_state=seed)
    rows = rows.assign(turn=rows.groupby(["target", "group"]).cumcount())
    rows = rows.sort_values("turn", kind="stable")
    rows = rows.assign(turn=rows.groupby("target").cumcount())
    return np.sort(rows.sort_values("turn", kind="stable").index[:count].to_numpy())
