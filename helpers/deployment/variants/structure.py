"""A classifier without its weakest heads and MLP units."""

import copy

import torch
from timm.layers import Attention, AttentionRope, GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from helpers.models.classifier import Classifier


class Unavailable(Exception):
    """This machine, model or installation cannot give a variant; the message is the reason."""


def remove_heads_and_units(classifier: Classifier, share: float) -> Classifier:
    """A copy without the weakest heads and MLP units of every block.

    A head is as strong as the columns of `proj` that read it times the rows of `qkv` that write
    it, a unit as the column of `fc2` times the rows that write it, of gated MLPs both the gate's
    and the value's (L2 norms). Every block loses the same number, so that all stay alike.

    Args:
        classifier: any whose attention and MLPs are of kinds whose parts stand side by side.
        share: of the parameters of heads and units. That share of the heads goes, rounded down,
            and as many units as make up the rest.

    Raises:
        Unavailable: other kinds.
    """
    if getattr(classifier.backbone, "rope_mixed", False):
        raise Unavailable("no heads can be removed where each has a rotary embedding of its own")
    pruned = copy.deepcopy(classifier)
    for block in pruned.backbone.blocks:
        attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        _check(attention, _ATTENTION)
        _check(mlp, _MLPS)
        if attention.qkv is None or attention.gate is not None:
            raise Unavailable("no heads can be removed where qkv is not one layer, or gated")
        heads, units = attention.num_heads, mlp.fc2.in_features
        of_head, of_unit = _head_parameters(attention), _unit_parameters(mlp)
        gone_heads = int(share * heads + 1e-9)
        rest = share * (heads * of_head + units * of_unit) - gone_heads * of_head
        _remove_heads(attention, heads - gone_heads)
        _remove_units(mlp, units - round(rest / of_unit))
    return pruned.eval()


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


def _writers(mlp: nn.Module) -> list[str]:
    return [name for name in ("fc1", "fc1_g", "fc1_x") if hasattr(mlp, name)]


def _head_parameters(attention: nn.Module) -> int:
    """Of one head: its rows of `qkv` and its columns of `proj`."""
    width, qkv = attention.head_dim, attention.qkv
    row = qkv.in_features + (qkv.bias is not None)
    return width * (3 * row + attention.proj.out_features)


def _unit_parameters(mlp: nn.Module) -> int:
    """Of one unit: the rows that write it and its column of `fc2`."""
    writers = [getattr(mlp, name) for name in _writers(mlp)]
    written = sum(
        layer.out_features // mlp.fc2.in_features * (layer.in_features + (layer.bias is not None))
        for layer in writers
    )
    return written + mlp.fc2.out_features


def _remove_heads(attention: nn.Module, keep: int) -> None:
    width = attention.head_dim
    written = attention.qkv.weight.unflatten(0, (3, -1, width)).square().sum(dim=(0, 2, 3))
    read = attention.proj.weight.unflatten(1, (-1, width)).square().sum(dim=(0, 2))
    heads = _strongest(written * read, keep)
    columns = (heads[:, None] * width + torch.arange(width)).flatten()
    attention.qkv = _rows(attention.qkv, columns, 3)
    attention.proj = _columns(attention.proj, columns)
    attention.num_heads, attention.attn_dim = len(heads), len(columns)


def _remove_units(mlp: nn.Module, keep: int) -> None:
    units = mlp.fc2.in_features
    strength = mlp.fc2.weight.square().sum(dim=0)
    for name in _writers(mlp):
        layers = getattr(mlp, name).weight.unflatten(0, (-1, units))  # a packed gate makes two
        strength = strength * layers.square().sum(dim=2).prod(dim=0)
    strongest = _strongest(strength, keep)
    for name in _writers(mlp):
        layer = getattr(mlp, name)
        setattr(mlp, name, _rows(layer, strongest, layer.out_features // units))
    mlp.fc2 = _columns(mlp.fc2, strongest)


def _strongest(strength: Tensor, keep: int) -> Tensor:
    return strength.topk(keep).indices.sort().values


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
