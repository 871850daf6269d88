"""Features are Meta's; weights arrive completely or not at all."""

import copy
import re

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.eva import checkpoint_filter_fn as filter_of_eva
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from helpers.models import backbones
from helpers.models.architectures import ARCHITECTURES
from helpers.models.backbones import create_backbone, load_backbone_weights, weights_digest
from helpers.models.classifier import create_classifier
from tests.fake_weights import hub_cache, published_state_dict
from tests.models.common import example_config, refusal
from tests.models.parity import (
    MODELS,
    TINY,
    empty_backbone,
    meta_outputs,
    published,
    tiny_architectures,
    tiny_classifier,
)

SIZES = {"dinov2": ("98", "196", "224", "518"), "dinov3": ("96", "112", "96x160", "224", "256")}


@pytest.mark.parametrize(("model", "size"), [(m, size) for m in MODELS for size in SIZES[m[:6]]])
@torch.inference_mode()
def test_features_are_metas(model, size):
    """Measured: 3.7e-6 at most; DINOv3 takes oblong images as it stands."""
    classifier = tiny_classifier(int(size.split("x")[0]), model)
    meta = {
        key.removesuffix(f"_{size}"): value
        for key, value in meta_outputs(model).items()
        if key.endswith(f"_{size}")
    }
    tokens = classifier.backbone.forward_features(classifier.normalize(meta["image"]))
    patches = tokens[:, classifier.backbone.num_prefix_tokens :]
    features = classifier.features(meta["image"])
    found = {
        "cls": tokens[:, 0],
        "patches": patches[:, ::10] if size == "518" else patches,
        "patch_mean": features[:, 256:],
        "cls_last4": features[:, :256],
    }
    for name, value in found.items():
        torch.testing.assert_close(value, meta[name], atol=1e-4, rtol=0, msg=name)
    pooled = classifier.backbone(classifier.normalize(meta["image"]))
    assert torch.equal(pooled, tokens[:, 0])  # and not the mean, timm's default for DINOv3


@pytest.mark.parametrize("size", [98, 224])
@torch.inference_mode()
def test_timms_own_resampling_would_not_be_metas(size):
    """The test above can fail: without registers timm resamples position embeddings otherwise."""
    classifier = tiny_classifier(size)
    state = checkpoint_filter_fn(dict(published("dinov2")), classifier.backbone)
    classifier.backbone.load_state_dict(state)
    meta = meta_outputs("dinov2")
    tokens = classifier.backbone.forward_features(classifier.normalize(meta[f"image_{size}"]))
    assert (tokens[:, 1:] - meta[f"patches_{size}"]).abs().max() > 0.5


@pytest.mark.parametrize("name, registers", [("dinov2_vits14", 0), ("dinov2_vits14_reg", 4)])
def test_a_published_checkpoint_loads_completely(name, registers, tmp_path):
    state = published_state_dict(width=384, depth=12, registers=registers)
    torch.save(state, tmp_path / "pretrain.pth")
    filled = create_backbone(name, str(tmp_path / "pretrain.pth"), image_size=98).state_dict()

    # Each tensor of the file is in the model, and the model has no others.
    moved = {"mask_token", "pos_embed", "cls_token", "register_tokens"}
    assert filled.keys() - state.keys() == ({"reg_token"} if registers else set())
    for key in state.keys() - moved:
        assert torch.equal(filled[key], state[key]), key
    if registers:
        assert torch.equal(filled["reg_token"], state["register_tokens"])
        assert torch.equal(filled["cls_token"], state["cls_token"] + state["pos_embed"][:, :1])
        assert filled["pos_embed"].shape == (1, 49, 384)
    else:
        assert torch.equal(filled["cls_token"], state["cls_token"])
        assert torch.equal(filled["pos_embed"][:, :1], state["pos_embed"][:, :1])
        assert filled["pos_embed"].shape == (1, 50, 384)


