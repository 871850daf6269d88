"""Variants that ONNX Runtime serves."""

import numpy as np

from helpers.deployment.runtimes import Variant
from helpers.deployment.variants.source import Source


def _onnx_variant(
    source: Source, name: str, made: str, precision: str = "fp32", **options
) -> Variant:
    return source.described(name, made, "onnxruntime", (f"{name}.onnx",), precision, options)


def build_onnx_fp32(source: Source) -> Variant:
    """The exported graph as it is."""
    _ = source.onnx
    return _onnx_variant(source, "onnx_fp32", "exported to ONNX")


def build_onnx_int8_dynamic(source: Source) -> Variant:
    """int8 weights; activations are quantized as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = source.folder / "onnx_int8_dynamic.onnx"
    quantize_dynamic(source.simplified_onnx, path, weight_type=QuantType.QInt8)
    made = "int8 weights, activations quantized as they come, one scale a batch"
    return _onnx_variant(source, "onnx_int8_dynamic", made, "int8", depends_on_batch=True)


def build_onnx_int8_static(source: Source) -> Variant:
    """int8 weights and activations, calibrated."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    quantize_static(
        source.simplified_onnx,
        source.folder / "onnx_int8_static.onnx",
        _Calibration(source.calibration_batches),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        # Weights of seven bits: without VNNI the sum of two 8-bit products overflows its 16 bits,
        # which made the error of the logits four times as large on such a CPU.
        reduce_range=True,
        extra_options={
            # Products of two activations (attention) lose too much in one scale for all.
            "MatMulConstBOnly": True,
            # Quantized outputs make ONNX Runtime 1.31 fuse a kernel that computes something else
            # (QDQSelectorActionTransformer; the unoptimised graph is right).
            "OpTypesToExcludeOutputQuantization": ["MatMul"],
        },
    )
    made = f"int8 QDQ, calibrated on {len(source.calibration)} training chips"
    return _onnx_variant(source, "onnx_int8_static", made, "int8")


class _Calibration:
    """ONNX Runtime's CalibrationDataReader."""

    def __init__(self, batches: list[np.ndarray]):
        self._batches = iter(batches)

    def get_next(self) -> dict | None:
        """Return the inputs of the next batch, None after the last."""
        batch = next(self._batches, None)
        return None if batch is None else {"chips": batch}
