"""How much a classifier would miss each of its heads and MLP units: two answers to compare."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from helpers.console import progress_bar
from helpers.deployment.variants.structure import Importance, attention_and_mlp, writers
from helpers.models.classifier import Classifier

_BATCH = 32


def weight_norms(classifier: Classifier) -> Importance:
    """As the weights say.

    A head is as strong as the columns of `proj` that read it times the rows of `qkv` that write it,
    a unit as the column of `fc2` times the rows that write it, of gated MLPs both the gate's and
    the value's (squared L2 norms).

    Raises:
        Unavailable: see `attention_and_mlp`.
    """
    blocks = attention_and_mlp(classifier)
    return [(_of_heads(attention), _of_units(mlp)) for attention, mlp in blocks]


@torch.no_grad()
def _of_heads(attention: nn.Module) -> Tensor:
    width = attention.head_dim
    written = attention.qkv.weight.unflatten(0, (3, -1, width)).square().sum(dim=(0, 2, 3))
    return written * attention.proj.weight.unflatten(1, (-1, width)).square().sum(dim=(0, 2))


@torch.no_grad()
def _of_units(mlp: nn.Module) -> Tensor:
    strength = mlp.fc2.weight.square().sum(dim=0)
    for layer in writers(mlp).values():
        layers = layer.weight.unflatten(0, (-1, mlp.fc2.in_features))
        strength = strength * layers.square().sum(dim=2).prod(dim=0)  # a packed gate makes two
    return strength


def taylor_terms(
    classifier: Classifier, chips: Tensor, targets: Tensor, device: str = "cpu"
) -> Importance:
    """As the loss says: its first-order Taylor term (Molchanov et al. 2019, arXiv:1906.10771).

    To first order, a chip's cross entropy falls without a head or unit by what that one puts out
    times the gradient there, summed over the tokens. Squared, and averaged over the chips.

    Args:
        classifier: fp32.
        chips: (N, bands, S, S) to take the loss of.
        targets: their classes (N,).
        device: where to compute.

    Raises:
        Unavailable: see `attention_and_mlp`.
    """
    model = copy.deepcopy(classifier).to(device).requires_grad_()
    readers = [
        reader
        for attention, mlp in attention_and_mlp(model)
        for reader in ((attention.proj, attention.num_heads), (mlp.fc2, mlp.fc2.in_features))
    ]
    values: dict[nn.Module, Tensor] = {}
    for layer, _ in readers:
        layer.register_forward_pre_hook(lambda layer, given: values.update({layer: given[0]}))
    terms = [torch.zeros(parts, device=device) for _, parts in readers]
    for rows in progress_bar(torch.arange(len(chips)).split(_BATCH), desc="asking the loss"):
        logits = model(chips[rows].to(device))
        loss = functional.cross_entropy(logits, targets[rows].to(device), reduction="sum")
        read = [values[layer] for layer, _ in readers]
        for term, value, gradient in zip(terms, read, torch.autograd.grad(loss, read), strict=True):
            changes = (value.detach() * gradient).sum(dim=1)
            changes = changes.unflatten(1, (len(term), -1)).sum(dim=2)
            term += changes.square().sum(dim=0) / len(chips)
    terms = [term.cpu() for term in terms]
    return list(zip(terms[::2], terms[1::2], strict=True))
