"""Variants that OpenVINO serves."""

import gzip
import os
from pathlib import Path

from helpers.deployment.runtimes import Variant, openvino_core
from helpers.deployment.variants.source import Source
from helpers.deployment.variants.structure import Unavailable


def _written(source: Source, name: str, model, *, fp16_file: bool) -> tuple[str, str]:
    """Write weights as they are and the graph, which is mostly XML tags, compressed."""
    import openvino

    path = source.folder / f"{name}.xml"
    openvino.save_model(model, path, compress_to_fp16=fp16_file)
    graph = source.folder / f"{name}.xml.gz"
    graph.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    path.unlink()
    return f"{name}.bin", graph.name


def _openvino_variant(
    source: Source, name: str, made: str, files, precision: str, hint: str = "f32"
) -> Variant:
    """Of a graph on disk; `hint` is the precision of what is not quantized."""
    return source.described(name, made, "openvino", files, precision, {"precision_hint": hint})


def _read(path: Path):
    return openvino_core().read_model(path)


def build_openvino_fp32(source: Source) -> Variant:
    """The exported graph in fp32."""
    files = _written(source, "openvino_fp32", _read(source.onnx), fp16_file=False)
    made = "ONNX graph, optimised by OpenVINO"
    return _openvino_variant(source, "openvino_fp32", made, files, "fp32")


def build_openvino_bf16(source: Source) -> Variant:
    """The exported graph, computed in bf16."""
    _require_bf16()
    files = _written(source, "openvino_bf16", _read(source.onnx), fp16_file=True)
    made = "weights stored in fp16, arithmetic in bf16"
    return _openvino_variant(source, "openvino_bf16", made, files, "bf16", "bf16")


def _require_bf16() -> None:
    if "BF16" not in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unavailable("this CPU has no bf16 instructions")


def build_openvino_int8(
    name: str, source: Source, *, smooth: bool = True, hint: str = "f32"
) -> Variant:
    """int8 by NNCF, calibrated.

    Args:
        name: of the variant; with `_bf16` at its end it has the files of the one without.
        source: what it is made of.
        smooth: whether SmoothQuant moves the outliers of activations into the weights first.
        hint: `f32` or `bf16`, the precision of what is not quantized.
    """
    if hint == "bf16":
        _require_bf16()
    stem = name.removesuffix("_bf16")
    files = source.once(stem, lambda: _quantized(source, stem, smooth))
    made = f"int8, NNCF for transformers, calibrated on {len(source.calibration)} chips"
    made += "" if smooth else ", without SmoothQuant"
    made += ", the rest in bf16" if hint == "bf16" else ""
    return _openvino_variant(source, name, made, files, "int8", hint)


def _quantized(source: Source, name: str, smooth: bool) -> tuple[str, str]:
    nncf = _nncf()
    batches = source.calibration_batches
    alphas = {} if smooth else {"matmul": -1}  # -1: off
    smoothing = nncf.AdvancedSmoothQuantParameters(**alphas)
    model = nncf.quantize(
        _read(source.onnx),
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
        advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smoothing),
    )
    return _written(source, name, model, fp16_file=True)


def build_openvino_int4_weights(source: Source) -> Variant:
    """int4 weights by NNCF, fp32 arithmetic."""
    nncf = _nncf()
    model = nncf.compress_weights(
        _read(source.onnx), mode=nncf.CompressWeightsMode.INT4_SYM, group_size=64, ratio=1.0
    )
    files = _written(source, "openvino_int4_weights", model, fp16_file=True)
    made = "int4 weights in groups of 64, fp32 arithmetic"
    return _openvino_variant(source, "openvino_int4_weights", made, files, "fp32")


def _nncf():
    os.environ.setdefault("NNCF_CI", "1")  # NNCF's switch for not reporting its use to its makers
    import nncf

    return nncf
