"""The data set as tensors, its fingerprints, parameters, report and command."""

import shutil
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from helpers import InputError
from helpers.console import run_command
from helpers.data.chips import read_chip
from helpers.data.dataset import band_statistics, load_data
from helpers.data.report import data_report, data_warnings
from helpers.data.splits import SPLITS
from helpers.load_data import main
from tests.fake_data import (
    CLASSES,
    class_folders,
    make_chip,
    manifest_folder,
    manifest_rows,
    write_chip,
)

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def test_dataset(tmp_path):
    data = load_data(manifest_folder(tmp_path))
    chips = data.dataset("valid", 28)
    assert chips.targets.tolist() == [0, 0, 1, 1]
    assert chips.targets.dtype == torch.int64
    assert chips.paths[0] == tmp_path / "valid/no_tree/000.png"
    chip, target = chips[3]
    assert (chip.dtype, tuple(chip.shape), target) == (torch.uint8, (3, 28, 28), 1)
    np.testing.assert_array_equal(chip, make_chip(11_001, target=1))  # valid is the third folder


def test_dataset_resizes_and_batches(tmp_path):
    data = load_data(manifest_folder(tmp_path, suffix=".tif", dtype="float32", bands=2))
    chips, targets = next(iter(DataLoader(data.dataset("train", 14), batch_size=12)))
    assert (chips.dtype, tuple(chips.shape)) == (torch.float32, (12, 2, 14, 14))
    assert targets.tolist() == [0] * 6 + [1] * 6


def test_resized_uint8_stays_uint8_and_keeps_a_constant(tmp_path):
    for path in (tmp_path / name / f"{i}.png" for name in CLASSES for i in range(5)):
        write_chip(path, np.full((3, 20, 30), 77, np.uint8))
        write_chip(path, np.full((3, 20, 30), 77 + int(path.stem), np.uint8))
    chip, _ = load_data(tmp_path).dataset("train", 14)[0]
    assert chip.dtype == torch.uint8
    assert chip.shape == (3, 14, 14)
    assert chip.unique().numel() == 1


def test_band_statistics(tmp_path):
    data = load_data(manifest_folder(tmp_path, suffix=".npy", bands=4, dtype="uint16"))
    train = [read_chip(path, data.bands) for path in data.dataset("train", 28).paths]
    pixels = np.concatenate([chip.reshape(3, -1) for chip in train], axis=1).astype(np.float64)
    mean, std = band_statistics(data, 28)
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean, pixels.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(std, pixels.std(axis=1), rtol=1e-6)


@pytest.mark.parametrize("size", [28, 14])
def test_band_statistics_leave_pixels_without_data_out(tmp_path, size):
    pixels = []
    for i, row in manifest_rows(tmp_path, suffix=".tif", dtype="float32").iterrows():
        chip = make_chip(i, dtype="float32")
        if i % 2:
            chip[1, :, :8] = -9999
        write_chip(tmp_path / row["img_path"], chip, nodata=-9999)
        if row["split"] == "train":
            pixels.append(np.where(chip == -9999, np.nan, chip).reshape(3, -1))
    data = load_data(tmp_path)
    mean, std = band_statistics(data, size)
    pixels = np.concatenate(pixels, axis=1)
    np.testing.assert_allclose(mean, np.nanmean(pixels, axis=1), rtol=0.02)
    if size == 28:
        np.testing.assert_allclose(mean, np.nanmean(pixels, axis=1), rtol=1e-6)
        np.testing.assert_allclose(std, np.nanstd(pixels, axis=1), rtol=1e-6)
    chip, _ = data.dataset("train", size)[1]
    assert chip.min() > -100
    share = 10 * 8 / 28 / 3 / 20
    assert data.manifest["nodata"].mean() == pytest.approx(share)
    assert data.manifest["min"].min() > -100
    assert f"nodata      10 chips, {share:.2%} of all values; each is filled" in data_report(data)


