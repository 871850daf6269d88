"""What is shipped answers as this project does, without it and without torch."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import InputError
from helpers.deployment.scoring import answer_rule, open_model
from helpers.deployment.shipping import ShipConfig, ship
from helpers.deployment.variants.build import build_variants
from helpers.deployment.variants.source import Source
from helpers.models.classifier import ClassifierConfig
from tests.fake_data import make_chip
from tests.fake_weights import lively_classifier, tiny  # noqa: F401  a fixture

SIZE = 28
# Runs the example where neither this project nor torch can be imported.
ALONE = (
    "import runpy, sys; sys.modules |= dict.fromkeys(('torch', 'helpers', 'timm')); "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


@pytest.fixture(scope="module")
def variants(tmp_path_factory, tiny):  # noqa: F811
    config = ClassifierConfig("tiny", "random", SIZE, (2, 0, 1), ("no_tree", "tree"))
    classifier = lively_classifier(config)
    torch.nn.init.normal_(classifier.linear_head.weight, std=0.2)
    batch = torch.from_numpy(np.stack([make_chip(i, size=SIZE) for i in range(16)]))
    examples = (batch, torch.arange(16) % 2)
    folder = tmp_path_factory.mktemp("variants")
    source = Source(classifier, examples, examples, batch, folder)
    names = ("eager_fp32", "onnx_fp32", "openvino_fp32", "structured_40_int8")
    build_variants(source, names, threads=1)
    return folder


@pytest.mark.parametrize("name", ["onnx_fp32", "openvino_fp32", "structured_40_int8"])
def test_the_folder_answers_alone(variants, name, tmp_path):
    model = variants / f"{name}.json"
    options = {"temperature": 2, "threshold": "0.4"}
    config = ShipConfig.checked(model_path=str(model), output=str(tmp_path / "deploy"), **options)
    folder = ship(config)
    images = [make_chip(i, size=SIZE) for i in range(4)]
    for number, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / f"{number}.png")
    np.save(tmp_path / "4.npy", images[0])
    names = [f"{number}.png" for number in range(4)] + ["4.npy"]
    out = subprocess.run(
        [sys.executable, "-c", ALONE, folder / "predict.py", *names],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    said = [json.loads(line) for line in out.splitlines()]
    scorer = open_model(model)
    chips = np.stack([*images, images[0]])[:, scorer.classifier.bands]
    probabilities, classes, _ = answer_rule(scorer, config)(scorer.logits(chips))
    assert [line["image"] for line in said] == names
    np.testing.assert_allclose([line["p"] for line in said], probabilities, atol=1e-3)
    assert [line["answer"] for line in said] == [scorer.classifier.classes[c] for c in classes]
    check = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    subprocess.run(check, cwd=folder, check=True)


def test_only_what_runs_without_this_project_is_shipped(variants, tmp_path):
    config = ShipConfig.checked(
        model_path=str(variants / "eager_fp32.json"), output=str(tmp_path / "deploy")
    )
    with pytest.raises(
        InputError, match=r"model_path: .*eager_fp32.json needs this project to run"
    ):
        ship(config)
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_there_is_kept(variants, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    config = ShipConfig.checked(
        model_path=str(variants / "onnx_fp32.json"), output=str(tmp_path), overwrite=False
    )
    with pytest.raises(InputError, match=r"output: .* is there already"):
        ship(config)
    assert (tmp_path / "notes.txt").read_text() == "mine"
