"""What a classifier sees: its answers, what they rest on, its features and its weights."""

import itertools

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn import functional

from helpers.models.classifier import Classifier
from helpers.training.features import evaluated_on

_SQUARES = 8  # covered places along a side, at most: a larger grid has squares of several patches


def answered(predictions: pd.DataFrame) -> pd.DataFrame:
    """Predictions with `predicted_label` and its probability, `confidence`."""
    probabilities = predictions.filter(regex="^p_")
    names = probabilities.columns.str.removeprefix("p_")
    return predictions.assign(
        confidence=probabilities.max(axis=1), predicted_label=names[predictions.predicted]
    )


def sample_answers(predictions: pd.DataFrame, count: int) -> pd.DataFrame:
    """`answered` of some chips, evenly spaced over the table, right or wrong."""
    rows = np.linspace(0, len(predictions) - 1, min(count, len(predictions))).round().astype(int)
    return answered(predictions).iloc[rows]


def confident_errors(predictions: pd.DataFrame, count: int) -> pd.DataFrame:
    """`answered` of the wrong predictions with the highest probability, highest first."""
    return answered(predictions).query("predicted != target").nlargest(count, "confidence")


@torch.inference_mode()
def occlusion_map(classifier: Classifier, chip: Tensor, device: str = "cpu") -> np.ndarray:
    """How much the answer rests on each part of a chip (Zeiler and Fergus 2014, arXiv:1311.2901).

    A square of one patch in the colour that normalisation maps to zero covers one place of the
    chip (bands, S, S) after the other. Returns by how much the probability of the predicted class
    falls with that place covered, (n, n). The classifier is back where it was afterwards.
    """
    embedding = classifier.backbone.patch_embed
    side = embedding.patch_size[0] * -(-embedding.grid_size[0] // _SQUARES)
    starts = range(0, chip.shape[-1], side)
    with evaluated_on(classifier, device):
        chips = chip.to(device).float().repeat(1 + len(starts) ** 2, 1, 1, 1)
        for covered, (top, left) in zip(chips[1:], itertools.product(starts, starts), strict=True):
            covered[:, top : top + side, left : left + side] = classifier.mean
        seen, *hidden = classifier(chips).softmax(dim=1).cpu().numpy()
    drops = seen.max() - np.stack(hidden)[:, seen.argmax()]
    return drops.reshape(len(starts), len(starts))


def feature_components(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First two principal components (N, 2) of features (N, F), and their shares of variance."""
    pca = PCA(2, random_state=0)
    return pca.fit_transform(features), pca.explained_variance_ratio_


@torch.inference_mode()
def token_components(classifier: Classifier, chips: Tensor, device: str = "cpu") -> np.ndarray:
    """First three principal components of all patch tokens, as colours (N, S, S, 3) in 0..1.

    The picture that DINOv2 is known for (Oquab et al. 2023, figure 1), here with one common PCA
    over all chips, so that equal colours mean similar tokens. The mean token of each position is
    taken off first: it says where a patch lies in the chip, not what it shows. Of chips (N, bands,
    S, S); the head is not used, and the classifier is back where it was afterwards.
    """
    with evaluated_on(classifier, device):
        tokens = classifier.backbone.forward_features(classifier.normalize(chips.to(device)))
    patches = tokens[:, classifier.backbone.num_prefix_tokens :].cpu()
    side = classifier.backbone.patch_embed.grid_size[0]
    patches = patches - patches.mean(dim=0)
    components = PCA(3, random_state=0).fit_transform(patches.flatten(0, 1).numpy())
    low, high = np.percentile(components, [1, 99], axis=0)
    colours = torch.from_numpy(((components - low) / (high - low)).clip(0, 1))
    maps = colours.view(len(chips), side, side, 3).permute(0, 3, 1, 2)
    large = functional.interpolate(maps, size=chips.shape[-1], mode="bicubic").clamp(0, 1)
    return large.permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def weight_changes(before: Classifier, after: Classifier) -> pd.DataFrame:
    """How far training moved each linear layer of the blocks.

    Returns:
        `block` (index), `layer` (such as attn.qkv) and `relative_change`: the Frobenius norm of
        the difference over that of the weight before; for a merged LoRA that is |B A| alpha / r
        over |W|.
    """
    rows = []
    for block, (old, new) in enumerate(
        zip(before.backbone.blocks, after.backbone.blocks, strict=True)
    ):
        modules = dict(new.named_modules())
        for name, module in old.named_modules():
            if isinstance(module, nn.Linear):
                difference = modules[name].weight.to(module.weight.device) - module.weight
                change = float(difference.norm() / module.weight.norm())
                rows.append({"block": block, "layer": name, "relative_change": change})
    return pd.DataFrame(rows)
