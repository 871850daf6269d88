"""A classifier without some of its heads and MLP units."""

import copy

import torch
from timm.layers import Attention, AttentionRope, GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from helpers.models.classifier import Classifier


class Unavailable(Exception):
    """This machine, model or installation cannot give a variant; the message is the reason."""


Importance = list[tuple[Tensor, Tensor]]
"""Of every block: of its heads (heads,) and of its MLP units (units,). See `importance.py`."""


def remove_heads_and_units(
    classifier: Classifier, share: float, importance: Importance
) -> Classifier:
    """A copy without the least important heads and MLP units of every block.

    Every block loses the same number, so that all stay alike.

    Args:
        classifier: any that `attention_and_mlp` takes.
        share: of the parameters of heads and units. That share of the heads goes, rounded down,
            and as many units as make up the rest.
        importance: of the heads and units.
    """
    pruned = copy.deepcopy(classifier)
    blocks = attention_and_mlp(pruned)
    for (attention, mlp), (of_heads, of_units) in zip(blocks, importance, strict=True):
        heads, units = attention.num_heads, mlp.fc2.in_features
        of_head, of_unit = _head_parameters(attention), _unit_parameters(mlp)
        gone_heads = int(share * heads + 1e-9)
        rest = share * (heads * of_head + units * of_unit) - gone_heads * of_head
        _keep_heads(attention, _largest(of_heads, heads - gone_heads))
        _keep_units(mlp, _largest(of_units, units - round(rest / of_unit)))
    return pruned.eval()


def attention_and_mlp(classifier: Classifier) -> list[tuple[nn.Module, nn.Module]]:
    """Attention and MLP of every block.

    Raises:
        Unavailable: they are not of kinds whose heads and units stand side by side.
    """
    if getattr(classifier.backbone, "rope_mixed", False):
        raise Unavailable("no heads can be removed where each has a rotary embedding of its own")
    blocks = classifier.backbone.blocks
    found = [(getattr(block, "attn", None), getattr(block, "mlp", None)) for block in blocks]
    for attention, mlp in found:
        _check(attention, _ATTENTION)
        _check(mlp, _MLPS)
        if attention.qkv is None or attention.gate is not None:
            raise Unavailable("no heads can be removed where qkv is not one layer, or gated")
    return found


def described(before: Classifier, after: Classifier) -> str:
    """What was removed from every block, in words."""
    before, after = before.backbone.blocks[0], after.backbone.blocks[0]
    heads, units = before.attn.num_heads, before.mlp.fc2.in_features
    return (
        f"{heads - after.attn.num_heads} of {heads} heads and "
        f"{units - after.mlp.fc2.in_features} of {units} MLP units of every block removed"
    )


_ATTENTION = (Attention, AttentionRope)
_MLPS = (Mlp, GluMlp, SwiGLU)


def _check(part: nn.Module, kinds: tuple[type, ...]) -> None:
    if type(part) not in kinds:
        raise Unavailable(
            f"heads and units can be removed from {' and '.join(k.__name__ for k in kinds)}, "
            f"not from {type(part).__name__}"
        )
    if not isinstance(part.norm, nn.Identity):
        raise Unavailable("no heads or units can be removed where a norm is taken over all of them")


def writers(mlp: nn.Module) -> dict[str, nn.Linear]:
    """The layers that write an MLP's units; of gated MLPs the gate's is one of them."""
    return {name: getattr(mlp, name) for name in ("fc1", "fc1_g", "fc1_x") if hasattr(mlp, name)}


def _head_parameters(attention: nn.Module) -> int:
    """Of one head: its rows of `qkv` and its columns of `proj`."""
    width, qkv = attention.head_dim, attention.qkv
    row = qkv.in_features + (qkv.bias is not None)
    return width * (3 * row + attention.proj.out_features)


def _unit_parameters(mlp: nn.Module) -> int:
    """Of one unit: the rows that write it and its column of `fc2`."""
    written = sum(
        layer.out_features // mlp.fc2.in_features * (layer.in_features + (layer.bias is not None))
        for layer in writers(mlp).values()
    )
    return written + mlp.fc2.out_features


def _keep_heads(attention: nn.Module, heads: Tensor) -> None:
    width = attention.head_dim
    columns = (heads[:, None] * width + torch.arange(width)).flatten()
    attention.qkv = _rows(attention.qkv, columns, 3)
    attention.proj = _columns(attention.proj, columns)
    attention.num_heads, attention.attn_dim = len(heads), len(columns)


def _keep_units(mlp: nn.Module, units: Tensor) -> None:
    for name, layer in writers(mlp).items():
        layers = layer.out_features // mlp.fc2.in_features  # a packed gate makes two
        setattr(mlp, name, _rows(layer, units, layers))
    mlp.fc2 = _columns(mlp.fc2, units)


def _largest(importance: Tensor, keep: int) -> Tensor:
    return importance.topk(keep).indices.sort().values


def _rows(layer: nn.Linear, rows: Tensor, layers: int) -> nn.Linear:
    """The same rows of each of the layers that are stacked in one."""
    starts = torch.arange(layers) * (layer.out_features // layers)
    rows = (starts[:, None] + rows).flatten()
    return _linear(layer.weight[rows], None if layer.bias is None else layer.bias[rows])


def _columns(layer: nn.Linear, columns: Tensor) -> nn.Linear:
    return _linear(layer.weight[:, columns], layer.bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight.detach())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer
