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
        share: of heads and of units, rounded down, but at least one of each.

    Raises:
        Unavailable: other kinds, or one head only.
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
        if attention.num_heads < 2:
            raise Unavailable("no heads can be removed from blocks with one head")
        _remove_heads(attention, share)
        _remove_units(mlp, share)
    return pruned.eval()


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


def _remove_heads(attention: nn.Module, share: float) -> None:
    width = attention.head_dim
    written = attention.qkv.weight.unflatten(0, (3, -1, width)).square().sum(dim=(0, 2, 3))
    read = attention.proj.weight.unflatten(1, (-1, width)).square().sum(dim=(0, 2))
    heads = _strongest(written * read, share)
    columns = (heads[:, None] * width + torch.arange(width)).flatten()
    attention.qkv = _rows(attention.qkv, columns, 3)
    attention.proj = _columns(attention.proj, columns)
    attention.num_heads, attention.attn_dim = len(heads), len(columns)


def _remove_units(mlp: nn.Module, share: float) -> None:
    writers = [name for name in ("fc1", "fc1_g", "fc1_x") if hasattr(mlp, name)]
    units = mlp.fc2.in_features
    strength = mlp.fc2.weight.square().sum(dim=0)
    for name in writers:
        layers = getattr(mlp, name).weight.unflatten(0, (-1, units))  # a packed gate makes two
        strength = strength * layers.square().sum(dim=2).prod(dim=0)
    strongest = _strongest(strength, share)
    for name in writers:
        layer = getattr(mlp, name)
        setattr(mlp, name, _rows(layer, strongest, layer.out_features // units))
    mlp.fc2 = _columns(mlp.fc2, strongest)


def _strongest(strength: Tensor, share: float) -> Tensor:
    keep = len(strength) - max(1, int(share * len(strength)))
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