def test_band_statistics_of_a_constant_band(tmp_path):
    for i, row in manifest_rows(tmp_path, suffix=".npy").iterrows():
        chip = np.stack([make_chip(i)[0], np.full((28, 28), 9, np.uint8)])
        write_chip(tmp_path / row["img_path"], chip)
    mean, std = band_statistics(load_data(tmp_path), 28)
    assert (mean[1], std[1]) == (9, 1)


def test_fingerprint(tmp_path):
    root = manifest_folder(tmp_path / "a")
    data = load_data(root)
    copy = load_data(shutil.copytree(root, tmp_path / "b"))
    assert data.fingerprint == copy.fingerprint
    assert load_data(root, bands=(2, 1, 0)).fingerprint != data.fingerprint
    assert load_data(root, classes=CLASSES[::-1]).fingerprint != data.fingerprint
    write_chip(root / "test/tree/001.png", make_chip(99))
    changed = load_data(root)
    assert changed.fingerprint != data.fingerprint
    same = [changed.split_fingerprint(s) == data.split_fingerprint(s) for s in SPLITS]
    assert same == [True, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bands": [-1]}, r"bands: \[-1\] out of range"),
        ({"bands": []}, "bands: the list is empty"),
        ({"classes": ["tree", "lake"]}, "classes: lake is not in .*; it has no_tree, tree"),
        ({"classes": ["tree"]}, "at least two"),
        ({"classes": ["tree", "tree"]}, "at least two"),
        ({"split_seed": -1}, "split_seed: .* greater than or equal to 0"),
        ({"bands": ["red"]}, r"bands: .* valid integer.* \(got 'red'\)"),
        ({"on_unreadable": "ignore"}, "on_unreadable: .* 'error' or 'skip'"),
        ({"on_leakage": "no"}, "on_leakage: .* 'warn' or 'error'"),
        ({"group_column": "block"}, "group_column: folders have no column 'block'"),
    ],
)
def test_bad_parameters(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        load_data(class_folders(tmp_path, per_class=5), **options)


def test_unknown_split_of_a_dataset(tmp_path):
    with pytest.raises(InputError, match=r"split: 'val' is unknown. Use one of train, valid, test"):
        load_data(manifest_folder(tmp_path)).dataset("val", 28)


def test_report(tmp_path):
    report = data_report(load_data(manifest_folder(tmp_path / "scene", bands=3)))
    assert str(tmp_path) not in report
    assert report.splitlines()[0] == "data        scene (CSV manifest manifest.csv)"
    assert "classes     no_tree, tree (positive: tree)" in report
    assert ["all", "12", "4", "4", "20"] in [line.split() for line in report.splitlines()]
    for line in (
        "size (px)   28x28 (20)",
        "bands       3 in a file, in use: 0, 1, 2",
        "data type   uint8 (20)",
        "unreadable  none",
        "identical   0 images have a byte-identical twin, 0 under two labels",
        "groups      10",
        "leakage     none: no image, copy, group or ground in two splits",
    ):
        assert line in report.splitlines()


def test_bands_that_are_not_in_use_are_said(tmp_path):
    root = manifest_folder(tmp_path, suffix=".npy", bands=5)
    assert data_warnings(load_data(root)) == ["bands: 0, 1, 2 of the 5 in a file are in use"]
    assert data_warnings(load_data(root, bands=(4, 2, 1, 0, 3))) == []


def test_report_counts_chips_that_are_not_square(tmp_path):
    root = class_folders(tmp_path)
    write_chip(root / "tree/000.png", make_chip()[:, :20])
    assert "not square  1 chips, squashed to a square" in data_report(load_data(root))


@pytest.mark.filterwarnings("error")
def test_the_command_is_quiet_beside_the_report(tmp_path, monkeypatch, capfd):
    root = class_folders(tmp_path / "scene", suffix=".tif", bands=4)
    arguments = ["load_data", "--data_path", str(root), "--bands", "3", "0"]
    monkeypatch.setattr(sys, "argv", arguments)
    run_command(main)
    out, err = capfd.readouterr()
    assert err == ""  # no georeferencing warning, no progress bar into a file
    assert "4 in a file, in use: 3, 0" in out
