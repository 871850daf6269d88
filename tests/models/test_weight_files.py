"""Files of weights that do not fit, are broken, or come from somebody else."""

import pathlib
import pickle

import pytest
import torch
from safetensors.torch import save_file

from helpers.models.backbones import load_backbone_weights, read_state_dict, weights_digest
from tests.models.common import refusal
from tests.models.parity import empty_backbone, published

# Reference model (None: an empty file), what is changed in its file (key -> shape, None: left out),
# and what is said.
WRONG_STATE_DICTS = {
    "registers in a model without": ("dinov2_reg4", {}, "unexpected: reg_token"),
    "DINOv3 in DINOv2": ("dinov3", {}, "unexpected: blocks.0.gamma_1"),
    "an empty file": (None, {}, "missing: blocks.0.attn.proj.bias"),
    "a key missing": ("dinov2", {"norm.bias": None}, "missing: norm.bias"),
    "a key more": ("dinov2", {"head.weight": (2, 64)}, "unexpected: head.weight"),
    "a wrapped state dict's key": ("dinov2", {"encoder": (1,)}, "unexpected: encoder"),
    "more blocks": ("dinov2", {"blocks.5.norm1.bias": (64,)}, "unexpected: blocks.5.norm1.bias"),
    "another embedding width": (
        "dinov2",
        {"norm.bias": (32,)},
        "norm.bias (32,) in place of (64,)",
    ),
    "patches of 16 pixels": (
        "dinov2",
        {"patch_embed.proj.weight": (64, 3, 16, 16)},
        "of another shape: patch_embed.proj.weight (64, 3, 16, 16) in place of (64, 3, 14, 14)",
    ),
    "no position embeddings": ("dinov2", {"pos_embed": None}, "missing: pos_embed"),
    "registers without position embeddings": (
        "dinov2_reg4",
        {"pos_embed": None},
        "missing: pos_embed",
    ),
    "position embeddings that are no square": (
        "dinov2",
        {"pos_embed": (1, 12, 64)},
        "pos_embed (1, 7, 64) in place of (1, 5, 64)",
    ),
    "position embeddings without batch dimension": (
        "dinov2",
        {"pos_embed": (1370, 64)},
        "pos_embed (1370, 64) in place of (1, 5, 64)",
    ),
    "position embeddings of no patch": (
        "dinov2",
        {"pos_embed": (1, 0, 64)},
        "pos_embed (1, 0, 64) in place of (1, 5, 64)",
    ),
}


@pytest.mark.parametrize("case", WRONG_STATE_DICTS)
def test_weights_of_another_architecture_are_named(case):
    model, changes, expected = WRONG_STATE_DICTS[case]
    state = dict(published(model)) if model else {}
    state |= {key: shape and torch.zeros(shape) for key, shape in changes.items()}
    state = {key: value for key, value in state.items() if value is not None}
    backbone = empty_backbone(28)
    before = weights_digest(backbone)
    message = refusal(load_backbone_weights, backbone, state, "weights.pth")
    assert message.startswith("weights.pth: these weights are not of this architecture; ")
    assert expected in message
    assert message.endswith("Choose the backbone that the file was made for")
    assert weights_digest(backbone) == before


def test_weights_without_registers_in_a_model_with_them():
    backbone = empty_backbone(28, "dinov2_reg4")
    message = refusal(load_backbone_weights, backbone, published("dinov2"), "weights.pth")
    assert "missing: reg_token" in message


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
