"""Accuracy by place, and the check for shortcuts on classes that differ in brightness only."""

import numpy as np
import pytest
import torch
from scipy.stats import beta

from helpers.evaluation import baselines, robustness
from helpers.reporting import answers
from helpers.training.config import RunConfig
from helpers.training.setup import new_classifier
from tests.fake_data import manifest_folder, split_folders

SIZE = 28
COUNTS = {"train": 20, "valid": 4, "test": 20}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = manifest_folder(tmp_path_factory.mktemp("data"), counts=COUNTS)
    return RunConfig(data_path=str(root), weights="random", image_size=SIZE)


@pytest.fixture(scope="module")
def data(config):
    return config.data()


def predicted(data, wrong=0):
    """Predictions of the test chips, right but for the first ones."""
    test = data.manifest[data.manifest.split == "test"][["img_path", "group", "target"]]
    answers = test.target.to_numpy().copy()
    answers[:wrong] = 1 - answers[:wrong]
    return test.assign(predicted=answers, p_a=0.5, p_b=0.5)


def test_groups_have_their_own_accuracy_and_exact_interval(data):
    table = robustness.accuracy_by_group(predicted(data, wrong=1)).set_index("group")
    assert table.chips.sum() == 2 * COUNTS["test"] and set(table.chips) == {2}
    first = data.manifest[data.manifest.split == "test"].group.iloc[0]
    assert table.accuracy[first] == 0.5
    assert table.drop(index=first).accuracy.eq(1).all()
    assert table.low[first] == pytest.approx(beta.ppf(0.025, 1, 2))
    assert table.high[first] == pytest.approx(beta.ppf(0.975, 2, 1))
    assert set(table.positives) == {0.0, 1.0}


def test_data_without_groups_have_no_rows(tmp_path):
    data = RunConfig(data_path=str(split_folders(tmp_path)), image_size=SIZE).data()
    table = robustness.accuracy_by_group(predicted(data))
    assert table.empty and "accuracy" in table


def test_each_degradation_takes_its_cue_away(data):
    chips = torch.rand(4, 3, SIZE, SIZE) * 255
    changed = {name: change(chips) for name, change in robustness.degradations(data, SIZE).items()}
    assert all(result.shape == chips.shape for result in changed.values())
    assert torch.equal(changed["as it is"], chips)
    rough = {name: float(c.diff(dim=2).abs().mean()) for name, c in changed.items()}
    sharp, soft, softer = (
        rough[name] for name in ("as it is", "blurred, sigma 1 px", "blurred, sigma 2 px")
    )
    assert softer < soft < sharp
    assert torch.equal(changed["grey"][:, 0], changed["grey"][:, 2])
    equal = changed["equal mean and deviation"].mean(dim=(2, 3))
    torch.testing.assert_close(equal, equal[:1].expand_as(equal))


def test_acquisition_statistics_see_light_and_sharpness_but_no_place(data):
    dataset = data.dataset("test", SIZE)
    table = baselines.acquisition_statistics(dataset)
    assert table.shape == (len(dataset), 6)
    chips = torch.stack([chip for chip, _ in dataset]).float()
    np.testing.assert_allclose(table[:, 4], chips.mean(dim=(1, 2, 3)), rtol=1e-5)
    flipped = [(chip.flip(-1), target) for chip, target in dataset]
    np.testing.assert_allclose(baselines.acquisition_statistics(flipped), table, rtol=1e-4)


def test_classes_that_differ_in_brightness_are_found_out(config, data):
    table = robustness.shortcut_check(new_classifier(config, data), data)
    refitted = table[table["head"] == "refitted"].set_index("chips")
    assert refitted.auroc["acquisition statistics alone"] == 1
    assert refitted.auroc["as it is"] == 1
    assert refitted.auroc["equal mean and deviation"] < 0.75  # noise is all that is left
    assert (table.auroc_low <= table.auroc).all() and (table.auroc <= table.auroc_high).all()
    sentence = answers.shortcut_answer(table)
    assert "gives much of the answer away" in sentence
    assert "equal mean and deviation" in sentence and "not clearly more" in sentence
