"""Faults in backbones, their weights, and files of classifiers."""

from helpers.models.classifier import ClassifierConfig, create_classifier
from helpers.models.files import save_classifier
from tests.faults.fault import Fault
from tests.faults.rows_ground import F, chips

BENCH = "production_benchmarking --data_path data --model_path model.safetensors"


def model_of_a_run_elsewhere(folder):
    config = ClassifierConfig("example", "random", 28, (0, 1, 2), ("no_tree", "tree"))
    run = {"run": "../../r", "backbone": "b", "config": {}}
    save_classifier(create_classifier(config), folder / "model.safetensors", run)


ROWS = [
    Fault("unknown backbone", chips, f"{F} --backbone dinov4", ("backbone: 'dinov4' is unknown",)),
    Fault("no such weights", chips, f"{F} --weights nothing.pth", ("no such file: nothing.pth",)),
    Fault("no model", chips, BENCH, ("no such file or folder: model.safetensors",)),
    Fault("run elsewhere", model_of_a_run_elsewhere, BENCH, ("run: '../../r'", "plain")),
]
