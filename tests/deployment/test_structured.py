"""Fewer heads and units: what is removed, what is left, and how it is taught again."""

import numpy as np
import pytest
import torch

from helpers.deployment import runtimes
from helpers.deployment.variants import recovery, structure
from helpers.deployment.variants.source import STRUCTURED
from helpers.models.architectures import architecture
from helpers.models.classifier import ClassifierConfig, create_classifier
from tests.deployment.common import KINDS, listed, make_classifier, make_source
from tests.fake_weights import tiny  # noqa: F401  a fixture
from tests.models.common import CLASSES, RGB, random_chips
from tests.models.parity import tiny_architectures, tiny_classifier

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.mark.parametrize("kind", KINDS)
def test_removing_heads_and_units_that_do_nothing_changes_nothing(kind, tmp_path):
    """The weakest half is found wherever it is, and the rest is put together and served rightly."""
    classifier = tiny_classifier(None, kind)
    with torch.no_grad():
        for i, block in enumerate(classifier.backbone.blocks):
            head, width = i % 2, block.attn.head_dim
            block.attn.proj.weight[:, head * width : (head + 1) * width] = 0
            block.mlp.fc2.weight[:, i % 2 :: 2] = 0
    pruned = structure.remove_heads_and_units(classifier, 1 / 2)
    chips = random_chips(4, size=classifier.config.image_size)
    source = make_source(tmp_path, classifier=classifier)
    with torch.inference_mode():
        expected = classifier(chips)
        torch.testing.assert_close(pruned(chips), expected, atol=1e-5, rtol=1e-4)
    with tiny_architectures():
        predict = runtimes.load(source.torch_variant("narrow", "", pruned), threads=1)
        np.testing.assert_allclose(predict(chips.numpy()), expected, atol=1e-5, rtol=1e-4)
    before, after = classifier.backbone.blocks[0], pruned.backbone.blocks[0]
    assert after.attn.num_heads == before.attn.num_heads // 2 == 1  # a copy was pruned
    assert after.mlp.fc2.in_features == before.mlp.fc2.in_features // 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("timm:eva_giant_patch14_clip_224", "not from EvaAttention"),
        ("timm:eva02_base_patch16_clip_224", "not from EvaAttention"),
        ("timm:vit_small_patch16_rope_mixed_224", "a rotary embedding of its own"),
    ],
)
def test_blocks_whose_heads_cannot_be_removed_are_a_row_with_the_reason(tmp_path, name, reason):
    with tiny_architectures(depth=4):
        config = ClassifierConfig(name, "random", 2 * architecture(name).patch, RGB, CLASSES)
        source = make_source(tmp_path, classifier=create_classifier(config).eval())
        assert reason in listed(source, "structured_40")[0]


@pytest.mark.parametrize("percent", STRUCTURED)
def test_structured_pruning_removes_its_share_of_heads_and_units(percent):
    classifier = make_classifier()
    pruned = structure.remove_heads_and_units(classifier, percent / 100)
    removable, gone = (
        sum(
            layer.weight.numel() + (layer.out_features if path.endswith(("qkv", "fc1")) else 0)
            for path, layer in runtimes.block_layers(model.backbone).items()
        )
        for model in (classifier, pruned)
    )
    assert 1 - gone / removable == pytest.approx(percent / 100, abs=1e-3)
    heads = [block.attn.num_heads for block in pruned.backbone.blocks]
    assert heads == [3 - int(3 * percent / 100)] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_input", ["cls+mean", "4xcls+mean"])
def test_what_a_recovery_learns_from_are_the_logits_and_the_last_tokens(kind, head_input):
    classifier = tiny_classifier(None, kind, head_input=head_input)
    chips = random_chips(2, size=classifier.config.image_size)
    depth = len(classifier.backbone.blocks)
    with torch.inference_mode():
        logits, tokens = recovery.logits_and_tokens(classifier, chips)
        expected = classifier.backbone.norm(classifier.tokens(chips, depth))
        torch.testing.assert_close(logits, classifier(chips))
        torch.testing.assert_close(tokens, expected)
    assert not classifier.backbone.norm._forward_hooks


def test_a_recovered_classifier_is_nearer_to_what_taught_it(tmp_path):
    source = make_source(tmp_path, recovery_epochs=20)
    model, chips = recovery.recovered(source, 40), source.train[0]
    assert recovery.recovered(source, 40) is model, "made once for all that are built of it"

    def apart(classifier):
        with torch.inference_mode():
            (logits, tokens), (wanted, taught) = (
                recovery.logits_and_tokens(c, chips) for c in (classifier, source.classifier)
            )
        return (logits - wanted).abs().mean(), (tokens - taught).square().mean()

    before, after = apart(source.structured(40)), apart(model)
    assert after[1] < 0.8 * before[1]
    assert not list(tmp_path.glob("taught*")), "nothing stays on disk"
