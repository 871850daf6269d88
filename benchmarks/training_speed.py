"""LoRA training speed: a plain loop against this project, alternating in one run.

    python -m benchmarks.training_speed [--rounds 6] [--steps 4]

The plain loop is the usual notebook's: fp32, one process that decodes and resizes the images of
every batch, the loss fetched with `.item()` per batch. The project's step runs in every precision
that the device has, as it is and with `torch.compile`. All train the same backbone with the same
PEFT adapter, batch and data, with random weights where none are embedded (speed does not depend on
them). Writes `benchmark_results/training_speed.csv` and `.json`.

The share of the matmul rate is FLOPs per image x images per second / measured rate of the loop's
precision. The FLOPs of a step are counted by torch in the matrix products of forward and backward
pass: with frozen weights about twice the forward pass (no gradients of frozen weights), plus the
small ones of the adapter.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from helpers import InputError
from helpers.benchmarking.limits import machine_limits
from helpers.console import progress_bar
from helpers.data.dataset import ChipData
from helpers.models.adapters import AdapterSettings, add_adapter, first_adapted
from helpers.records import environment, write_json, written_whole
from helpers.training.config import RunConfig
from helpers.training.methods import training_loop, training_setup
from helpers.training.setup import new_classifier
from helpers.training.tokens import FromTokens, bare

# Backbone, weights, pixels, images per step.
CPU_CASES = (
    ("example", "pretrained", 98, 32),
    ("dinov2_vits14", "random", 224, 16),
    ("dinov2_vitl14", "random", 196, 4),
)
GPU_CASES = tuple(
    ("dinov2_vitl14", "random", size, batch) for size in (196, 224) for batch in (32, 128, 256)
)
RESULTS = Path("benchmark_results")


def plain_loop(config: RunConfig, data: ChipData) -> Iterator[None]:
    """Train step by step as a plain notebook does; each `next` is one step."""
    device = config.torch_device
    model = add_adapter(new_classifier(config, data), AdapterSettings()).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loader = DataLoader(
        data.dataset("train", config.image_size), config.batch_size, shuffle=True, drop_last=True
    )
    model.train()
    total = 0.0
    while True:
        for chips, targets in loader:
            loss = functional.cross_entropy(model(chips.to(device)), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
            yield


def project_loop(config: RunConfig, data: ChipData, compiled: bool) -> Iterator[None]:
    """The steps of `helpers.training.loop` itself, on decoded and augmented chips."""
    loop = training_loop(config.model_copy(update={"augment": True}), data)
    if compiled:
        loop.model = torch.compile(loop.model)
    while True:
        loop.step(*loop.random_batch())
        yield


def step_flops(config: RunConfig, data: ChipData) -> float:
    """FLOPs of a training step per image, of the blocks that it computes, counted on two images."""
    model, _, _ = training_setup(config.model_copy(update={"precision": "fp32"}), data)
    inputs = torch.zeros(2, len(data.bands), config.image_size, config.image_size).byte()
    if block := first_adapted(config.adapted_blocks, len(bare(model).backbone.blocks)):
        inputs = bare(model).tokens(inputs, block).detach()
        model = FromTokens(model, block)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs).sum().backward()
    return counter.get_total_flops() / 2


def all_loops(config: RunConfig, data: ChipData) -> dict[tuple, Iterator[None]]:
    """Every loop by (name, precision, compiled), the plain one first."""
    loops = {("plain", "fp32", False): plain_loop(config, data)}
    for precision in ("fp32", "bf16"):
        run = config.model_copy(update={"precision": precision})
        try:
            run.resolved()
        except InputError:  # the device has no bf16
            continue
        for compiled in (False, True):
            loops["project", precision, compiled] = project_loop(run, data, compiled)
    return loops


def measure(config: RunConfig, rounds: int, steps: int) -> pd.DataFrame:
    """Images per second of every loop, in turns; medians over rounds, ratios within rounds."""
    data = config.data()
    loops = all_loops(config, data)
    rates = {key: [] for key in loops}
    first = {}
    for number in progress_bar(range(rounds + 1), desc=f"{config.backbone} {config.image_size} px"):
        for key, loop in loops.items():
            start = time.perf_counter()
            for _ in range(steps if number else 1):
                next(loop)
            if config.torch_device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            if number:
                rates[key].append(steps * config.batch_size / seconds)
            else:  # building, compiling and warming up
                first[key] = seconds
    limits = machine_limits(config.torch_device, torch.get_num_threads())
    flops = step_flops(config, data)
    plain = np.array(next(iter(rates.values())))
    return pd.DataFrame(
        {
            "backbone": config.label,
            "image_size_px": config.image_size,
            "batch_size": config.batch_size,
            "loop": name,
            "precision": precision,
            "compiled": compiled,
            "images_per_second": float(np.median(values)),
            "ratio_to_plain": float(np.median(np.array(values) / plain)),
            "gflop_per_image": flops / 1e9,
            "matmul_gflop_per_second": limits[precision] / 1e9,
            "share_of_matmul_rate": flops * float(np.median(values)) / limits[precision],
            "start_s": first[name, precision, compiled],
        }
        for (name, precision, compiled), values in rates.items()
    )


def main() -> None:
    """Measure every case, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="turns of each loop")
    parser.add_argument("--steps", type=int, default=4, help="training steps in a turn")
    arguments = parser.parse_args()
    tables = []
    for backbone, weights, size, batch in GPU_CASES if torch.cuda.is_available() else CPU_CASES:
        config = RunConfig(
            method="lora",
            backbone=backbone,
            weights=weights,
            image_size=size,
            batch_size=batch,
            head_input="cls",
            precision="fp32",
        )
        tables.append(measure(config, arguments.rounds, arguments.steps))
        torch.compiler.reset()
    table = pd.concat(tables, ignore_index=True)
    print(table.to_string(float_format="{:.3g}".format))
    with written_whole(RESULTS / "training_speed.csv") as part:
        table.to_csv(part, index=False, float_format="%.4g")
    write_json(RESULTS / "training_speed.json", vars(arguments) | {"environment": environment()})


if __name__ == "__main__":
    main()
