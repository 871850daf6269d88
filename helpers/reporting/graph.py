"""The exported graph as a block diagram."""

import ast
from pathlib import Path

import onnx
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from helpers.reporting.plots import PAGE, PALETTE

# ONNX operators that move or reshape data without computing.
_LAYOUT = {"Concat", "Expand", "Gather", "Reshape", "Shape", "Slice", "Squeeze", "Transpose"}


def onnx_layers(path: str | Path) -> pd.DataFrame:
    """Read an exported classifier's graph as one row per visit of a module, in execution order.

    Returns:
        Columns `module` (dotted path, `forward` for the classifier's own code), `block` (index of
        the transformer block or -1), `operators` (ONNX types that compute), `layout_operators`
        (how many only move data) and `output` (shape of the last output).
    """
    graph = onnx.load(path, load_external_data=False).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in [*graph.value_info, *graph.output]
    }
    rows: list[dict] = []
    for node in graph.node:
        module = _module_of(node)
        if not rows or rows[-1]["module"] != module:
            rows.append({"module": module, "operators": [], "layout_operators": 0})
        if node.op_type in _LAYOUT:
            rows[-1]["layout_operators"] += 1
        else:
            rows[-1]["operators"].append(node.op_type)
        rows[-1]["output"] = " x ".join(map(str, shapes.get(node.output[0], [])))
    table = pd.DataFrame(rows)
    table["operators"] = table.operators.map(", ".join)
    blocks = table.module.str.extract(r"blocks\.(\d+)")[0]
    return table.assign(block=blocks.fillna(-1).astype(int))


def _module_of(node: onnx.NodeProto) -> str:
    """The module that a node was exported from, out of the exporter's metadata."""
    metadata = {entry.key: entry.value for entry in node.metadata_props}
    *scopes, _operation = ast.literal_eval(metadata["pkg.torch.onnx.name_scopes"])
    return scopes[-1] if scopes and not scopes[-1].startswith("_") and scopes[-1] else "forward"


def onnx_diagram(layers: pd.DataFrame, title: str) -> Figure:
    """Block diagram of `onnx_layers`: the whole path left, one transformer block right.

    Raises:
        ValueError: the blocks are not alike, so that one cannot stand for all.
    """
    of_block = {
        block: rows.assign(module=rows.module.str.split(".").str[3:].str.join("."))
        for block, rows in layers[layers.block >= 0].groupby("block")
    }
    kinds = {tuple(rows.module + rows.operators) for rows in of_block.values()}
    if len(kinds) != 1:
        raise ValueError("the transformer blocks of the graph differ")
    first = layers.index[layers.block >= 0][0]
    stack = pd.DataFrame(
        {
            "module": [f"backbone.blocks: {len(of_block)} alike, see right"],
            "operators": [""],
            "layout_operators": [0],
            "output": [layers.output[layers.block >= 0].iloc[-1]],
        }
    )
    outside = layers[layers.block < 0]
    path = pd.concat([outside[outside.index < first], stack, outside[outside.index > first]])
    block = of_block[0].assign(module=of_block[0].module.replace("", "residual sum"))
    figure, axes = plt.subplots(1, 2, figsize=(PAGE, 0.62 * max(len(path), len(block)) + 0.6))
    _boxes(axes[0], path, "the whole path", PALETTE[0], len(block))
    _boxes(axes[1], block, "one transformer block", PALETTE[1], len(block))
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    return figure


def _boxes(axis, rows: pd.DataFrame, title: str, colour, height: int) -> None:
    """A column of boxes joined by arrows: module, operators, output shape."""
    axis.set(xlim=(0, 10), ylim=(-max(height, len(rows)) + 0.3, 0.8))
    axis.set_axis_off()
    axis.set_title(title, loc="left")
    for i, row in enumerate(rows.itertuples()):
        axis.add_patch(
            FancyBboxPatch(
                (0.2, -i - 0.3), 9.6, 0.68, boxstyle="round,pad=0.02", facecolor=(*colour, 0.15),
                edgecolor=colour,
            )
        )  # fmt: skip
        layout = f"+ {row.layout_operators} layout" if row.layout_operators else ""
        axis.text(0.4, -i + 0.19, row.module, fontsize=8.5, va="center", weight="bold")
        axis.text(9.6, -i + 0.19, row.output, fontsize=8, va="center", ha="right")
        axis.text(0.4, -i - 0.12, f"{row.operators} {layout}".strip(), fontsize=8, va="center")
        if i:
            axis.annotate(
                "", (5, -i + 0.38), (5, -i + 0.7), arrowprops={"arrowstyle": "->", "color": "0.3"}
            )