def test_half_precision_checkpoint_becomes_float32():
    state = {key: value.half() for key, value in published("dinov2").items()}
    backbone = empty_backbone()
    load_backbone_weights(backbone, state, "half")
    assert {value.dtype for value in backbone.state_dict().values()} == {torch.float32}
    assert torch.equal(backbone.norm.weight.half(), state["norm.weight"])


def test_position_embeddings_at_their_own_size_are_untouched():
    backbone = empty_backbone(518)
    load_backbone_weights(backbone, published("dinov2"), "dinov2")
    assert torch.equal(backbone.pos_embed, published("dinov2")["pos_embed"])


@torch.inference_mode()
def test_giants_swiglu_has_metas_names_and_order():
    """Meta: `x1, x2 = w12(x).chunk(2); w3(silu(x1) * x2)` (layers/swiglu_ffn.py)."""
    shape = {"embed_dim": 96, "depth": 2, "num_heads": 2, "img_size": 28, "num_classes": 0}
    timm_name = ARCHITECTURES["dinov2_vitg14"].timm_name
    torch.manual_seed(0)
    source = timm.create_model(timm_name, **shape).state_dict()
    state = {
        key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value
        for key, value in source.items()
    } | {"mask_token": torch.zeros(1, 96)}
    assert state["blocks.1.mlp.w12.weight"].shape == (512, 96)
    assert state["blocks.1.mlp.w3.weight"].shape == (96, 256)
    backbone = timm.create_model(timm_name, **shape)
    load_backbone_weights(backbone, state, "giant")
    filled = backbone.state_dict()
    assert filled.keys() == source.keys()
    assert all(torch.equal(filled[key], source[key]) for key in source)

    x = torch.randn(2, 5, 96)
    w12 = nn.functional.linear(x, state["blocks.0.mlp.w12.weight"], state["blocks.0.mlp.w12.bias"])
    x1, x2 = w12.chunk(2, dim=-1)
    expected = nn.functional.linear(
        nn.functional.silu(x1) * x2, state["blocks.0.mlp.w3.weight"], state["blocks.0.mlp.w3.bias"]
    )
    torch.testing.assert_close(backbone.blocks[0].mlp(x), expected)


@pytest.mark.parametrize("bands", [1, 4, 13])
def test_pretrained_stem_is_spread_over_other_band_counts(bands, tmp_path):
    """Bands take the RGB filters in turn, scaled by 3 / bands; a single band takes their sum."""
    source = create_classifier(example_config()).backbone.state_dict()
    save_file(source, tmp_path / "rgb.safetensors")
    backbone = create_backbone("example", str(tmp_path / "rgb.safetensors"), 98, bands)
    filled, key = backbone.state_dict(), "patch_embed.proj.weight"
    if bands == 1:
        expected = source[key].sum(dim=1, keepdim=True)
    else:
        expected = source[key][:, [i % 3 for i in range(bands)]] * 3 / bands
    torch.testing.assert_close(filled[key], expected)
    assert all(torch.equal(filled[name], source[name]) for name in filled.keys() - {key})
    assert backbone(torch.randn(1, bands, 98, 98)).shape == (1, 192)


# --- DINOv3 ---


def dinov3_features(backbone, size="96"):
    image = meta_outputs("dinov3")[f"image_{size}"]
    return backbone.forward_features(tiny_classifier(96, "dinov3").normalize(image))


def timms_layout(qkv_biases=True):
    """The reference's weights in the layout of timm's copies on the hub, which lack the periods."""
    state = published("dinov3")
    if not qkv_biases:
        state = {k: torch.zeros_like(v) if "qkv.bias" in k else v for k, v in state.items()}
    with tiny_architectures():
        suffix = "_qkvb" if qkv_biases else ""
        model = backbones.timm.create_model(f"vit_small_patch16_dinov3{suffix}", num_classes=0)
    return state, filter_of_eva(dict(state), model)


