"""Variants with weights, heads or units taken away."""

import copy

import torch
from accelerate import Accelerator
from torch.nn.utils import prune

from helpers.deployment.runtimes import Variant, block_layers
from helpers.deployment.variants.source import REFERENCE, Source
from helpers.deployment.variants.structure import Unavailable
from helpers.training.loop import ChipExamples, FitSettings, fit
from helpers.training.processes import processes

_RECOVERY_LEARNING_RATE = 1e-4


def build_unstructured(percent: int, source: Source) -> Variant:
    """A share of the smallest weights of the blocks set to zero."""
    model = copy.deepcopy(source.classifier)
    layers = [(layer, "weight") for layer in block_layers(model.backbone).values()]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=percent / 100)
    for layer, name in layers:
        prune.remove(layer, name)
    made = f"{percent} % smallest weights of the blocks set to zero; stored and computed densely"
    return source.torch_variant(f"pruned_{percent}", made, model, costs_as=REFERENCE)


def build_structured(source: Source) -> Variant:
    """A share of heads and MLP units removed."""
    made = "a third of the heads and of the MLP units of every block removed"
    return source.torch_variant("structured", made, source.structured)


def build_structured_recovered(source: Source) -> Variant:
    """The same, fine-tuned afterwards."""
    model = copy.deepcopy(source.structured)
    processes(source.device)
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
    return source.torch_variant("structured_recovered", made, model.cpu(), costs_as="structured")


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
