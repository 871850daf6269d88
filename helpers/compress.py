"""Variants of one trained classifier: precisions, LoRA merged or not, quantized, pruned, exported.

Each builder writes its files into one folder and describes them as a `Variant`, which
`runtimes.load` turns into predictions in this or in any other process. What this machine cannot
build becomes a row with the reason.
"""

import copy
import gzip
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import save_file
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.utils import prune

from helpers.adapters import AdapterSettings, add_adapter, merge_adapter, save_adapter
from helpers.fit import ChipExamples, FitSettings, fit
from helpers.model import Classifier, export_onnx
from helpers.records import written_whole
from helpers.runtimes import Variant, block_layers

REFERENCE = "eager_fp32"
_RECOVERY_LEARNING_RATE = 1e-4
_STRUCTURED_SHARE = 1 / 3  # of heads and of MLP units: one of the three heads of a ViT-Ti


class Unavailable(Exception):
    """This machine, model or installation cannot give a variant; the message is the reason."""


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


# --- PyTorch -------------------------------------------------------------------------------------


def _eager(source: Source) -> Variant:
    return source.torch_variant(REFERENCE, "as trained, PyTorch eager", source.classifier)


def _autocast(name: str, dtype: str, source: Source) -> Variant:
    made = f"fp32 weights, autocast to {dtype}"
    eager = _eager(source)  # the same file
    options = eager.options | {"autocast": dtype}
    return replace(eager, name=name, made=made, options=options, precision=name[:4])


def _pure(name: str, dtype: str, source: Source) -> Variant:
    model = copy.deepcopy(source.classifier).to(getattr(torch, dtype))
    return source.torch_variant(
        name, f"weights and arithmetic in {dtype}", model, name, dtype=dtype
    )


def _adapted(source: Source) -> tuple[PeftModel, str]:
    if source.adapted is not None:
        return source.adapted, "trained adapter"
    model = add_adapter(copy.deepcopy(source.classifier), AdapterSettings()).eval()
    return model, "new adapter of zero update (r 4 on qkv)"


def _lora_unmerged(source: Source) -> Variant:
    adapted, which = _adapted(source)
    save_adapter(adapted, source.folder / "lora_adapter")
    base = copy.deepcopy(adapted).unload()
    variant = source.torch_variant(
        "lora_unmerged", f"{which}, not merged", base, adapter="lora_adapter"
    )
    files = [
        f"lora_adapter/{name}" for name in ("adapter_model.safetensors", "adapter_config.json")
    ]
    return Variant(**variant.__dict__ | {"files": (*variant.files, *files)})


def _lora_merged(source: Source) -> Variant:
    adapted, which = _adapted(source)
    merged = merge_adapter(copy.deepcopy(adapted))
    return source.torch_variant("lora_merged", f"{which}, merged", merged)


