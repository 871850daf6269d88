"""Variants with weights, heads or units taken away."""

import copy
from dataclasses import replace

import torch
from torch.nn.utils import prune

from helpers.deployment.runtimes import Variant, block_layers
from helpers.deployment.variants.openvino import build_openvino_int8
from helpers.deployment.variants.recovery import recovered
from helpers.deployment.variants.source import REFERENCE, Removal, Source
from helpers.deployment.variants.structure import Unavailable, described


def build_unstructured(percent: int, source: Source) -> Variant:
    """A share of the smallest weights of the blocks set to zero."""
    model = copy.deepcopy(source.classifier)
    layers = [(layer, "weight") for layer in block_layers(model.backbone).values()]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=percent / 100)
    for layer, name in layers:
        prune.remove(layer, name)
    made = f"{percent} % smallest weights of the blocks set to zero; stored and computed densely"
    return source.torch_variant(f"pruned_{percent}", made, model, costs_as=REFERENCE)


def build_structured(removal: Removal, source: Source) -> Variant:
    """A share of the parameters of heads and MLP units removed."""
    model, made = source.structured(removal), _removed(removal, source)
    return source.torch_variant(removal.name, made, model, removed_percent=removal.percent)


def build_recovered(removal: Removal, source: Source) -> Variant:
    """The same, distilled afterwards."""
    options = {"removed_percent": removal.percent, "costs_as": removal.name}
    model, made = recovered(source, removal), _taught(removal, source)
    return source.torch_variant(f"{removal.name}_recovered", made, model, **options)


def build_structured_int8(name: str, removal: Removal, source: Source, **options) -> Variant:
    """The same in int8; options are those of `build_openvino_int8`."""
    source.check_exported()
    narrow = source.once(
        f"source_of_{removal.name}",
        lambda: replace(
            source,
            classifier=recovered(source, removal),
            graph=f"{removal.name}.onnx",
            kept={},
        ),
    )
    variant = build_openvino_int8(name, narrow, **options)
    return replace(
        variant,
        made=f"{_taught(removal, source)}, then {variant.made}",
        options=variant.options | {"removed_percent": removal.percent},
    )


def _removed(removal: Removal, source: Source) -> str:
    by = ", the loss (Taylor) says which" if removal.taylor else ""
    return described(source.classifier, source.structured(removal)) + by


def _taught(removal: Removal, source: Source) -> str:
    epochs = f"{source.recovery_epochs} epoch{'s' if source.recovery_epochs > 1 else ''}"
    return (
        f"{_removed(removal, source)}, then {epochs} of distillation from the classifier on the "
        "training chips"
    )


def build_sparse_2_4(source: Source) -> Variant:
    """Two of every four weights zero, for sparse tensor cores."""
    if source.device != "cuda" or torch.cuda.get_device_capability() < (8, 0):
        raise Unavailable("2:4 sparsity needs a GPU with sparse tensor cores (compute 8.0)")
    model = copy.deepcopy(source.classifier).half()
    with torch.no_grad():
        for layer in block_layers(model.backbone).values():
            fours = layer.weight.unflatten(1, (-1, 4))
            smallest = fours.abs().topk(2, dim=2, largest=False).indices
            fours.scatter_(2, smallest, 0)
    made = "the two smallest of every four weights zero, sparse tensor cores, fp16"
    return source.torch_variant("sparse_2_4", made, model, "fp16", sparse_2_4=True)
