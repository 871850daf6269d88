"""The stem of chips with other bands than RGB: repeated or new, trained beside an adapter."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from helpers.models import adapters
from helpers.models.adapters import AdapterSettings
from helpers.models.backbones import weights_digest
from helpers.models.classifier import ClassifierConfig, create_classifier
from helpers.models.files import load_classifier, save_classifier
from tests.models.common import moved, random_chips

BANDS = (0, 0, 0, 1, 2)  # a band may be taken more than once
UNITS = {"mean": (100.0,) * 5, "std": (50.0,) * 5}
CONFIG = ClassifierConfig("example", "pretrained", 28, BANDS, ("a", "b"), "cls+mean", **UNITS)
STEM = "patch_embed.proj.weight"
CHIPS = random_chips(bands=5, size=28)


def state_of(**changes):
    return create_classifier(replace(CONFIG, **changes)).backbone.state_dict()


@torch.inference_mode()
def logits(model):
    return model.eval()(CHIPS)


def test_only_the_stem_is_new_and_it_comes_from_the_seed():
    repeated, other = state_of(), state_of(new_stem=True, seed=1)
    new, same = (state_of(new_stem=True) for _ in range(2))
    changed = {key for key in new if not torch.equal(new[key], repeated[key])}
    assert changed == {STEM, "patch_embed.proj.bias"}
    assert torch.equal(new[STEM], same[STEM]) and not torch.equal(new[STEM], other[STEM])


@pytest.mark.parametrize("new_stem", [False, True])
@pytest.mark.parametrize("method", adapters.PEFT_METHODS)
def test_a_trained_stem_is_saved_loaded_transferred_and_merged(method, new_stem, tmp_path):
    config = replace(CONFIG, new_stem=new_stem, seed=5)
    classifier = create_classifier(config)
    digest, before = weights_digest(classifier.backbone), logits(classifier)
    model = adapters.add_adapter(classifier, AdapterSettings(method=method, stem=True))
    torch.testing.assert_close(logits(model), before)
    parts = adapters.adapter_parameters(model)
    assert parts["stem"] == 192 * 5 * 14 * 14 + 192
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = logits(moved(model, 0.02))
    folder = adapters.save_adapter(model, tmp_path / "adapter", digest)
    torch.manual_seed(123)
    assert torch.equal(logits(adapters.load_adapter(folder)[0]), expected)
    theirs = PeftModel.from_pretrained(create_classifier(config), str(folder))
    assert torch.equal(logits(theirs), expected)
    trained = model.get_base_model().backbone.patch_embed.proj.weight.detach().clone()
    merged = adapters.merge_adapter(adapters.transfer_adapter(model, create_classifier(config)))
    assert torch.equal(merged.backbone.patch_embed.proj.weight, trained)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-4)
    path = save_classifier(merged, tmp_path / "model.safetensors", {})
    loaded = load_classifier(path)[0]
    assert torch.equal(logits(loaded), logits(merged)) and loaded.config == config