def _compiled(source: Source) -> Variant:
    """`torch.compile`'s compiler, run ahead of time, so that no server compiles at its start."""
    if source.device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise Unavailable("torch.compile needs a C++ compiler on the CPU (Debian: g++)")
    chips = source.train[0][:2].to(source.device)
    model = copy.deepcopy(source.classifier).to(source.device)
    with torch.no_grad():
        program = torch.export.export(
            model, (chips,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
        )
        path = source.folder / "compiled_fp32.pt2"
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    made = "compiled ahead of time (torch.export, AOTInductor)"
    return source._described("compiled_fp32", made, "aot_inductor", path, "fp32", {})


def _torchao(name: str, made: str, precision: str, config: str, source: Source) -> Variant:
    from torchao import quantization

    model = copy.deepcopy(source.classifier)
    quantization.quantize_(model.backbone.blocks, getattr(quantization, config)())
    return source.torchao_variant(name, made, model, precision)


def _int4_weights(source: Source) -> Variant:
    if source.device != "cuda":
        raise Unavailable("torchao's int4 kernels need a GPU; see openvino_int4_weights")
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    model = copy.deepcopy(source.classifier).to("cuda", torch.bfloat16)
    config = Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d")
    quantize_(model.backbone.blocks, config)
    made = "torchao: int4 weights in groups of 32, bf16 arithmetic"
    return source.torchao_variant("int4_weights", made, model, "bf16")


# --- ONNX Runtime --------------------------------------------------------------------------------


def _onnx_variant(source: Source, name: str, made: str, precision: str = "fp32") -> Variant:
    return Variant(name, made, "onnxruntime", source.folder, (f"{name}.onnx",), {}, precision)


def _onnx_fp32(source: Source) -> Variant:
    _ = source.onnx
    return _onnx_variant(source, "onnx_fp32", "exported to ONNX")


def _onnx_int8_dynamic(source: Source) -> Variant:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = source.folder / "onnx_int8_dynamic.onnx"
    quantize_dynamic(source.simplified_onnx, path, weight_type=QuantType.QInt8)
    made = "int8 weights, activations quantized as they come"
    return _onnx_variant(source, "onnx_int8_dynamic", made, "int8")


def _onnx_int8_static(source: Source) -> Variant:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    quantize_static(
        source.simplified_onnx,
        source.folder / "onnx_int8_static.onnx",
        _Calibration(source.calibration),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={
            # Products of two activations (attention) lose too much in one scale for all.
            "MatMulConstBOnly": True,
            # Quantized outputs make ONNX Runtime 1.31 fuse a kernel that computes something else
            # (QDQSelectorActionTransformer; the unoptimised graph is right).
            "OpTypesToExcludeOutputQuantization": ["MatMul"],
        },
    )
    made = f"int8 QDQ, calibrated on {len(np.concatenate(source.calibration))} training chips"
    return _onnx_variant(source, "onnx_int8_static", made, "int8")


class _Calibration:
    """ONNX Runtime's CalibrationDataReader."""

    def __init__(self, batches: list[np.ndarray]):
        self._batches = iter(batches)

    def get_next(self) -> dict | None:
        """Return the inputs of the next batch, None after the last."""
        batch = next(self._batches, None)
        return None if batch is None else {"chips": batch}


# --- OpenVINO ------------------------------------------------------------------------------------


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
    hint = "bf16" if precision == "bf16" else "f32"
    options = {"precision_hint": hint}
    files = (f"{name}.bin", graph.name)
    return Variant(name, made, "openvino", source.folder, files, options, precision)


def _openvino_fp32(source: Source) -> Variant:
    made = "ONNX graph, optimised by OpenVINO"
    return _openvino_variant(
        source, "openvino_fp32", made, source.openvino(), "fp32", fp16_file=False
    )


def _openvino_bf16(source: Source) -> Variant:
    import openvino

    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unavailable("this CPU has no bf16 instructions")
    made = "weights stored in fp16, arithmetic in bf16"
    return _openvino_variant(
        source, "openvino_bf16", made, source.openvino(), "bf16", fp16_file=True
    )


def _openvino_int8(source: Source) -> Variant:
    nncf = _nncf()
    batches = source.calibration
    model = nncf.quantize(
        source.openvino(),
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
    )
    made = f"int8, NNCF for transformers, calibrated on {len(np.concatenate(batches))} chips"
    return _openvino_variant(source, "openvino_int8", made, model, "int8", fp16_file=True)


def _openvino_int4_weights(source: Source) -> Variant:
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


# --- Pruning -------------------------------------------------------------------------------------


def _unstructured(percent: int, source: Source) -> Variant:
    model = copy.deepcopy(source.classifier)
    layers = [(layer, "weight") for layer in block_layers(model.backbone).values()]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=percent / 100)
    for layer, name in layers:
        prune.remove(layer, name)
    made = f"{percent} % smallest weights of the blocks set to zero; stored and computed densely"
    return source.torch_variant(f"pruned_{percent}", made, model)


def remove_heads_and_units(classifier: Classifier, share: float) -> Classifier:
    """A copy without the weakest heads and MLP units of every block.

    A head is as strong as the columns of `proj` that read it, a unit as the column of `fc2`
    (L2 norm times that of the rows that write it). Every block loses the same number, so that
    all stay alike.

    Args:
        classifier: its MLPs must have plain units.
        share: of heads and of units, rounded down, but at least one of each.

    Raises:
        Unavailable: gated MLPs (ViT-g), or one head only.
    """
    pruned = copy.deepcopy(classifier)
    for block in pruned.backbone.blocks:
        attention, mlp = block.attn, block.mlp
        if type(mlp) is not Mlp or attention.num_heads < 2:
            raise Unavailable("heads and units can be removed from plain blocks only")
        width = attention.head_dim
        written = attention.qkv.weight.unflatten(0, (3, -1, width)).square().sum(dim=(0, 2, 3))
        read = attention.proj.weight.unflatten(1, (-1, width)).square().sum(dim=(0, 2))
        heads = _strongest(written * read, share)
        columns = (heads[:, None] * width + torch.arange(width)).flatten()
        rows = (torch.arange(3)[:, None] * attention.attn_dim + columns).flatten()
        attention.qkv, attention.proj = (
            _rows(attention.qkv, rows),
            _columns(attention.proj, columns),
        )
        attention.num_heads, attention.attn_dim = len(heads), len(columns)
        strength = mlp.fc1.weight.square().sum(dim=1) * mlp.fc2.weight.square().sum(dim=0)
        units = _strongest(strength, share)
        mlp.fc1, mlp.fc2 = _rows(mlp.fc1, units), _columns(mlp.fc2, units)
    return pruned.eval()


def _strongest(strength: Tensor, share: float) -> Tensor:
    keep = len(strength) - max(1, int(share * len(strength)))
    return strength.topk(keep).indices.sort().values


def _rows(layer: nn.Linear, rows: Tensor) -> nn.Linear:
    return _linear(layer.weight[rows], layer.bias[rows])


def _columns(layer: nn.Linear, columns: Tensor) -> nn.Linear:
    return _linear(layer.weight[:, columns], layer.bias)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return layer


