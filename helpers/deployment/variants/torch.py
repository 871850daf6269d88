"""Variants that PyTorch serves: precisions, LoRA merged or not, compiled, quantized by torchao."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from helpers.deployment.runtimes import Variant
from helpers.deployment.variants.source import CONTROL, REFERENCE, Source
from helpers.deployment.variants.structure import Unavailable
from helpers.models.adapters import AdapterSettings, add_adapter, merge_adapter
from helpers.models.classifier import Classifier

if TYPE_CHECKING:
    from peft import PeftModel

INT8_DYNAMIC = "Int8DynamicActivationInt8WeightConfig"


def build_eager(source: Source) -> Variant:
    """The reference: as trained."""
    return source.torch_variant(REFERENCE, "as trained, PyTorch eager", source.classifier)


def build_control(source: Source) -> Variant:
    """The reference's file under another name."""
    made = "the reference once more: its difference is noise"
    eager = build_eager(source)
    return replace(eager, name=CONTROL, made=made, options=eager.options | {"only_timed": True})


def build_autocast(name: str, dtype: str, source: Source) -> Variant:
    """fp32 weights, autocast."""
    made = f"fp32 weights, autocast to {dtype}"
    eager = build_eager(source)  # the same file
    options = eager.options | {"autocast": dtype}
    return replace(eager, name=name, made=made, options=options, precision=name[:4])


def build_pure(name: str, dtype: str, source: Source) -> Variant:
    """Weights and arithmetic in a lower precision."""
    model = copy.deepcopy(source.classifier).to(getattr(torch, dtype))
    return source.torch_variant(
        name, f"weights and arithmetic in {dtype}, chips normalised in fp32", model, name
    )


def _adapted(source: Source) -> tuple[PeftModel, str, dict]:
    """The adapted classifier, what it is, and options: without an update it is only timed."""
    if source.adapted is not None:
        return copy.deepcopy(source.adapted), "trained adapter", {}
    model = add_adapter(copy.deepcopy(source.classifier), AdapterSettings()).eval()
    return model, "new adapter without an update (r 4 on qkv)", {"only_timed": True}


def build_lora_unmerged(source: Source) -> Variant:
    """Base and adapter apart."""
    adapted, which, options = _adapted(source)
    # Values come from the file, and what PiSSA took from the base is not in it any more.
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(source.folder / "lora_adapter")
    options |= {"adapter": "lora_adapter"}
    made = f"{which}, not merged"
    variant = source.torch_variant("lora_unmerged", made, adapted.unload(), **options)
    names = ("adapter_model.safetensors", "adapter_config.json")
    return replace(variant, files=(*variant.files, *(f"lora_adapter/{name}" for name in names)))


def build_lora_merged(source: Source) -> Variant:
    """The adapter merged into the base."""
    adapted, which, options = _adapted(source)
    merged = merge_adapter(adapted)
    return source.torch_variant("lora_merged", f"{which}, merged", merged, **options)


def build_compiled(precision: str, source: Source) -> Variant:
    """`torch.compile`'s compiler, run ahead of time, so that no server compiles at its start.

    Args:
        precision: `fp32`, `bf16` as `build_pure` has it, or `int8` as torchao's `int8_dynamic`.
        source: what it is made of.
    """
    if source.device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise Unavailable("torch.compile needs a C++ compiler on the CPU (Debian: g++)")
    model = copy.deepcopy(source.classifier)
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    if precision == "int8":
        from torchao.utils import unwrap_tensor_subclass

        model = unwrap_tensor_subclass(_quantized(model, INT8_DYNAMIC))
    chips = source.train[0][:2].to(source.device)
    name = f"compiled_{precision}"
    with torch.no_grad():
        program = torch.export.export(
            model.to(source.device), (chips,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
        )
        path = source.folder / f"{name}.pt2"
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    made = f"{precision}, compiled ahead of time (torch.export, AOTInductor)"
    return source.described(name, made, "aot_inductor", (path.name,), precision)


def build_torchao(name: str, made: str, precision: str, config: str, source: Source) -> Variant:
    """The linear layers of the blocks quantized by torchao."""
    model = _quantized(copy.deepcopy(source.classifier), config)
    return source.torchao_variant(name, made, model, precision)


def _quantized(model: Classifier, config: str) -> Classifier:
    from torchao import quantization

    quantization.quantize_(model.backbone.blocks, getattr(quantization, config)())
    return model


def build_int4_weights(source: Source) -> Variant:
    """int4 weights by torchao, on a GPU."""
    if source.device != "cuda":
        raise Unavailable("torchao's int4 kernels need a GPU; see openvino_int4_weights")
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    model = copy.deepcopy(source.classifier).to("cuda", torch.bfloat16)
    config = Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d")
    quantize_(model.backbone.blocks, config)
    made = "torchao: int4 weights in groups of 32, bf16 arithmetic"
    return source.torchao_variant("int4_weights", made, model, "bf16")
