"""Seconds to a quality: a plain notebook loop, this project on all blocks, and on the last ones.

    python -m benchmarks.time_to_quality [--data_path example] [--adapted_blocks 4] [--seeds 3]

The ways take turns, each training in a fresh process from an empty cache: the same backbone, chips,
batch, epochs and learning rate. The plain loop computes in fp32, decodes every epoch and fetches
the loss with `.item()` per batch; the project's ways compute in what `precision: auto` finds.
Seconds begin with the first chip that is read and hold decoding, kept tokens and validation.
`to_quality_s` is the time to the plain loop's best validation AUROC of that seed less 0.001.

Prints one row a way and seed, and as its last line one JSON: medians over seeds by way, their
ratio to the plain loop, and the share of the machine's matmul rate that the plain loop's FLOPs are.
"""

import argparse
import copy
import json
import multiprocessing
import tempfile
import time
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from benchmarks.training_speed import step_flops
from helpers.benchmarking.limits import machine_limits
from helpers.data.dataset import ChipData
from helpers.metrics import paired_difference, weighted_metrics
from helpers.models.adapters import AdapterSettings, add_adapter
from helpers.records import cpu_name, peak_memory_bytes
from helpers.training.config import RunConfig
from helpers.training.methods import train
from helpers.training.progress import Progress
from helpers.training.setup import new_classifier

MARGIN = 0.001  # of AUROC below the plain loop's best that counts as its quality


def plain_way(config: RunConfig, data: ChipData) -> tuple[list[dict], np.ndarray]:
    """Train as a plain notebook does; return the epochs and the test probabilities."""
    start, epochs, best = time.perf_counter(), [], (np.inf, None)
    torch.manual_seed(config.seed)
    model = add_adapter(new_classifier(config, data), AdapterSettings())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    splits = {
        name: DataLoader(data.dataset(name, config.image_size), config.batch_size, name == "train")
        for name in ("train", "valid", "test")
    }
    for _ in range(config.epochs):
        model.train()
        total = 0.0
        for chips, targets in splits["train"]:
            loss = functional.cross_entropy(model(chips), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        probabilities, targets = _predicted(model, splits["valid"])
        epochs.append(
            {"s": time.perf_counter() - start, "valid_auroc": _auroc(targets, probabilities)}
        )
        loss = -np.log(probabilities[np.arange(len(targets)), targets].clip(1e-12)).mean()
        if loss < best[0]:
            best = loss, copy.deepcopy([p.detach() for p in trained])
    with torch.no_grad():
        for parameter, value in zip(trained, best[1], strict=True):
            parameter.copy_(value)
    return epochs, _predicted(model, splits["test"])[0]


@torch.inference_mode()
def _predicted(model, loader: DataLoader) -> tuple[np.ndarray, np.ndarray]:
    model.eval()
    parts = [(model(chips).softmax(1), targets) for chips, targets in loader]
    return tuple(torch.cat(tensors).numpy() for tensors in zip(*parts, strict=True))


def _auroc(targets: np.ndarray, probabilities: np.ndarray) -> float:
    weights = np.ones((1, len(targets)))
    return float(weighted_metrics(targets, probabilities, weights)["auroc"][0])


def project_way(config: RunConfig, data: ChipData) -> tuple[list[dict], np.ndarray]:
    """The same of a run of this project."""
    start, epochs, record = time.perf_counter(), [], Progress.record

    def stamped(progress: Progress, *arguments) -> None:
        record(progress, *arguments)
        auroc = progress.histories[0][-1]["valid_auroc"]
        epochs.append({"s": time.perf_counter() - start, "valid_auroc": auroc})

    with mock.patch.object(Progress, "record", stamped):
        run = train(config, data, report=lambda line: None)
    return epochs, run.test_predictions.filter(regex="^p_").to_numpy()


def measure(sender, way: str, config: RunConfig, threads: int) -> None:
    """What a fresh process does."""
    torch.set_num_threads(threads)
    data = config.data()
    start = time.perf_counter()
    epochs, probabilities = (plain_way if way == "plain" else project_way)(config, data)
    row = {"total_s": time.perf_counter() - start, "peak_memory_bytes": peak_memory_bytes("cpu")}
    sender.send((row, epochs, probabilities))


def main() -> None:
    """Train every way for every seed, print the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_path", default="example")
    parser.add_argument("--backbone", default="example")
    parser.add_argument("--image_size", type=int, default=98)
    parser.add_argument("--adapted_blocks", type=int, default=4, help="of the project's last way")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--chips", type=int, help="to train on, all by default")
    given = parser.parse_args()
    shared = {"method": "lora", "device": "cpu", "patience": given.epochs, "epochs": given.epochs}
    shared |= {name: getattr(given, name) for name in ("data_path", "backbone", "image_size")}
    data = RunConfig.checked(**shared).data()
    chips = int((data.manifest.split == "train").sum())
    shared["train_fraction"] = min(1.0, (given.chips or chips) / chips)
    test = data.manifest[data.manifest.split == "test"]
    ways = {"plain": {}, "all_blocks": {}, f"last_{given.adapted_blocks}": {}}
    ways[f"last_{given.adapted_blocks}"] = {"adapted_blocks": given.adapted_blocks}
    context, rows = multiprocessing.get_context("spawn"), []
    for seed in range(given.seeds):
        for way, changes in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                config = RunConfig.checked(**shared | changes, seed=seed, output_path=folder)
                receiver, sender = context.Pipe(duplex=False)
                arguments = (sender, way, config, torch.get_num_threads())
                process = context.Process(target=measure, args=arguments)
                process.start()
                sender.close()
                row, epochs, probabilities = receiver.recv()
                process.join()
            if way == "plain":
                target = max(epoch["valid_auroc"] for epoch in epochs) - MARGIN
                plain = probabilities
            reached = [epoch["s"] for epoch in epochs if epoch["valid_auroc"] >= target]
            trained = round(shared["train_fraction"] * chips) * len(epochs)
            row |= {"images_per_s": trained / epochs[-1]["s"]}
            row |= {"to_quality_s": reached[0] if reached else None}
            groups = test.group.to_numpy() if (test.group != "").all() else None
            values = test.target.to_numpy(), plain, probabilities
            difference = paired_difference(*values, "auroc", groups=groups)
            row |= {"test_auroc": _auroc(values[0], probabilities), "seed": seed, "way": way}
            row |= {f"difference_{name}": difference[name] for name in ("value", "low", "high")}
            rows.append(row)
            print(pd.Series(row).to_frame().T.to_string(index=False, header=len(rows) == 1))
    table = pd.DataFrame(rows)
    medians = table.drop(columns="seed").groupby("way", sort=False).median(numeric_only=True)
    rate = machine_limits("cpu", torch.get_num_threads())["fp32"]
    flops = step_flops(RunConfig.checked(**shared), data)
    medians["total_to_plain"] = medians.total_s / medians.total_s["plain"]
    medians["share_of_matmul_rate"] = medians.images_per_s * flops / rate
    said = {"cpu": cpu_name(), "threads": torch.get_num_threads(), **vars(given)}
    print(json.dumps(said | {"ways": json.loads(medians.to_json(orient="index"))}))


if __name__ == "__main__":
    main()
