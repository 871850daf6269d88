"""Frozen features: the numbers of a direct forward pass, and a cache that is never stale."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import InputError
from helpers.data.dataset import load_data
from helpers.evaluation.baselines import colour_statistics, logistic_probe
from helpers.evaluation.inspection import token_components
from helpers.training import cache, features
from helpers.training.examples import DIHEDRAL_VIEWS, dihedral
from helpers.training.features import cached_features, extract_features
from tests.fake_data import split_folders
from tests.models.parity import tiny_classifier

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return load_data(split_folders(tmp_path_factory.mktemp("chips")))


@pytest.fixture(scope="session")
def classifier():
    return tiny_classifier(28)


@pytest.fixture
def forward_passes(monkeypatch):
    """A list that grows by one with every uncached extraction."""
    calls = []

    def counted(*arguments, **options):
        calls.append(options)
        return extract_features(*arguments, **options)

    monkeypatch.setattr(features, "extract_features", counted)
    return calls


# --- Views ---------------------------------------------------------------------------------------


def test_eight_different_views_and_the_first_is_the_chip():
    chip = torch.arange(18).view(2, 3, 3)
    views = [dihedral(chip, view) for view in range(DIHEDRAL_VIEWS)]
    assert torch.equal(views[0], chip)
    assert len({tuple(view.flatten().tolist()) for view in views}) == 8
    for view in views:
        assert view.shape == chip.shape
        # Bands move together: the second is the first plus nine everywhere.
        assert torch.equal(view[1], view[0] + 9)


def test_views_are_a_group():
    """A view of a view is a view, and each can be undone."""
    chip = torch.arange(9).view(3, 3)
    views = {tuple(dihedral(chip, view).flatten().tolist()) for view in range(8)}
    for first in range(8):
        composed = {
            tuple(dihedral(dihedral(chip, first), then).flatten().tolist()) for then in range(8)
        }
        assert composed == views


# --- Extraction ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [5, 64])
@torch.inference_mode()
def test_features_are_those_of_one_chip_at_a_time(data, classifier, batch_size):
    dataset = data.dataset("train", 28)
    found = extract_features(classifier, dataset, batch_size=batch_size)
    expected = torch.cat([classifier.features(chip[None]) for chip, _ in dataset])
    assert found.values.shape == (1, 12, 5 * 64) and found.values.dtype == torch.float32
    torch.testing.assert_close(found.values[0], expected, **CLOSE)
    assert expected.std(dim=0).min() > 1e-3  # chips differ, so their order is checked too
    assert found.targets.tolist() == [0] * 6 + [1] * 6


@torch.inference_mode()
def test_every_view_of_every_chip(data, classifier):
    dataset = data.dataset("valid", 28)
    values = extract_features(classifier, dataset, views=8, batch_size=3).values
    assert values.shape == (8, 4, 5 * 64)
    chips = torch.stack([chip for chip, _ in dataset])
    for view in range(8):
        expected = classifier.features(dihedral(chips, view))
        torch.testing.assert_close(values[view], expected, **CLOSE)
    assert (values[0] - values[5]).abs().max() > 1e-3


def test_chips_are_resized_to_the_classifier(data):
    assert extract_features(tiny_classifier(42), data.dataset("valid", 42)).values.isfinite().all()


def test_a_classifier_in_training_mode_gives_the_same(data, classifier):
    dataset = data.dataset("valid", 28)
    expected = extract_features(classifier, dataset).values
    classifier.train()
    torch.testing.assert_close(extract_features(classifier, dataset).values, expected)
    assert classifier.training, "functions leave their arguments as they found them"
    classifier.eval()


# --- Cache ---------------------------------------------------------------------------------------


def test_a_second_call_reads_what_the_first_computed(data, classifier, forward_passes, tmp_path):
    first = cached_features(classifier, data, "train", cache_path=tmp_path)
    second = cached_features(classifier, data, "train", cache_path=tmp_path)
    assert len(forward_passes) == 1
    assert (first.from_cache, second.from_cache) == (False, True)
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.targets, second.targets)
    assert second.targets.dtype == torch.int64
    assert second.seconds == first.seconds


def test_of_runs_side_by_side_one_computes_and_the_others_read(
    data, classifier, monkeypatch, tmp_path
):
    computing = threading.Barrier(2)

    def extract(*arguments, **options):
        with suppress(threading.BrokenBarrierError):  # nobody else computes
            computing.wait(timeout=1)
        return extract_features(*arguments, **options)

    def run(_):
        return cached_features(classifier, data, "train", cache_path=tmp_path)

    monkeypatch.setattr(features, "extract_features", extract)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, range(3)))
    assert sorted(f.from_cache for f in found) == [False, True, True]
    assert all(torch.equal(f.values, found[0].values) for f in found)
    assert len(list(tmp_path.iterdir())) == 1


def relabelled(data):
    manifest = data.manifest.assign(target=1 - data.manifest["target"])
    return replace(data, manifest=manifest)


def other_weights():
    classifier = tiny_classifier(28)
    with torch.no_grad():
        classifier.backbone.norm.bias[0] += 1e-3
    return classifier


CHANGES = {
    "labels": lambda data: {"data": relabelled(data)},
    "bands": lambda data: {"data": replace(data, bands=(2, 1, 0))},
    "split": lambda data: {"split": "test"},
    "weights": lambda data: {"classifier": other_weights()},
    "registers": lambda data: {"classifier": tiny_classifier(28, "dinov2_reg4")},
    "image size": lambda data: {"classifier": tiny_classifier(42)},
    "mean": lambda data: {"classifier": tiny_classifier(mean=(0.0, 0.0, 0.0))},
    "standard deviation": lambda data: {"classifier": tiny_classifier(std=(1.0, 1.0, 1.0))},
    "views": lambda data: {"views": 8},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_the_numbers_misses_the_cache(change, data, classifier, tmp_path):
    call = {"classifier": classifier, "data": data, "split": "valid"}
    first = cached_features(**call, cache_path=tmp_path)
    changed = call | CHANGES[change](data)
    second = cached_features(**changed, cache_path=tmp_path)
    assert not second.from_cache
    different_targets = not torch.equal(first.targets, second.targets)
    assert change == "split" or different_targets or not torch.equal(first.values, second.values)
    assert cached_features(**call, cache_path=tmp_path).from_cache


def test_a_head_or_a_batch_size_does_not_miss_the_cache(data, classifier, tmp_path):
    cached_features(classifier, data, "valid", cache_path=tmp_path)
    other = tiny_classifier(28, head_input="4xcls+mean")
    assert cached_features(other, data, "valid", cache_path=tmp_path, batch_size=3).from_cache


def flipped(entry):
    values = entry / "values.npy"
    content = bytearray(values.read_bytes())
    content[1000] ^= 1
    values.write_bytes(content)


def as_type(dtype):
    def change(entry):
        np.save(entry / "values.npy", np.load(entry / "values.npy").astype(dtype))
        rewrite_digest(entry)

    return change


def rewrite_digest(entry):
    cache.write_record(entry / "values.npy", 1.0)


def fewer_rows(entry):
    np.save(entry / "values.npy", np.load(entry / "values.npy")[:, :2])
    rewrite_digest(entry)


def a_file(entry):
    shutil.rmtree(entry)
    entry.write_text("not a folder")


def pickled(entry):
    np.save(entry / "values.npy", np.array([{}], dtype=object), allow_pickle=True)
    rewrite_digest(entry)


DAMAGES = {
    "a flipped bit": flipped,
    "truncated": lambda entry: (entry / "values.npy").write_bytes(b"1234"),
    "no values": lambda entry: (entry / "values.npy").unlink(),
    "no record": lambda entry: (entry / "entry.json").unlink(),
    "an odd record": lambda entry: (entry / "entry.json").write_text("[]"),
    "half precision": as_type(np.float16),
    "fewer rows": fewer_rows,
    "a file": a_file,
    "a pickle": pickled,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_computed_again(damage, data, classifier, tmp_path):
    first = cached_features(classifier, data, "valid", cache_path=tmp_path)
    (entry,) = tmp_path.iterdir()
    DAMAGES[damage](entry)
    again = cached_features(classifier, data, "valid", cache_path=tmp_path)
    assert not again.from_cache
    assert torch.equal(again.values, first.values)
    assert list(tmp_path.iterdir()) == [entry]
    assert cached_features(classifier, data, "valid", cache_path=tmp_path).from_cache


def test_an_interrupted_extraction_leaves_no_entry(data, classifier, monkeypatch, tmp_path):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "digest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached_features(classifier, data, "valid", cache_path=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_features_above_the_memory_limit_are_mapped_and_the_same(data, classifier, tmp_path):
    options = {"cache_path": tmp_path, "views": 8}
    in_memory = cached_features(classifier, data, "valid", **options)
    shutil.rmtree(next(tmp_path.iterdir()))
    for _ in range(2):  # computed, then read
        mapped = cached_features(classifier, data, "valid", memory_limit_bytes=10, **options)
        assert str(tmp_path) in Path("/proc/self/maps").read_text()
        assert torch.equal(mapped.values, in_memory.values)


def test_features_that_are_not_finite_are_one_clear_error(data, tmp_path):
    classifier = tiny_classifier(28)
    with torch.no_grad():
        classifier.backbone.norm.bias[0] = torch.nan
    with pytest.raises(InputError, match="features of chips 0 to 3 are not finite"):
        cached_features(classifier, data, "valid", cache_path=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_forward_pass_leaves_the_classifier_where_it_was(data, classifier):
    moved = []

    class Watched(torch.nn.Module):
        config, backbone = classifier.config, classifier.backbone

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def to(self, device):
            moved.append(str(device))
            return self

        def features(self, chips):
            return classifier.features(chips)

    extract_features(Watched(), data.dataset("valid", 28), device="cpu")
    assert moved == ["cpu", "cpu"]


# --- Baselines and pictures ----------------------------------------------------------------------


class Chips(torch.utils.data.Dataset):
    """A data set of given chips."""

    def __init__(self, chips):
        self.chips = chips

    def __len__(self):
        return len(self.chips)

    def __getitem__(self, index):
        return self.chips[index], 0


def test_colour_statistics_by_hand():
    """Bands of one chip: 0 to 10 in steps of one (11 pixels), and a constant 7."""
    chip = torch.stack([torch.arange(11), torch.full((11,), 7)]).view(2, 1, 11).to(torch.uint8)
    (row,) = colour_statistics(Chips([chip]))
    # Per statistic, both bands: mean, standard deviation, then the three quantiles.
    expected = [5, 7, np.sqrt(10), 0, 1, 7, 5, 7, 9, 7]
    np.testing.assert_allclose(row, expected, atol=1e-12)


def test_colour_statistics_of_a_split(data):
    statistics = colour_statistics(data.dataset("train", 28))
    assert statistics.shape == (12, 15)
    assert (statistics[6:, :3] > statistics[:6, :3].max()).all()  # class 1 is made brighter


def test_logistic_probe_learns_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, 300)
    # Columns of very different size: standardisation has to bring them together.
    informative = 1e-4 * (np.eye(3)[targets] + 0.1 * rng.normal(size=(300, 3)))
    noise = 1e4 * rng.normal(size=(300, 3))
    train = np.concatenate([informative, noise], axis=1)
    probabilities = logistic_probe(train[:200], targets[:200], train[200:])
    assert probabilities.shape == (100, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert (probabilities.argmax(axis=1) == targets[200:]).all()
    chance = logistic_probe(noise[:200], targets[:200], noise[200:])
    assert (chance.argmax(axis=1) == targets[200:]).mean() < 0.5


def test_token_components_are_colours_of_tokens():
    """Two flat halves far apart: colours are equal within a half and differ between halves."""
    classifier = tiny_classifier(56)
    chips = torch.zeros(2, 3, 56, 56, dtype=torch.uint8)
    chips[1] = 255
    colours = token_components(classifier, chips)
    assert colours.shape == (2, 56, 56, 3)
    assert colours.min() >= 0 and colours.max() <= 1
    first = np.abs(colours[0].mean(axis=(0, 1)) - colours[1].mean(axis=(0, 1)))
    assert first[0] > 0.5
