"""Faults of a training run and of a probe: parameters, earlier runs, checkpoints, disks, Ctrl-C."""

import errno
import os
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch

from helpers.evaluation.baselines import baselines
from helpers.training import jobs, methods
from helpers.training.config import RunConfig
from tests.fake_data import class_folders, manifest_rows, split_folders
from tests.faults.fault import Fault
from tests.faults.rows_ground import chips

BASIC = "--data_path data --image_size 28 --device cpu"
F = f"finetune {BASIC} --head_inputs cls --learning_rates 0.01 --epochs 3 --run_name trial"
L = (
    f"finetune {BASIC} --method lora --epochs 2 --batch_size 16 --learning_rate 0.01 "
    "--precision fp32 --run_name trial"
)
SKIP = "--on_unreadable skip"
PROBE = f"probe {BASIC} --neighbours 2"


@cache
def trained(command, saved):
    """A folder with data and what the command left, or was about to leave, in `runs`."""
    folder = Path(mkdtemp())
    chips(folder)
    config = RunConfig.from_arguments("", command.split()[1:])
    places = {f"{kind}_path": str(folder / getattr(config, f"{kind}_path"))
              for kind in ("data", "output", "history", "cache")}  # fmt: skip
    config = config.model_copy(update=places)
    data = config.data()
    baselines(config, data, report=lambda line: None)
    train = jobs.finished if saved else methods.train
    train(config, data, report=lambda line: None)
    return folder


def after(command, change=lambda runs: None, saved=True):
    """What a command left, finished or killed before it was saved; then a change to its files."""

    def make(folder):
        shutil.copytree(trained(command, saved), folder, dirs_exist_ok=True)
        change(folder / "runs")

    return make


def killed(change=lambda runs: None):
    return after(L, change, saved=False)


def checkpoint(**changes):
    """A change to the contents of a checkpoint."""

    def change(runs):
        path = runs / "trial/checkpoint.pt"
        torch.save(torch.load(path, weights_only=True) | changes, path)

    return change


