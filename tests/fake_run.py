"""The folder of a run as training leaves it, without any training."""

import json

import pandas as pd
import torch

from helpers.models.adapters import AdapterSettings, add_adapter, save_adapter
from helpers.models.backbones import weights_digest
from helpers.models.classifier import ClassifierConfig, create_classifier
from helpers.models.files import save_classifier
from helpers.records import ROOT
from helpers.training.card import shareable, write_card

RECORD = json.loads((ROOT / "training_history/head_only_example_example_seed0.json").read_text())
CONFIG = ClassifierConfig(
    "example", "random", 28, (0, 1, 2), ("no_tree", "tree"),
    chip_size=28, chip_bands=3, chip_dtype="uint8",
)  # fmt: skip


def run_folder(folder, adapter=False, **changes):
    """Weights (or an adapter besides), card and predictions; `changes` of the published record."""
    torch.manual_seed(0)
    record = shareable(RECORD | changes)
    save_classifier(create_classifier(CONFIG), folder / "model_final.safetensors", record)
    if adapter:
        classifier = create_classifier(CONFIG)
        digest = weights_digest(classifier.backbone)
        model = add_adapter(classifier, AdapterSettings(rank=1))
        save_adapter(model, folder / "adapter", digest, record)
    write_card(folder, record, "model_final.safetensors")
    rows = pd.DataFrame({"split": ["valid", "valid", "test"], "img_path": ["a/secret.png"] * 3})
    rows = rows.assign(group="secret place", label="tree", target=1, predicted=1)
    rows["p_no_tree"], rows["p_tree"] = 0.25, 0.75
    rows.to_parquet(folder / "predictions.parquet", index=False)
    return folder
