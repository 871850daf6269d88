"""A classifier as an ONNX file, as a module tree, and as numbers of parameters."""

import itertools
import warnings
from pathlib import Path

import torch
from torch import nn

from helpers.models.classifier import Classifier
from helpers.records import written_whole


def module_tree(module: nn.Module, indent: str = "") -> str:
    """The module's `repr` with equal neighbours folded into one line and no-op modules left out."""
    children = [
        (name, child, repr(child))
        for name, child in module.named_children()
        if not isinstance(child, nn.Identity)
        and getattr(child, "p", None) != 0.0  # dropout that drops nothing
        and not (isinstance(child, nn.ModuleDict | nn.ParameterDict) and len(child) == 0)
    ]
    if not children:
        return repr(module)
    lines = []
    for _, run in itertools.groupby(children, key=lambda entry: entry[2]):
        (first, child, _), *more = run
        name = f"({first}-{more[-1][0]}): {len(more) + 1} x " if more else f"({first}): "
        lines.append(f"{indent}  {name}{module_tree(child, indent + '  ')}")
    return "\n".join([f"{module._get_name()}(", *lines, f"{indent})"])


def count_parameters(module: nn.Module) -> dict[str, int]:
    """Numbers of parameters: `total` and `trainable`."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return {"total": sum(n for n, _ in sizes), "trainable": sum(n for n, grad in sizes if grad)}


def export_onnx(classifier: Classifier, path: str | Path) -> Path:
    """Write the classifier as an ONNX file: `chips` (batch, bands, S, S) uint8 -> `logits`.

    The batch size stays free. Nodes carry the module they come from in their metadata.
    """
    size, bands = classifier.config.image_size, len(classifier.config.bands)
    # Two chips: with one, the exporter would take the batch size for a constant.
    chips = torch.zeros(2, bands, size, size, dtype=torch.uint8)
    with warnings.catch_warnings(action="ignore"):  # deprecations between torch and itself
        program = torch.onnx.export(
            classifier.eval(),
            (chips,),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            input_names=["chips"],
            output_names=["logits"],
            verbose=False,
        )
    with written_whole(path) as part:
        program.save(part)
    return Path(path)
