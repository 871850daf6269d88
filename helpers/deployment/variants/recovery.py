"""What structured pruning lost, won back from the classifier itself by distillation."""

import copy

import torch
from torch import Tensor
from torch.nn import functional

from helpers.console import progress_bar
from helpers.deployment.variants.source import Removal, Source
from helpers.models.classifier import Classifier
from helpers.training.examples import ChipExamples
from helpers.training.loop import FitSettings, fit
from helpers.training.processes import fresh_accelerator
from helpers.training.validation import candidate_losses

_LEARNING_RATE = 1e-4
_BATCH = 32


def recovered(source: Source, removal: Removal) -> Classifier:
    """The structurally pruned classifier, taught by the whole one; made once for all variants.

    Its loss is the cross entropy to the labels, the Kullback-Leibler divergence from the
    classifier's probabilities to its own, and the squared difference of the tokens that the last
    norm leaves, relative to their size. The classifier answers every training chip once.
    """
    return source.once(f"{removal.name}_recovered", lambda: _distilled(source, removal))


def _distilled(source: Source, removal: Removal) -> Classifier:
    model = copy.deepcopy(source.structured(removal))
    logits, tokens = source.once("taught", lambda: _taught(source))

    def losses(model, chips: Tensor, targets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        own_logits, own_tokens = logits_and_tokens(model, chips)
        wanted = logits[rows].to(chips.device).log_softmax(dim=1)
        found = own_logits.log_softmax(dim=1)
        divergence = functional.kl_div(found, wanted, reduction="none", log_target=True).sum(dim=1)
        teacher = tokens[rows].to(chips.device).float()
        apart = (own_tokens - teacher).square().mean(dim=(1, 2)) / teacher.square().mean()
        by_label = candidate_losses(own_logits[None], targets)
        return own_logits[None], by_label + divergence + apart

    group = {"params": list(model.parameters()), "lr": _LEARNING_RATE, "weight_decay": 0.0}
    fit(
        model,
        [group],
        ChipExamples(*source.train),
        ChipExamples(*source.valid),
        FitSettings(source.recovery_epochs, source.recovery_epochs, _BATCH, seed=source.seed),
        accelerator=fresh_accelerator(source.device),
        report=lambda line: None,
        losses=losses,
    )
    return model.cpu().eval()


def logits_and_tokens(classifier: Classifier, chips: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, classes), and the tokens (N, T, width) that the norm after the last block leaves.

    Where the head reads earlier blocks too, that norm is called for each, the last block's at last.
    """
    normalised: list[Tensor] = []
    norm = classifier.backbone.norm
    handle = norm.register_forward_hook(lambda module, given, found: normalised.append(found))
    try:
        logits = classifier(chips)
    finally:
        handle.remove()
    return logits, normalised[-1]


@torch.no_grad()
def _taught(source: Source) -> tuple[Tensor, Tensor]:
    """Of every training chip the classifier's logits, and its tokens in half precision.

    The tokens lie in a file without a name: its pages leave memory when others need it.
    """
    model = copy.deepcopy(source.classifier).to(source.device)
    chips = source.train[0]
    first = logits_and_tokens(model, chips[:1].to(source.device))[1]
    shape = (len(chips), *first.shape[1:])
    path = source.folder / "taught_tokens"
    size = len(chips) * first.numel()
    tokens = torch.from_file(str(path), shared=True, size=size, dtype=torch.float16).view(shape)
    path.unlink()
    logits = torch.empty(len(chips), source.classifier.linear_head.out_features)
    rows = torch.arange(len(chips)).split(_BATCH)
    for batch in progress_bar(rows, desc="asking the classifier"):
        logits[batch], tokens[batch] = (
            part.cpu().to(kept.dtype)
            for part, kept in zip(
                logits_and_tokens(model, chips[batch].to(source.device)),
                (logits, tokens),
                strict=True,
            )
        )
    return logits, tokens
