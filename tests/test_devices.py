"""Everything that computes on a GPU, on a fake one: a mix of devices raises (`fake_gpu`)."""

import copy

import numpy as np
import pytest
import torch

from helpers.evaluation import inspection, robustness
from helpers.training.features import extract_features
from helpers.training.methods import train, training_loop
from helpers.training.processes import processes
from tests.fake_data import manifest_folder
from tests.fake_gpu import fake_gpu
from tests.models.parity import tiny_architectures, tiny_classifier
from tests.training.short_run import config_for

SIZE = 28


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return manifest_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(root, tmp_path):
    options = {"backbone": "dinov2_vits14", "image_size": SIZE, "learning_rates": 1e-3,
               "weight_decays": 0.0, "epochs": 1, "batch_size": 12, "device": "cuda"}  # fmt: skip
    return lambda **parameters: config_for(root, tmp_path, **options | parameters)


@pytest.fixture(scope="module")
def classifiers():
    """Made before there is a fake GPU, in which `torch.load` would read nothing."""
    return {size: tiny_classifier(size) for size in (SIZE, 2 * SIZE)}


@pytest.fixture
def gpu(classifiers):
    with fake_gpu() as gpu, tiny_architectures():
        yield gpu


@pytest.fixture
def data(config):
    return config().data()


def devices(module):
    return {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}


def test_the_fake_gpu_tells_devices_apart(gpu):
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert there.device.type == "cuda" and here.to("cuda").device == there.device
    assert there.cpu().numpy().shape == (3,) and (here + here).tolist() == [2, 2, 2]
    here[:] = there
    assert there[torch.tensor([0, 1])].device == there.device
    assert torch.nn.Linear(3, 1).to("cuda")(there).shape == (1,)
    for mixed in (
        lambda: here + there,
        lambda: torch.cat([here, there]),
        lambda: torch.nn.Linear(3, 1)(there),
        lambda: torch.nn.functional.cross_entropy(there[None], torch.zeros(1).long()),
        lambda: there.numpy(),
    ):
        with pytest.raises(RuntimeError):
            mixed()


@pytest.mark.parametrize(
    "method, precision",
    [("head_only", "fp32"), ("lora", "bf16"), ("dora", "fp32"), ("full", "bf16")],
)
def test_every_method_trains_there_and_ends_on_the_cpu(gpu, config, data, method, precision):
    run_config = config(method=method, precision=precision, augment=method == "lora")
    run = train(run_config, data, report=lambda line: None)
    assert gpu.products > 0
    assert devices(run.classifier) == {"cpu"}
    assert run.adapter is None or devices(run.adapter) == {"cpu"}
    assert len(run.history) and np.isfinite(run.predictions.p_tree).all()


@pytest.mark.parametrize("free, place", [(10**9, "cuda"), (1, "cpu")])
def test_chips_lie_on_the_gpu_where_it_holds_them(config, data, classifiers, free, place):
    run_config = config(method="lora", augment=True, precision="fp32")
    with fake_gpu(free), tiny_architectures():
        loop = training_loop(run_config, data)
        assert loop.train.values.device.type == place
        assert loop.step(*loop.random_batch()).device.type == "cuda"


def test_a_process_computes_where_each_run_says(gpu):
    names = ["cpu", "cuda", "cpu"]
    assert [processes(name).device.type for name in names] == names


@pytest.mark.parametrize("start", ["cpu", "cuda"])
def test_features_are_computed_there_and_nothing_stays(gpu, classifiers, data, start):
    classifier = copy.deepcopy(classifiers[SIZE]).to(start)
    options = {"device": "cuda", "views": 2, "batch_size": 5, "precision": "bf16"}
    found = extract_features(classifier, data.dataset("train", SIZE), **options)
    assert gpu.products > 0 and found.values.device.type == "cpu"
    assert devices(classifier) == {start}


@pytest.mark.parametrize("start", ["cpu", "cuda"])
def test_the_shortcut_check_leaves_the_classifier_where_it_was(gpu, classifiers, data, start):
    classifier = copy.deepcopy(classifiers[SIZE]).to(start)
    table = robustness.shortcut_check(classifier, data, device="cuda")
    assert gpu.products > 0 and len(table)
    assert devices(classifier) == {start}


def test_weight_changes_between_devices(gpu, classifiers):
    before = classifiers[SIZE]
    after = copy.deepcopy(before).to("cuda")
    table = inspection.weight_changes(before, after)
    assert len(table) == 4 * len(before.backbone.blocks)
    assert devices(before) == {"cpu"} and devices(after) == {"cuda"}


@pytest.mark.parametrize("start, device", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_token_pictures_on_another_device(gpu, classifiers, start, device):
    classifier = copy.deepcopy(classifiers[2 * SIZE]).to(start).train()
    chips = torch.randint(256, (2, 3, 2 * SIZE, 2 * SIZE), dtype=torch.uint8)
    colours = inspection.token_components(classifier, chips, device)
    assert colours.shape == (2, 2 * SIZE, 2 * SIZE, 3)
    assert devices(classifier) == {start} and classifier.training
