"""What the tests of variants share: a small classifier and what its forms are made of."""

import numpy as np
import torch

from helpers.deployment.variants import build
from helpers.deployment.variants.source import Source
from helpers.models.classifier import ClassifierConfig
from tests.fake_weights import lively_classifier

SIZE = 28  # pixels: two by two patches


def make_classifier(seed=0, **options):
    config = ClassifierConfig("tiny", "random", SIZE, (0, 1, 2), ("no_tree", "tree"), **options)
    return lively_classifier(config, seed)


def make_source(folder, **options):
    rng = np.random.default_rng(0)
    chips = torch.from_numpy(rng.integers(0, 256, (24, 3, SIZE, SIZE), dtype=np.uint8))
    targets = torch.arange(24) % 2
    examples = (chips, targets)
    given = {"classifier": make_classifier(), "recovery_epochs": 1, "folder": folder}
    return Source(train=examples, valid=examples, calibration=chips, **given | options)


# Reference models of every kind of attention and MLP: plain, gated in one layer or in two, rotary,
# with a bias on qkv and without. (DINOv3's blocks are the same for satellite images.)
KINDS = ("dinov2", "dinov2_reg4", "giant", "dinov3", "plus", "7b", "timm")


def listed(source, *names):
    """Build variants of which none may run; return the reasons."""
    variants, predicts, table = build.build_variants(source, names, 1)
    assert variants == predicts == {}
    return table.unavailable
