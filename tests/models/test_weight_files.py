"""Files of weights that do not fit, are broken, or come from somebody else."""

import pathlib
import pickle

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from helpers.models.backbones import load_backbone_weights, read_state_dict, weights_digest
from tests.fake_weights import published_state_dict
from tests.models.common import refusal, without
from tests.models.parity import empty_backbone, published

WRONG_STATE_DICTS = {
    "registers in a model without": (lambda: published("dinov2_reg4"), "unexpected: reg_token"),
    "a key missing": (
        lambda: without(published("dinov2"), "blocks.3.ls2.gamma"),
        "missing: blocks.3.ls2.gamma",
    ),
    "a key more": (
        lambda: published("dinov2") | {"head.weight": torch.zeros(2, 64)},
        "unexpected: head.weight",
    ),
    "no position embeddings": (
        lambda: without(published("dinov2"), "pos_embed"),
        "missing: pos_embed",
    ),
    "registers without position embeddings": (
        lambda: without(published("dinov2_reg4"), "pos_embed"),
        "missing: pos_embed",
    ),
    "position embeddings that are no square": (
        lambda: published("dinov2") | {"pos_embed": torch.zeros(1, 12, 64)},
        "pos_embed (1, 7, 64) in place of (1, 5, 64)",
    ),
    "position embeddings without batch dimension": (
        lambda: published("dinov2") | {"pos_embed": torch.zeros(1370, 64)},
        "pos_embed (1370, 64) in place of (1, 5, 64)",
    ),
    "another embedding width": (
        lambda: published_state_dict(width=32, depth=5, registers=0),
        "blocks.0.attn.proj.bias (32,) in place of (64,)",
    ),
    "more blocks": (
        lambda: published_state_dict(width=64, depth=6, registers=0),
        "unexpected: blocks.5.attn.proj.bias",
    ),
    "patches of 16 pixels": (
        lambda: VisionTransformer(
            img_size=32,
            patch_size=16,
            embed_dim=64,
            depth=5,
            num_heads=2,
            num_classes=0,
            init_values=1.0,
        ).state_dict(),
        "of another shape: patch_embed.proj.weight (64, 3, 16, 16) in place of (64, 3, 14, 14)",
    ),
    "DINOv3 in DINOv2": (lambda: published("dinov3"), "unexpected: blocks.0.gamma_1"),
    "position embeddings of no patch": (
        lambda: published("dinov2") | {"pos_embed": torch.zeros(1, 0, 64)},
        "pos_embed (1, 0, 64) in place of (1, 5, 64)",
    ),
    "an empty file": (lambda: {}, "missing: blocks.0.attn.proj.bias"),
    "a wrapped state dict's key": (
        lambda: published("dinov2") | {"encoder": torch.zeros(1)},
        "unexpected: encoder",
    ),
}


@pytest.mark.parametrize("case", WRONG_STATE_DICTS)
def test_weights_of_another_architecture_are_named(case):
    state, expected = WRONG_STATE_DICTS[case]
    message = refusal(load_backbone_weights, empty_backbone(28), state(), "weights.pth")
    assert message.startswith("weights.pth: these weights are not of this architecture; ")
    assert expected in message
    assert message.endswith("Choose the backbone that the file was made for")


def test_weights_without_registers_in_a_model_with_them():
    backbone = empty_backbone(28, "dinov2_reg4")
    message = refusal(load_backbone_weights, backbone, published("dinov2"), "weights.pth")
    assert "missing: reg_token" in message


def test_refused_weights_leave_the_backbone_as_it_was():
    backbone = empty_backbone(28)
    before = weights_digest(backbone)
    refusal(load_backbone_weights, backbone, without(published("dinov2"), "norm.bias"), "file")
    assert weights_digest(backbone) == before


NUMBERS = {
    "not a number": (float("nan"), torch.float32, "not finite numbers: norm.bias"),
    "infinite": (float("inf"), torch.float16, "not finite numbers: norm.bias"),
    "whole numbers": (1, torch.int8, "not floating-point numbers: norm.bias (torch.int8)"),
    "complex": (1, torch.complex64, "not floating-point numbers: norm.bias (torch.complex64)"),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_weights_that_are_no_finite_numbers_are_named(case):
    value, dtype, expected = NUMBERS[case]
    state = published("dinov2") | {"norm.bias": torch.full((64,), value, dtype=dtype)}
    assert expected in refusal(load_backbone_weights, empty_backbone(28), state, "weights.pth")


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_a_pickled_object_is_refused_and_not_run(tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "weights.pth"
    torch.save({"norm.weight": torch.zeros(64), "more": Touch(marker)}, path)
    message = refusal(read_state_dict, path)
    assert f"{path} is truncated or not a file of plain tensors" in message
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # so the file would have run code


BROKEN_FILES = {
    "missing.pth": (lambda path: None, "no such file"),
    "folder.pth": (lambda path: path.mkdir(), "no such file"),
    "empty.pth": (lambda path: path.touch(), "truncated or not a file of plain tensors"),
    "empty.safetensors": (lambda path: path.touch(), "truncated or not a file of plain tensors"),
    "text.pth": (lambda path: path.write_text("<html>"), "truncated or not"),
    "pickle.pth": (
        lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)),
        "truncated or not a file of plain tensors",
    ),
    "number.pth": (lambda path: torch.save({"a": 1}, path), "flat state dict"),
    "nested.pth": (
        lambda path: torch.save({"model": {"a": torch.zeros(1)}}, path),
        "does not hold a flat state dict (name -> tensor); save the model's state_dict()",
    ),
    "tensor.pth": (lambda path: torch.save(torch.zeros(1), path), "flat state dict"),
    "sparse.pth": (
        lambda path: torch.save({"a": torch.eye(3).to_sparse()}, path),
        "holds sparse or empty tensors (a); save dense ones",
    ),
    "meta.pth": (
        lambda path: torch.save({"a": torch.empty(3, device="meta")}, path),
        "holds sparse or empty tensors (a)",
    ),
    "numbered.pth": (lambda path: torch.save({0: torch.zeros(1)}, path), "flat state dict"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_of_weights(name, tmp_path):
    make, expected = BROKEN_FILES[name]
    make(tmp_path / name)
    message = refusal(read_state_dict, str(tmp_path / name))
    assert message.startswith("weights: ")
    assert str(tmp_path / name) in message and expected in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_of_weights(suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(published("dinov2"), path)
    else:
        save_file(published("dinov2"), path)
    path.write_bytes(path.read_bytes()[:-1000])
    message = refusal(read_state_dict, path)
    assert f"{path} is truncated or not a file of plain tensors" in message
    assert message.endswith("download it again")