def _structured(source: Source) -> Variant:
    made = "a third of the heads and of the MLP units of every block removed"
    return source.torch_variant("structured", made, source.structured)


def _structured_recovered(source: Source) -> Variant:
    model = copy.deepcopy(source.structured)
    group = {"params": list(model.parameters()), "lr": _RECOVERY_LEARNING_RATE, "weight_decay": 0.0}
    fit(
        model,
        [group],
        ChipExamples(*source.train),
        ChipExamples(*source.valid),
        FitSettings(source.recovery_epochs, source.recovery_epochs, 32, seed=source.seed),
        accelerator=Accelerator(cpu=source.device == "cpu"),
        report=lambda line: None,
    )
    made = f"the same, then {source.recovery_epochs} epochs of fine-tuning on the training chips"
    return source.torch_variant("structured_recovered", made, model.cpu())


def _sparse_2_4(source: Source) -> Variant:
    if source.device != "cuda" or torch.cuda.get_device_capability() < (8, 0):
        raise Unavailable("2:4 sparsity needs a GPU with sparse tensor cores (compute 8.0)")
    model = copy.deepcopy(source.classifier).half()
    with torch.no_grad():
        for layer in block_layers(model.backbone).values():
            fours = layer.weight.unflatten(1, (-1, 4))
            smallest = fours.abs().topk(2, dim=2, largest=False).indices
            fours.scatter_(2, smallest, 0)
    made = "the two smallest of every four weights zero, sparse tensor cores, fp16"
    return source.torch_variant("sparse_2_4", made, model, "fp16", dtype="float16", sparse_2_4=True)


# --- All of them ---------------------------------------------------------------------------------

BUILDERS: dict[str, Callable[[Source], Variant]] = {
    REFERENCE: _eager,
    "lora_unmerged": _lora_unmerged,
    "lora_merged": _lora_merged,
    "bf16_autocast": partial(_autocast, "bf16_autocast", "bfloat16"),
    "fp16_autocast": partial(_autocast, "fp16_autocast", "float16"),
    "bf16": partial(_pure, "bf16", "bfloat16"),
    "fp16": partial(_pure, "fp16", "float16"),
    "compiled_fp32": _compiled,
    "int8_dynamic": partial(
        _torchao,
        "int8_dynamic",
        "torchao: int8 weights, activations quantized as they come",
        "int8",
        "Int8DynamicActivationInt8WeightConfig",
    ),
    "int8_weights": partial(
        _torchao,
        "int8_weights",
        "torchao: int8 weights, fp32 arithmetic",
        "fp32",
        "Int8WeightOnlyConfig",
    ),
    "int4_weights": _int4_weights,
    "onnx_fp32": _onnx_fp32,
    "onnx_int8_dynamic": _onnx_int8_dynamic,
    "onnx_int8_static": _onnx_int8_static,
    "openvino_fp32": _openvino_fp32,
    "openvino_bf16": _openvino_bf16,
    "openvino_int8": _openvino_int8,
    "openvino_int4_weights": _openvino_int4_weights,
    "pruned_30": partial(_unstructured, 30),
    "pruned_50": partial(_unstructured, 50),
    "pruned_70": partial(_unstructured, 70),
    "structured": _structured,
    "structured_recovered": _structured_recovered,
    "sparse_2_4": _sparse_2_4,
}


def build_variants(
    source: Source, names: tuple[str, ...], report: Callable[[str], None] = print
) -> tuple[list[Variant], pd.DataFrame]:
    """Build variants, one after the other; what cannot be built is listed with the reason.

    Returns:
        The variants, and a table of all names: `variant, made, arithmetic, mebibytes_on_disk,
        unavailable`.
    """
    source.folder.mkdir(parents=True, exist_ok=True)
    variants, rows = [], []
    for name in names:
        try:
            with _quiet():
                variant = BUILDERS[name](source)
            variant.save()
        except Unavailable as error:
            rows.append({"variant": name, "unavailable": str(error)})
        except ModuleNotFoundError as error:
            reason = f"{error.name} is not installed (`pip install {error.name}`)"
            rows.append({"variant": name, "unavailable": reason})
        except Exception as error:  # exporters and quantizers raise whatever they like
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            rows.append({"variant": name, "unavailable": reason})
        else:
            variants.append(variant)
            rows.append(
                {
                    "variant": name,
                    "made": variant.made,
                    "arithmetic": variant.precision,
                    "mebibytes_on_disk": variant.bytes_on_disk / 2**20,
                }
            )
        report(f"{name}: {rows[-1].get('unavailable') or 'built'}")
    columns = ["variant", "made", "arithmetic", "mebibytes_on_disk", "unavailable"]
    return variants, pd.DataFrame(rows, columns=columns)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the progress bars and remarks of exporters and quantizers out of reports."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            open(os.devnull, "w") as nothing,
            redirect_stdout(nothing),
            redirect_stderr(nothing),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        logging.disable(level)
