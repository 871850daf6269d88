"""Linear heads on frozen features: a sweep of them trains in one go."""

import itertools
import time

import pandas as pd
import torch
from torch import Tensor, nn

from helpers.data.dataset import ChipData
from helpers.models.classifier import HEAD_INPUTS, Classifier, head_columns
from helpers.training.config import RunConfig
from helpers.training.features import Features, extract_features
from helpers.training.loop import fit
from helpers.training.processes import torch_threads
from helpers.training.progress import Progress
from helpers.training.setup import fit_settings, tracked_accelerator


class HeadSweep(nn.Module):
    """Linear heads side by side on one feature matrix: every combination of a sweep."""

    def __init__(self, candidates: pd.DataFrame, width: int, classes: int):
        """One head per row of candidates (head_input, sorted by it), width of the backbone."""
        super().__init__()
        self.inputs = candidates.head_input.tolist()
        self.heads = nn.ModuleList(
            nn.Linear(width * HEAD_INPUTS[name], classes) for name in self.inputs
        )
        # From zero, so that a head starts alike alone and in any sweep; its loss is convex.
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, 5 * width) -> logits (heads, N, classes)."""
        logits = []
        # Heads with the same input share one matrix product.
        for name, group in itertools.groupby(
            zip(self.inputs, self.heads, strict=True), lambda p: p[0]
        ):
            heads = [head for _, head in group]
            weight = torch.cat([head.weight for head in heads])
            bias = torch.cat([head.bias for head in heads])
            product = nn.functional.linear(head_columns(features, name), weight, bias)
            logits.append(product.unflatten(1, (len(heads), -1)).transpose(0, 1))
        return torch.cat(logits)


def sweep(config: RunConfig) -> pd.DataFrame:
    """All candidates of a head-only run: head_input, learning_rate, weight_decay."""
    rows = itertools.product(config.head_inputs, config.learning_rates, config.weight_decays)
    return pd.DataFrame(rows, columns=["head_input", "learning_rate", "weight_decay"])


def fit_heads(
    config: RunConfig, train: Features, valid: Features, classes: int, report=print
) -> tuple[HeadSweep, Progress]:
    """Train every head of the sweep on cached features in one go."""
    candidates = sweep(config)
    heads = HeadSweep(candidates, train.values.shape[-1] // 5, classes)
    heads.to(config.torch_device)
    groups = [
        {
            "params": list(head.parameters()),
            "lr": row.learning_rate,
            "weight_decay": row.weight_decay,
        }
        for head, row in zip(heads.heads, candidates.itertuples(), strict=True)
    ]
    # Heads are too small to share: threads would spend more time waiting than computing.
    with torch_threads(1), tracked_accelerator(config) as accelerator:
        progress = fit(
            heads,
            groups,
            train,
            valid,
            fit_settings(config, train.targets),
            accelerator=accelerator,
            report=report,
        )
    return heads, progress


def caching_benefit(config: RunConfig, data: ChipData, classifier: Classifier) -> pd.DataFrame:
    """Measure what caching buys: one pass of the frozen backbone against epochs of one head.

    Measured without reading the cache; only `uncached` is computed from the other two.

    Returns:
        One column, `seconds`; rows `forward` (decoding and forward pass over the training and
        validation images), `heads` (config.epochs epochs of one head on those features), `cached`
        (both together) and `uncached` (a forward pass in every epoch).
    """
    train, valid = (
        extract_features(
            classifier, data.dataset(split, config.image_size), device=config.torch_device
        )
        for split in ("train", "valid")
    )
    one_head = config.model_copy(
        update={
            "head_inputs": config.head_inputs[:1],
            "learning_rates": config.learning_rates[:1],
            "weight_decays": config.weight_decays[:1],
            "patience": config.epochs,
        }
    )
    start = time.perf_counter()
    fit_heads(one_head, train, valid, len(data.classes), report=lambda line: None)
    heads = time.perf_counter() - start
    forward = train.seconds + valid.seconds
    seconds = {
        "forward": forward,
        "heads": heads,
        "cached": forward + heads,
        "uncached": config.epochs * forward + heads,
    }
    return pd.DataFrame({"seconds": seconds})
