"""Variants that OpenVINO serves."""

import gzip
import os

from helpers.deployment.runtimes import Variant
from helpers.deployment.variants.source import Source
from helpers.deployment.variants.structure import Unavailable


def _openvino_variant(
    source: Source, name: str, made: str, model, precision: str, *, fp16_file: bool
) -> Variant:
    """Write weights as they are and the graph, which is mostly XML tags, compressed."""
    import openvino

    path = source.folder / f"{name}.xml"
    openvino.save_model(model, path, compress_to_fp16=fp16_file)
    graph = source.folder / f"{name}.xml.gz"
    graph.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    path.unlink()
    options = {"precision_hint": "bf16" if precision == "bf16" else "f32"}
    return source.described(name, made, "openvino", (f"{name}.bin", graph.name), precision, options)


def build_openvino_fp32(source: Source) -> Variant:
    """The exported graph in fp32."""
    made = "ONNX graph, optimised by OpenVINO"
    return _openvino_variant(
        source, "openvino_fp32", made, source.openvino(), "fp32", fp16_file=False
    )


def build_openvino_bf16(source: Source) -> Variant:
    """The exported graph, computed in bf16."""
    import openvino

    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unavailable("this CPU has no bf16 instructions")
    made = "weights stored in fp16, arithmetic in bf16"
    return _openvino_variant(
        source, "openvino_bf16", made, source.openvino(), "bf16", fp16_file=True
    )


def build_openvino_int8(source: Source) -> Variant:
    """int8 by NNCF, calibrated."""
    nncf = _nncf()
    batches = source.calibration_batches
    model = nncf.quantize(
        source.openvino(),
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
    )
    made = f"int8, NNCF for transformers, calibrated on {len(source.calibration)} chips"
    return _openvino_variant(source, "openvino_int8", made, model, "int8", fp16_file=True)


def build_openvino_int4_weights(source: Source) -> Variant:
    """int4 weights by NNCF, fp32 arithmetic."""
    nncf = _nncf()
    model = nncf.compress_weights(
        source.openvino(), mode=nncf.CompressWeightsMode.INT4_SYM, group_size=64, ratio=1.0
    )
    made = "int4 weights in groups of 64, fp32 arithmetic"
    return _openvino_variant(source, "openvino_int4_weights", made, model, "fp32", fp16_file=True)


def _nncf():
    os.environ.setdefault("NNCF_CI", "1")  # NNCF's switch for not reporting its use to its makers
    import nncf

    return nncf
