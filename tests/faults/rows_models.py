"""Faults in backbones, their weights, and files of classifiers."""

import json
from dataclasses import asdict

import torch
from safetensors.torch import save_file

from helpers.models.classifier import ClassifierConfig, create_classifier
from helpers.models.files import save_classifier
from tests.fake_data import class_folders
from tests.faults.fault import Fault

F = "finetune --data_path data --image_size 28 --head_inputs cls --learning_rates 0.01"
BENCH = "production_benchmarking --data_path data --model_path model.safetensors"
CONFIG = ClassifierConfig("example", "random", 28, (0, 1, 2), ("no_tree", "tree"))


def chips(folder):
    class_folders(folder / "data")


def weights(state):
    def make(folder):
        chips(folder)
        torch.save(state, folder / "w.pth")

    return make


def model(provenance=None, **changes):
    """A model file in which fields of the configuration, or the whole provenance, are changed."""

    def make(folder):
        classifier = create_classifier(CONFIG)
        save_classifier(classifier, folder / "model.safetensors", {})
        metadata = {
            "config": json.dumps(asdict(CONFIG) | changes),
            "provenance": json.dumps(provenance),
        }
        save_file(classifier.state_dict(), folder / "model.safetensors", metadata=metadata)

    return make


RUN = {"run": "r", "backbone": "b", "config": {}}
META = torch.empty(2, device="meta")
NAN = torch.full((192,), float("nan"))

ROWS = [
    Fault("unknown backbone", chips, f"{F} --backbone dinov4", ("backbone: 'dinov4' is unknown",)),
    Fault("backbone without CLS", chips, f"{F} --backbone timm:resnet18", ("no plain ViT",)),
    Fault("size of another patch", chips, f"{F} --backbone dinov3_vits16", ("16", "32")),
    Fault("no such weights", chips, f"{F} --weights nothing.pth", ("no such file: nothing.pth",)),
    Fault("empty tensors", weights({"a": META}), f"{F} --weights w.pth", ("empty tensors (a)",)),
    Fault("weights of NaN", weights({"norm.weight": NAN}), f"{F} --weights w.pth", ("missing",)),
    Fault("no model", chips, BENCH, ("no such file or folder: model.safetensors",)),
    Fault("std of zero", model(RUN, std=[1, 0, 1]), BENCH, ("std above zero",)),
    Fault("negative band", model(RUN, bands=[-1, 0, 1]), BENCH, ("bands: ",)),
    Fault("mean in words", model(RUN, mean=["1", "2", "3"]), BENCH, ("mean", "number")),
    Fault("backbone of HTML", model(RUN, backbone="<img src=x>"), BENCH, ("is unknown",)),
    Fault("provenance of null", model(None), BENCH, ("provenance",)),
    Fault("provenance without a run", model({}), BENCH, ("provenance lacks run",)),
    Fault("run elsewhere", model(RUN | {"run": "../../r"}), BENCH, ("run: '../../r'", "plain")),
]
