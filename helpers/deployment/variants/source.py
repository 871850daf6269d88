"""What the builders of variants need."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.deployment.runtimes import Variant
from helpers.deployment.variants.structure import Unavailable, remove_heads_and_units
from helpers.models.classifier import Classifier
from helpers.models.export import export_onnx
from helpers.records import written_whole

REFERENCE = "eager_fp32"


@dataclass
class Source:
    """What the builders need.

    Args:
        classifier: fp32, in eval mode; LoRA merged where there was one.
        train: chips (N, bands, S, S) and targets (N,) to calibrate and recover with.
        valid: the same, to choose the epoch of a recovery by.
        folder: where the variants' files go.
        adapted: the classifier as a PeftModel; None for one with a new adapter of zero update,
            which costs the same time and memory as a trained one.
        device: `cpu` or `cuda`, where PyTorch variants will run.
        calibration_chips: how many training chips calibrate static quantization.
        recovery_epochs: of the fine-tuning after structured pruning.
        seed: of the recovery.
    """

    classifier: Classifier
    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    folder: Path
    adapted: PeftModel | None = None
    device: str = "cpu"
    calibration_chips: int = 64
    recovery_epochs: int = 3
    seed: int = 0

    @property
    def calibration(self) -> list[np.ndarray]:
        """Training chips in batches of eight."""
        chips = self.train[0][: self.calibration_chips]
        return [batch.numpy() for batch in chips.split(8)]

    @cached_property
    def onnx(self) -> Path:
        """The classifier as an ONNX file."""
        if self.train[0].dtype != torch.uint8:
            raise Unavailable("the exported graph takes 8-bit chips, and these are not")
        return export_onnx(self.classifier, self.folder / "onnx_fp32.onnx")

    @cached_property
    def simplified_onnx(self) -> Path:
        """The ONNX file as ONNX Runtime's quantizers want it: shapes inferred, constants folded."""
        from onnxruntime.quantization.shape_inference import quant_pre_process

        path = self.folder / "simplified.onnx"
        quant_pre_process(self.onnx, path)
        return path

    @cached_property
    def structured(self) -> Classifier:
        """The classifier with a third of its heads and of its MLP units removed."""
        return remove_heads_and_units(self.classifier, _STRUCTURED_SHARE)

    def openvino(self):
        """Return the classifier as a new OpenVINO model."""
        import openvino

        return openvino.Core().read_model(self.onnx)

    def torch_variant(
        self, name: str, made: str, model: nn.Module, precision: str = "fp32", **options
    ) -> Variant:
        """Write the state of a model that `Classifier` describes."""
        path = self.folder / f"{name}.safetensors"
        with written_whole(path) as part:
            save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, part)
        return self._described(name, made, "torch", path, precision, options)

    def torchao_variant(self, name: str, made: str, model: nn.Module, precision: str) -> Variant:
        """Write a state whose tensors are torchao's; only their own loader reads them."""
        path = self.folder / f"{name}.pt"
        with written_whole(path) as part:
            torch.save(model.state_dict(), part)
        dtype = str(next(model.linear_head.parameters()).dtype).removeprefix("torch.")
        return self._described(name, made, "torchao", path, precision, {"dtype": dtype})

    def _described(self, name, made, runtime, path, precision, options) -> Variant:
        options |= {"classifier": asdict(self.classifier.config)}
        return Variant(name, made, runtime, self.folder, (path.name,), options, precision)


_STRUCTURED_SHARE = 1 / 3  # of heads and of MLP units: one of the three heads of a ViT-Ti
