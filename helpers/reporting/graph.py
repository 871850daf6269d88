"""The exported graph as a block diagram."""

import ast
import itertools
import re
from pathlib import Path

import onnx
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from helpers.reporting.plots import PAGE, PALETTE

_REST = re.compile(r"blocks\.(?!0\b)\d+")  # every transformer block but the first


def onnx_modules(path: str | Path) -> list[tuple[str, str]]:
    """Read the modules of an exported classifier and their ONNX operators, in execution order.

    A module is a dotted path, `forward` for the classifier's own code; of the transformer blocks,
    which are alike, the first alone is listed.
    """
    visits = []
    for node in onnx.load(path, load_external_data=False).graph.node:
        metadata = {entry.key: entry.value for entry in node.metadata_props}
        scopes = ast.literal_eval(metadata["pkg.torch.onnx.name_scopes"])[:-1]
        named = scopes and scopes[-1] and not scopes[-1].startswith("_")
        visits.append((scopes[-1] if named else "forward", node.op_type))
    return [
        (module, ", ".join(dict.fromkeys(operator for _, operator in nodes)))
        for module, nodes in itertools.groupby(visits, key=lambda visit: visit[0])
        if not _REST.search(module)
    ]


def onnx_diagram(modules: list[tuple[str, str]], title: str) -> Figure:
    """Block diagram of `onnx_modules`, top to bottom; modules of the first block are coloured."""
    figure, axis = plt.subplots(figsize=(PAGE, 0.5 * len(modules) + 0.5))
    axis.set(xlim=(0, 1), ylim=(-len(modules), 1))
    axis.set_axis_off()
    for row, (module, operators) in enumerate(modules):
        colour = PALETTE[1] if "blocks.0" in module else PALETTE[0]
        box = {"boxstyle": "round", "facecolor": (*colour, 0.15), "edgecolor": colour}
        axis.text(0.5, -row, f"{module}: {operators}", ha="center", fontsize=8, bbox=box)
        if row:
            arrow = {"arrowstyle": "->", "color": "0.3"}
            axis.annotate("", (0.5, 0.25 - row), (0.5, 0.75 - row), arrowprops=arrow)
    axis.set_title(title)
    return figure
