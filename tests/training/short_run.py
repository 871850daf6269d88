"""The short run on small chips and a small backbone that the tests of this room train."""

import multiprocessing

import pandas as pd

from helpers.training import jobs
from helpers.training.config import RunConfig

# What two equal runs have in common; the other columns of a history are measured.
NUMBERS = ["epoch", "train_loss", "valid_loss", "train_acc", "valid_acc", "valid_auroc"]


def config_for(data, folder, **parameters):
    """A short run, everything below one folder."""
    defaults = {
        "data_path": str(data),
        "backbone": "timm:test_vit",  # six blocks of width 64
        "weights": "random",
        "image_size": 32,
        "method": "lora",
        "epochs": 4,
        "patience": 4,
        "batch_size": 16,
        "precision": "fp32",
        "device": "cpu",
        "output_path": str(folder / "models"),
        "history_path": str(folder / "history"),
        "cache_path": str(folder / "cache"),
        "run_name": "trial",
    }
    return RunConfig.checked(**defaults | parameters)


def run(config):
    """Do the whole job quietly."""
    finished, _ = jobs.finished(config, config.data(), report=lambda line: None)
    return finished


def history_of(config):
    """What two equal runs have in common, as written."""
    return pd.read_csv(f"{config.history_path}/{config.name}.csv")[NUMBERS]


def fresh_processes():
    """Processes that do not begin with this one's memory, but have imported what training needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.training.alone"])
    return context