@pytest.mark.parametrize("qkv_biases", [True, False])
@torch.inference_mode()
def test_timms_copy_of_dinov3_gives_the_features_of_metas_file(qkv_biases):
    """Periods are not in timm's files; Meta's are computed ones rounded to bf16."""
    metas, timms = timms_layout(qkv_biases)
    assert "rope.periods" not in timms and ("blocks.0.attn.q_bias" in timms) == qkv_biases
    models = []
    for state in (metas, timms):
        models.append(empty_backbone(96, "dinov3"))
        load_backbone_weights(models[-1], state, "dinov3")
    assert weights_digest(models[0]) == weights_digest(models[1])
    expected = meta_outputs("dinov3")["cls_96"]
    if qkv_biases:
        torch.testing.assert_close(dinov3_features(models[1])[:, 0], expected, atol=1e-4, rtol=0)
    again = dinov3_from(models[1].state_dict())
    assert weights_digest(again) == weights_digest(models[1])


def dinov3_from(state):
    backbone = empty_backbone(96, "dinov3")
    load_backbone_weights(backbone, state, "this project's layout")
    return backbone


@torch.inference_mode()
def test_periods_of_the_file_decide_and_survive_a_change_of_precision():
    state = published("dinov3")
    state = state | {"rope_embed.periods": 1.5 * state["rope_embed.periods"]}
    backbone = dinov3_from(state)
    periods = state["rope_embed.periods"].float()
    assert torch.equal(backbone.state_dict()["rope.periods"], periods)
    moved = dinov3_features(backbone) - meta_outputs("dinov3")["cls_96"][:, None]
    assert moved.abs().max() > 0.01, "the periods must be used"
    before = dinov3_features(backbone)
    for cast in (copy.deepcopy(backbone).half(), copy.deepcopy(backbone).bfloat16()):
        assert torch.equal(cast.rope.periods, periods)
        assert "rope.periods" in cast.state_dict()
    assert torch.equal(dinov3_features(copy.deepcopy(backbone).double().float()), before)


