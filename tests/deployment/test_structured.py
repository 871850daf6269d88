"""Fewer heads and units: what is removed, what is left, and how it is taught again."""

import numpy as np
import pytest
import torch

from helpers.deployment import runtimes
from helpers.deployment.variants import importance, recovery, structure
from helpers.deployment.variants.source import STRUCTURED, Removal
from helpers.models.architectures import architecture
from helpers.models.classifier import ClassifierConfig, create_classifier
from tests.deployment.common import KINDS, listed, make_classifier, make_source
from tests.fake_weights import tiny  # noqa: F401  a fixture
from tests.models.common import CLASSES, RGB, random_chips
from tests.models.parity import tiny_architectures, tiny_classifier

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.mark.parametrize("taylor", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_removing_heads_and_units_that_do_nothing_changes_nothing(kind, taylor, tmp_path):
    """The weakest half is found wherever it is, and the rest is put together and served rightly."""
    classifier = tiny_classifier(None, kind)
    with torch.no_grad():
        for i, block in enumerate(classifier.backbone.blocks):
            head, width = i % 2, block.attn.head_dim
            block.attn.proj.weight[:, head * width : (head + 1) * width] = 0
            block.mlp.fc2.weight[:, i % 2 :: 2] = 0
    chips = random_chips(4, size=classifier.config.image_size)
    source = make_source(tmp_path, classifier=classifier)
    source.train = (chips, torch.tensor([0, 1, 0, 1]))
    pruned = source.structured(Removal(50, taylor))
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
    pruned = structure.remove_heads_and_units(
        classifier, percent / 100, importance.weight_norms(classifier)
    )
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


@pytest.mark.parametrize("kind", ["dinov2", "giant", "dinov3"])
def test_a_taylor_term_is_how_fast_the_loss_changes_when_a_part_is_turned_down(kind):
    """Against the loss itself, with what reads the part a little smaller."""
    classifier = tiny_classifier(None, kind).double()
    chips, targets = random_chips(3, size=classifier.config.image_size), torch.tensor([0, 1, 1])
    terms = importance.taylor_terms(classifier, chips, targets)

    def losses(reader, columns, factor):
        reader.weight[:, columns] *= factor
        found = torch.nn.functional.cross_entropy(classifier(chips), targets, reduction="none")
        reader.weight[:, columns] /= factor
        return found

    block, (of_heads, of_units) = classifier.backbone.blocks[1], terms[1]
    width = block.attn.head_dim
    with torch.no_grad():
        for reader, columns, term in (
            (block.attn.proj, slice(width, 2 * width), of_heads[1]),
            (block.mlp.fc2, slice(5, 6), of_units[5]),
        ):
            up, down = (losses(reader, columns, factor) for factor in (1 + 1e-4, 1 - 1e-4))
            expected = ((up - down) / 2e-4).square().mean()
            torch.testing.assert_close(term.double(), expected, rtol=1e-4, atol=0)


def test_taylor_removes_what_has_large_weights_and_never_speaks(tmp_path):
    """Units that are silent whatever the chip: their weights say the opposite."""
    classifier = make_classifier()
    silent = torch.arange(0, 768, 2)
    with torch.no_grad():
        for block in classifier.backbone.blocks:
            block.mlp.fc1.bias[silent] = -1000
            block.mlp.fc2.weight[:, silent] *= 10
    source = make_source(tmp_path, classifier=classifier)
    for block in source.structured(Removal(25, taylor=True)).backbone.blocks:
        assert (block.mlp.fc1.bias > -1000).sum() == len(silent), "only silent ones are gone"
    for block in source.structured(Removal(25)).backbone.blocks:
        assert (block.mlp.fc1.bias == -1000).sum() == len(silent), "none of the silent is gone"


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
    removal, chips = Removal(40), source.train[0]
    model = recovery.recovered(source, removal)
    assert recovery.recovered(source, removal) is model, "made once for all that are built of it"

    def apart(classifier):
        with torch.inference_mode():
            (logits, tokens), (wanted, taught) = (
                recovery.logits_and_tokens(c, chips) for c in (classifier, source.classifier)
            )
        return (logits - wanted).abs().mean(), (tokens - taught).square().mean()

    before, after = apart(source.structured(removal)), apart(model)
    assert after[1] < 0.8 * before[1]
    assert not list(tmp_path.glob("taught*")), "nothing stays on disk"
