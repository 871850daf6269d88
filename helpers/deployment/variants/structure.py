"""A classifier without its weakest heads and MLP units."""

import copy

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from helpers.models.classifier import Classifier


class Unavailable(Exception):
    """This machine, model or installation cannot give a variant; the message is the reason."""


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