class Trap:
    """Writes a file where it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def trap(name):
    def make(folder):
        chips(folder)
        torch.save({"norm.weight": Trap()}, folder / name)

    return make


def truncated(name):
    def change(runs):
        path = runs / name
        path.write_bytes(path.read_bytes()[:500])

    return change


def other_adapter(runs):
    path = runs / "trial/adapter/adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 1000'))


def labels(*names):
    """A manifest whose classes have these names."""

    def make(folder):
        rows = manifest_rows(folder / "data")
        rows["label"] = rows.label.map(dict(zip(sorted(set(rows.label)), names, strict=True)))
        rows.to_csv(folder / "data/manifest.csv", index=False)

    return make


def one_image_in_two_splits(folder):
    root = split_folders(folder / "data")
    (root / "test/tree/copy.png").write_bytes((root / "train/tree/000.png").read_bytes())


def one_unreadable(folder):
    class_folders(folder / "data")
    (folder / "data/tree/000.png").write_bytes(b"PNG")


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/trial")


def interrupt(*_, **__):
    raise KeyboardInterrupt


RECORD = "training_history/trial.json"
DIVERGES = L.replace("0.01", "1e30")

ROWS = [
    # Parameters
    Fault("no epoch", chips, f"{F} --epochs 0", ("epochs: ",)),
    Fault("a negative rate", chips, f"{L} --learning_rate -1", ("learning_rate: ",)),
    Fault("no training chips", chips, f"{F} --train_fraction 0", ("train_fraction: ",)),
    Fault("unknown head input", chips, f"{F} --head_inputs cls patch", ("head_inputs: ",)),
    Fault("rank of nothing", chips, f"{L} --lora_rank 0", ("lora_rank: 0 is not between 1 and",)),
    Fault("unknown layers", chips, f"{L} --lora_targets q", ("lora_targets: ", "fc1, fc2, proj")),
    Fault("all dropped", chips, f"{L} --lora_dropout 1", ("lora_dropout: ",)),
    Fault("no multiple of a patch", chips, f"{F} --image_size 30", ("image_size: 30", "14")),
    Fault("half precision on a CPU", chips, f"{L} --precision fp16", ("fp16 needs a GPU",)),
    Fault(
        "a GPU that is not there",
        chips,
        f"{F} --device cuda",
        ("device: cuda was asked for",),
        patch=("torch.cuda.is_available", lambda: False),
    ),
    Fault(
        "a tracker that is not there",
        chips,
        f"{F} --tracker wandb",
        ("tracker: wandb is not installed",),
        patch=("helpers.training.config.find_spec", lambda name: None),
    ),
    Fault("a run elsewhere", chips, f"{F} --run_name ../x", ("run_name: ", "plain file name")),
    # Data
    Fault("no data", None, F, ("data_path: data does not exist",)),
    Fault("probe: no data", None, PROBE, ("data_path: data does not exist",)),
    Fault("the class none", labels("none", "NA"), f"{F} --positive_class none", ("wrote",), 0),
    Fault("leakage", one_image_in_two_splits, F, ("WARNING: leakage: 2 chips are byte-iden",), 0),
    Fault("probe: leakage", one_image_in_two_splits, PROBE, ("WARNING: leakage: 2 chips",), 0),
    Fault("a chip that cannot be read", one_unreadable, f"{F} {SKIP}",
          ("WARNING: 1 unreadable",), 0),
    # Weights
    Fault("pickled weights", trap("w.pth"), f"{F} --weights w.pth", ("w.pth",)),
    Fault("probe: pickled weights", trap("w.pth"), f"{PROBE} --weights w.pth", ("w.pth",)),
    Fault("probe: no weights", chips, f"{PROBE} --weights w.pth", ("no such file: w.pth",)),
    # Earlier runs
    Fault("a run on other data", after(F), f"{F} --bands 0 1", ("data_fingerprint was",)),
    Fault("a record of something else", after(F, lambda runs: (runs / RECORD).write_text("{}")), F,
          ("trial.json: not a record of this project",)),
    Fault("a record cut off", after(F, truncated(RECORD)), F, ("not a record of this project",)),
    Fault("its adapter altered: trained anew", after(L, other_adapter), f"{L} --resume", ("wrote",),
          0),
    # Checkpoints
    Fault("resume of nothing", chips, f"{F} --resume", ("wrote",), 0),
    Fault("a pickled checkpoint", killed(checkpoint(random=Trap())), f"{L} --resume",
          ("not a checkpoint of this project",)),
    Fault("a folder for a checkpoint", lambda folder: (
        chips(folder), (folder / "runs/trial/checkpoint.pt").mkdir(parents=True)), F,
        ("checkpoint.pt: is a folder",)),
    # While it runs
    Fault("a loss that is not finite", after(L), DIVERGES + " --overwrite",
          ("loss is not finite at epoch 2", "lower the learning rate")),
    Fault("nothing learned", chips, f"{F} --learning_rates 1e-30 --weight_decays 0",
          ("trial: no better than chance",)),
    Fault("disk full at the checkpoint", chips, L, ("No space left",), patch=("torch.save", full)),
    Fault("disk full at the weights", after(F), f"{F} --seed 1 --overwrite", ("No space left",),
          patch=("helpers.models.files.save_file", full)),
    Fault("disk full at the features", chips, F, ("No space left",),
          patch=("numpy.lib.format.open_memmap", full)),
    Fault("Ctrl-C in a step", killed(), L, ("interrupted",), 130,
          patch=("helpers.training.loop.Loop.step", interrupt)),
    Fault("probe: Ctrl-C", chips, PROBE, ("interrupted",), 130,
          patch=("helpers.evaluation.baselines.split_features", interrupt)),
]  # fmt: skip
