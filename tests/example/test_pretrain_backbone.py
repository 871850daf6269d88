"""The script that distils the example backbone."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from example import pretrain_backbone
from example.pretrain_backbone import Student, cut, find_images, half_whiten, train
from helpers.models.architectures import ARCHITECTURES
from helpers.training.processes import torch_threads
from tests.fake_data import make_chip, write_chip


def test_only_the_training_split_of_a_manifest_is_read(tmp_path):
    names = [f"{split}/{n}.png" for split in ("train", "val", "test") for n in range(2)]
    for seed, name in enumerate(names):
        write_chip(tmp_path / name, make_chip(seed))
    splits = [name.split("/")[0] for name in names]
    pd.DataFrame({"img_path": names, "split": splits}).to_csv(tmp_path / "m.csv", index=False)
    assert find_images(tmp_path / "m.csv") == [tmp_path / "train/0.png", tmp_path / "train/1.png"]
    assert len(find_images(tmp_path)) == len(names)


@pytest.mark.parametrize(
    ("size", "chips"), [(64, 1), (128, 1), (196, 9 + 1 + 1), (392, 49 + 25 + 9 + 4)]
)
def test_large_images_are_cut_in_windows_of_several_scales(size, chips):
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    windows = cut(Image.fromarray(pixels))
    assert len(windows) == chips
    assert {w.shape for w in windows} == {(128, 128, 3)}


def test_half_whitening_takes_the_root_of_every_deviation(monkeypatch):
    monkeypatch.setattr(pretrain_backbone, "TARGET_WIDTH", 3)
    torch.manual_seed(0)
    features = torch.randn(2000, 5) @ torch.randn(5, 5)
    scaled = (features - features.mean(0)) / features.std(0)
    variances = torch.linalg.eigvalsh(scaled.T @ scaled / 2000).flip(0)[:3]
    covariance = half_whiten(features, features).float().T.cov()
    torch.testing.assert_close(covariance, variances.sqrt().diag(), atol=2e-3, rtol=2e-3)


def test_attention_begins_local_and_values_near_minus_identity():
    torch.manual_seed(0)
    block = Student().backbone.blocks[0]
    query, key, value = block.attn.qkv.weight.detach().chunk(3)
    passed_on = block.attn.proj.weight.detach() @ value
    assert passed_on.diagonal().mean().item() == pytest.approx(-0.4, abs=0.01)
    for head in torch.arange(192).chunk(3):
        product = query[head].T @ key[head]
        assert product.diagonal().mean() > 10 * product.mean().abs()
        assert torch.linalg.matrix_rank(product) == 64


@pytest.fixture
def one_thread():
    """Four chips are too few to share between threads."""
    with torch_threads(1):
        yield


def test_a_killed_training_ends_with_the_same_weights(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(pretrain_backbone, "BATCH", 4)
    monkeypatch.setattr(pretrain_backbone, "CHECKPOINT_STEPS", 1)
    example = ARCHITECTURES["example"]
    shallow = replace(example, overrides=example.overrides | {"depth": 1})
    monkeypatch.setitem(ARCHITECTURES, "example", shallow)
    torch.manual_seed(1)
    chips = torch.randint(0, 256, (6, 3, 98, 98), dtype=torch.uint8)
    patches, pooled = torch.randn(6, 49, 256), torch.randn(6, 256)
    whole = train(chips, patches, pooled, 2, tmp_path / "whole")

    loss, calls = Student.loss, []

    def killed_in_the_second_step(*arguments):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(Student, "loss", killed_in_the_second_step)
    with pytest.raises(KeyboardInterrupt):
        train(chips, patches, pooled, 2, tmp_path / "killed")
    monkeypatch.setattr(Student, "loss", loss)
    resumed = train(chips, patches, pooled, 2, tmp_path / "killed")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