@torch.inference_mode()
def test_periods_in_fp32_would_not_be_metas():
    """The parity test can fail: this is what timm computes by default."""
    backbone = dinov3_from(published("dinov3"))
    backbone.rope.periods.copy_(backbone.rope._compute_periods())
    patches = dinov3_features(backbone)[:, 5:]
    difference = (patches - meta_outputs("dinov3")["patches_96"]).abs().max()
    assert 1e-3 < difference < 1e-2
    torch.testing.assert_close(
        patches, meta_outputs("dinov3")["patches_fp32periods_96"], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("model", TINY)
@torch.inference_mode()
def test_every_family_gives_cls_then_registers_then_patches(model):
    """Tokens that are nobody's prefix do not move when two chips swap the order of patches."""
    backbone = empty_backbone(None, model)
    size, width = backbone.patch_embed.img_size[0], backbone.embed_dim
    tokens = backbone.forward_features(torch.randn(2, 3, size, size))
    assert tokens.shape == (2, backbone.num_prefix_tokens + backbone.patch_embed.num_patches, width)
    _, intermediates = backbone.forward_intermediates(
        torch.zeros(1, 3, size, size), indices=4, norm=True, return_prefix_tokens=True
    )
    assert len(intermediates) == 4
    assert intermediates[-1][1].shape == (1, backbone.num_prefix_tokens, width)


@pytest.mark.parametrize("model", TINY)
def test_a_backbone_built_for_weights_becomes_the_one_they_are_from(model):
    """Nothing that is not in the state dict may be left as the memory happened to be."""
    source = empty_backbone(None, model)
    filled = empty_backbone(None, model, initialise=False)
    filled.load_state_dict(source.state_dict())
    buffers = dict(source.named_buffers())
    assert buffers.keys() == dict(filled.named_buffers()).keys()
    for name, buffer in filled.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    size = source.patch_embed.img_size[0]
    chips = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        assert torch.equal(source(chips), filled(chips))


def test_metas_file_of_a_gated_dinov3_loads_completely():
    """S+, H+ and 7B: `w3(silu(w1(x)) * w2(x))`; 7B without a bias on qkv."""
    for model in ("plus", "7b"):
        source = empty_backbone(32, model)
        names = {"reg_token": "storage_tokens", "rope.periods": "rope_embed.periods"}
        names |= {".gamma_": ".ls", "fc1_g": "w1", "fc1_x": "w2", "fc2": "w3"}
        state = {}
        for key, value in source.state_dict().items():
            for new, old in names.items():
                key = key.replace(new, old)
            state[re.sub(r"(\.ls[12])$", r"\1.gamma", key)] = value
            if key.endswith("qkv.bias"):
                state[key + "_mask"] = torch.ones_like(value)
        state |= {"mask_token": torch.zeros(1, 64), "local_cls_norm.weight": torch.ones(64)}
        assert "blocks.0.mlp.w1.weight" in state and "blocks.0.ls1.gamma" in state
        filled = empty_backbone(32, model)
        load_backbone_weights(filled, state, model)
        assert weights_digest(filled) == weights_digest(source)


def test_the_licence_of_dinov3_is_printed_once(tmp_path, capsys):
    torch.save(published("dinov3"), tmp_path / "w.pth")
    for _ in range(2):
        with tiny_architectures():
            create_backbone("dinov3_vits16", str(tmp_path / "w.pth"), 32)
    assert capsys.readouterr().out.count("DINOv3 License, https://ai.meta.com") == 1
    create_backbone("example", image_size=28)
    assert not capsys.readouterr().out


@torch.inference_mode()
def test_another_vit_of_timm_is_as_timm_loads_it(tmp_path):
    """With the position embeddings resampled as timm does, and without the head of the file."""
    name = "vit_small_patch16_224.augreg_in21k"
    with tiny_architectures():
        source = backbones.timm.create_model(name, num_classes=7)
        torch.save(source.state_dict(), tmp_path / "w.pth")
        backbone = create_backbone(f"timm:{name}", str(tmp_path / "w.pth"), 32).eval()
    source.set_input_size((32, 32))
    chips = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(
        backbone.forward_features(chips), source.eval().forward_features(chips)
    )


def test_hub_weights_come_from_the_cache_and_are_missed_with_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    source = published_state_dict(width=384, depth=12, registers=0)
    del source["mask_token"]
    file = hub_cache(tmp_path, "vit_small_patch14_dinov2.lvd142m", source)
    from_hub = create_backbone("dinov2_vits14", image_size=98).state_dict()
    from_file = create_backbone("dinov2_vits14", str(file), 98).state_dict()
    assert torch.equal(from_hub["blocks.11.mlp.fc2.weight"], source["blocks.11.mlp.fc2.weight"])
    assert from_hub.keys() == from_file.keys()
    assert all(torch.equal(from_hub[key], value) for key, value in from_file.items())
    assert re.fullmatch(
        r"backbone dinov2_vits14_reg: its weights could not be fetched from the hub \(\w+\)\. "
        r"Check the connection, or download Meta's dinov2_vits14_reg4_pretrain\.pth by hand and "
        r"pass its path as weights",
        refusal(create_backbone, "dinov2_vits14_reg"),
    )


def test_the_digest_tells_weights_apart():
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    assert weights_digest(first) != weights_digest(second)
    second.load_state_dict(first.state_dict())
    assert weights_digest(first) == weights_digest(second)
    with torch.no_grad():
        second.bias[0] = torch.nextafter(second.bias[0], torch.tensor(9.0))
    assert weights_digest(first) != weights_digest(second)
    assert re.fullmatch("[0-9a-f]{16}", weights_digest(first))
    assert weights_digest(first) == weights_digest(first.requires_grad_(False).eval())


def test_the_digest_covers_names():
    class Named(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.register_buffer(name, torch.ones(3))

    assert weights_digest(Named("one")) != weights_digest(Named("other"))
