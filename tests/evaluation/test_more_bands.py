"""The simulated set of more than three bands, and its task."""

import numpy as np
import pandas as pd
import pytest
import yaml

from helpers.data.chips import read_chip
from helpers.data.dataset import load_data
from helpers.records import ROOT
from tests.fake_data import manifest_folder
from tools import more_bands


def test_grey_bands_hold_no_colour_and_all_six_hold_the_chip(tmp_path, monkeypatch, capsys):
    source = manifest_folder(tmp_path / "rgb")
    monkeypatch.setattr("sys.argv", ["more_bands", "--source", str(source),
                                     "--output", str(tmp_path / "six")])  # fmt: skip
    more_bands.main()
    assert capsys.readouterr().out.startswith("wrote 20 chips of six bands to ")
    before, after = (pd.read_csv(tmp_path / name / "manifest.csv") for name in ("rgb", "six"))
    columns = ["label", "split", "group"]
    pd.testing.assert_frame_equal(before[columns], after[columns])
    for old, new in zip(before.img_path, after.img_path, strict=True):
        rgb, six = read_chip(source / old), read_chip(tmp_path / "six" / new)
        assert six.dtype == np.uint8 and np.array_equal(six[3:], rgb)
        luminance = np.tensordot([0.299, 0.587, 0.114], rgb.astype(float), 1)
        # Pillow cuts its sums of fixed-point numbers off.
        np.testing.assert_allclose(six[0], luminance, atol=1.01)
        for band, colour in ((1, rgb[2] - luminance), (2, rgb[0] - luminance)):
            weight = {1: 1.772, 2: 1.402}[band]
            np.testing.assert_allclose(six[band], 128 + colour / weight, atol=1.01)
    data = load_data(tmp_path / "six", bands=(0, 0, 0, 1, 2))
    chip, _ = data.dataset("train", 28)[0]
    assert chip.shape == (5, 28, 28) and (chip[0] == chip[2]).all()


@pytest.mark.parametrize("name", ["more_bands", "more_bands_rsscn7"])
def test_the_tasks_bands_are_those_that_the_set_has(name):
    task = yaml.safe_load((ROOT / f"evidence/{name}.yaml").read_text())
    bands = [row.get("changes", {}).get("bands") for row in task["methods"].values()]
    assert task["training"]["bands"] == [0, 0, 0]  # no row without colour sees band 1 or above
    assert {tuple(b) for b in bands if b} == {(0, 0, 0, 1, 2), (3, 4, 5)}
