"""Seconds to a quality: a plain notebook loop, Hugging Face's Trainer, and this project.

    python -m benchmarks.time_to_quality [--data_path example] [--adapted_blocks 6] [--seeds 3]

The ways take turns, every second seed in reverse order, each training in a fresh process from an
empty cache: the same chips, batch, epochs, warm-up, schedule, clipping and validation after every
epoch (`ways`, `hugging_face`).

- `plain`: fp32, chips decoded in every epoch, the loss fetched with `.item()` per batch.
- `trainer`: the Trainer with PEFT in fp32; where bf16 is faster here, `trainer_bf16` too.
- `all_blocks` and `last_<k>`: this project, in what `precision: auto` finds; by default k is that
  of the comparison.
- with `--ways` only those named beside `plain`.
- with `--trial NAME=JSON`, such as `rslora={"method":"rslora"}`: this project, other parameters.

Seconds run from before the weights are read to the end of the last epoch's validation, in all ways
alike: decoding, kept tokens, measured precision and checkpoints are in them; test predictions,
intervals and the files of a finished run are not. `to_quality_s` is the time to the plain loop's
best validation AUROC of that seed less 0.001; `images_per_s` is that of the steps after the first
epoch; the share of the machine's matmul rate is FLOPs per image, counted by torch in the blocks
that a step computes, x images per second / measured rate of the precision. Peak memory is that of
the process while it trains. Intervals draw whole groups where the data name them.

`--sweep` trains five seeds x three ranks by `plain` and `last_<k>`, whose runs share one cache:
compare `all_runs_s`. `--speed_only` takes a few steps of ViT-S/14 at 224 px and ViT-L/14 at 196 px
with random weights. `--dry_run` does the same with few chips, in this process; its numbers mean
nothing. `--figure` draws where an epoch's time goes, `--table` keeps the rows.

Prints one row a run, and as its last line one JSON: by case and way the medians over runs, their
ratios to the plain loop and to the Trainer, and AUROC and its difference to the plain loop over all
runs.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks import ways
from benchmarks.clock import PARTS, Clock
from benchmarks.tables import numbers
from benchmarks.training_speed import CPU_CASES, step_flops
from helpers import InputError
from helpers.benchmarking.limits import machine_limits
from helpers.console import run_command
from helpers.data.dataset import ChipData
from helpers.evaluation.comparison import CompareConfig
from helpers.evaluation.seeds import test_draws, unit
from helpers.metrics import over_seeds
from helpers.records import cpu_name, written_whole
from helpers.training.config import RunConfig
from helpers.training.runs import predictions_table

MARGIN = 0.001  # of AUROC below the plain loop's best that counts as its quality
SWEEP_SEEDS, SWEEP_RANKS = 5, (1, 4, 16)
SPEED_BATCHES, SPEED_EPOCHS = 2, 3  # of --speed_only: the first epoch warms up


def measure(way: str, config: RunConfig, data: ChipData, threads: int) -> tuple[dict, np.ndarray]:
    """What a fresh process does: train, and return the row of a run and its test probabilities."""
    torch.set_num_threads(threads)
    train = ways.plain if way == "plain" else ways.project
    if way in ("trainer", "trainer_bf16"):
        from benchmarks.hugging_face import trainer as train  # before the clock starts
    clock = Clock()
    probabilities = train(config, data, clock)
    images = int((data.manifest.split == "train").sum())
    row = {
        "precision": config.resolved().precision,
        "total_s": clock.epochs[-1]["s"],
        "images_per_s": clock.images_per_s(images),
        "peak_memory_bytes": clock.epochs[-1]["peak_memory_bytes"],
        "epochs": clock.epochs,
    }
    return row | {f"{part}_s": seconds for part, seconds in clock.parts.items()}, probabilities


def few(data: ChipData, chips: int | None) -> ChipData:
    """At most about so many chips of each split, as many of each class, drawn at random."""
    if chips is None:
        return data
    of_class = -(-chips // len(data.classes))
    shuffled = data.manifest.sample(frac=1, random_state=0)
    rows = shuffled.groupby(["split", "target"]).head(of_class).sort_index()
    return replace(data, manifest=rows.reset_index(drop=True))


def alone(*arguments) -> tuple[dict, np.ndarray]:
    """`measure` in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def planned(given: argparse.Namespace) -> dict[str, dict]:
    """Way -> the parameters of its runs, those that all runs share included."""
    shared = {"method": "lora", "device": "cpu", "patience": given.epochs, "epochs": given.epochs}
    names = ("data_path", "group_column", "backbone", "weights", "image_size", "batch_size")
    shared |= {name: getattr(given, name) for name in names}
    last = f"last_{given.adapted_blocks}"
    changes = {
        "plain": {"precision": "fp32"},
        "trainer": {"precision": "fp32"},
        "trainer_bf16": {"precision": "bf16"},
        "all_blocks": {},
        last: {"adapted_blocks": given.adapted_blocks},
    }
    if taken := changes.keys() & dict(given.trial).keys():
        raise InputError(f"trial: {', '.join(taken)} is a way already; give it another name")
    if given.sweep:
        changes = {way: changes[way] for way in ("plain", last)}
    else:
        with tempfile.TemporaryDirectory() as folder:
            config = RunConfig.checked(**shared, output_path=folder)
            if config.resolved().precision != "bf16":
                del changes["trainer_bf16"]
        if given.ways:
            if unknown := set(given.ways) - changes.keys():
                raise InputError(f"ways: {', '.join(unknown)} is none of {', '.join(changes)}")
            changes = {way: changes[way] for way in ("plain", *given.ways)}
        changes |= dict(given.trial)
    return {way: shared | changed for way, changed in changes.items()}


def trained(given: argparse.Namespace, plan: dict, data: ChipData) -> tuple[pd.DataFrame, dict]:
    """Train every way for every seed and rank, in turns.

    Returns:
        One row a run; and by (way, seed, rank) the draws of its test metrics.
    """
    runs = list(itertools.product(range(given.seeds), given.ranks))
    rows, draws = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (seed, rank) in enumerate(runs):
            for way in list(plan)[:: -1 if number % 2 else 1]:
                # Runs of a sweep read one cache; all others begin without.
                place = way if given.sweep else f"{way}_{number}"
                config = RunConfig.checked(
                    **plan[way] | {"seed": seed, "lora_rank": rank},
                    output_path=f"{folder}/{place}",
                    run_name=f"{seed}_{rank}",
                )
                arguments = (way, config, data, torch.get_num_threads())
                row, probabilities = (measure if given.dry_run else alone)(*arguments)
                rows.append({"way": way, "seed": seed, "rank": rank} | row)
                print(numbers({k: v for k, v in rows[-1].items() if k != "epochs"}), flush=True)
                predictions = predictions_table(data, {"test": probabilities})
                draws[way, seed, rank] = test_draws(predictions)
    return pd.DataFrame(rows), draws


def with_quality(table: pd.DataFrame, draws: dict[tuple, dict]) -> pd.DataFrame:
    """Add to each run its seconds to the plain loop's quality, AUROC, and difference to it."""
    best = {
        (row.seed, row.rank): max(epoch["valid_auroc"] for epoch in row.epochs)
        for row in table[table.way == "plain"].itertuples()
    }
    found = []
    for row in table.itertuples():
        target = best[row.seed, row.rank] - MARGIN
        reached = [epoch["s"] for epoch in row.epochs if epoch["valid_auroc"] >= target]
        found.append({"to_quality_s": reached[0] if reached else math.inf})
        found[-1] |= quality(draws, [(row.way, row.seed, row.rank)])
    return table.join(pd.DataFrame(found))


def quality(draws: dict[tuple, dict], runs: list[tuple]) -> dict[str, float]:
    """Test AUROC of some runs and its difference to the plain loop's, means with intervals."""
    tables = {
        "auroc": [draws[run]["auroc"] for run in runs],
        "difference": [draws[run]["auroc"] - draws["plain", *run[1:]]["auroc"] for run in runs],
    }
    return {
        f"{name}{end}": value
        for name, arrays in tables.items()
        for end, value in zip(("", "_low", "_high"), over_seeds(arrays).values(), strict=True)
    }


def summary(
    given: argparse.Namespace, plan: dict, data: ChipData, table: pd.DataFrame, draws: dict
) -> pd.DataFrame:
    """One row a way."""
    by_way = table.drop(columns=["seed", "rank"]).groupby("way", sort=False)
    found = by_way.median(numeric_only=True).assign(all_runs_s=by_way.total_s.sum()).loc[list(plan)]
    found.insert(0, "precision", by_way.precision.first())
    compared = ["images_per_s"]
    if not given.speed_only:
        compared += ["total_s", "all_runs_s", "to_quality_s"]
        found["intervals_draw"] = unit(data.manifest[data.manifest.split == "test"])
    others = [way for way in ("plain", "trainer") if way in plan]
    for column, other in itertools.product(compared, others):
        found[f"{column}_to_{other}"] = found[column] / found[column][other]
    limits = machine_limits("cpu", torch.get_num_threads(), (64,) if given.dry_run else None)
    for way, parameters in plan.items():
        flops = step_flops(RunConfig.checked(**parameters), data)
        found.loc[way, "gflop_per_image"] = flops / 1e9
        rate = limits[found.precision[way]]
        found.loc[way, "share_of_matmul_rate"] = flops * found.images_per_s[way] / rate
        if not given.speed_only:
            pooled = quality(draws, [run for run in draws if run[0] == way])
            found.loc[way, list(pooled)] = list(pooled.values())
    return found


def epoch_figure(found: pd.DataFrame, epochs: int):
    """Where an epoch's seconds go in each way, what is done once shared among the epochs."""
    from matplotlib import pyplot as plt

    columns = [f"{part}_s" for part in PARTS]
    seconds = (found[columns] / epochs).rename(columns=lambda name: name.removesuffix("_s"))
    axis = seconds[::-1].plot.barh(stacked=True, figsize=(9, 0.4 * len(found) + 1.6), width=0.7)
    axis.set(xlabel="seconds an epoch", ylabel="", title=cpu_name())
    axis.legend(ncols=len(columns), loc="upper center", bbox_to_anchor=(0.4, -0.3), frameon=False)
    figure = axis.get_figure()
    figure.set_layout_engine("constrained")
    plt.close(figure)
    return figure


def report(cases: list[argparse.Namespace]) -> None:
    """Train every case, write what was asked for, print the JSON."""
    tables, found, said = {}, {}, {}
    for given in cases:
        plan = planned(given)
        data = few(RunConfig.checked(**plan["plain"]).data(), given.chips)
        table, draws = trained(given, plan, data)
        if not given.speed_only:
            table = with_quality(table, draws)
        case = f"{given.backbone} {given.image_size} px"
        tables[case], found[case] = table, summary(given, plan, data, table, draws)
        rows = json.loads(found[case].to_json(orient="index"))
        said[case] = vars(given) | {"ways": rows}
    if given.table:
        with written_whole(given.table) as part:
            rows = pd.concat(tables, names=["case", "run"]).drop(columns="epochs")
            rows.to_csv(part, float_format="%.6g")
    if given.figure:
        bars = pd.concat(found)
        bars.index = [" ".join(labels) for labels in bars.index]
        with written_whole(given.figure) as part:
            epoch_figure(bars, given.epochs).savefig(part, format="png", dpi=150)
    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads()}
    print(json.dumps(machine | {"cases": said}, default=str))


def trial(text: str) -> tuple[str, dict]:
    """`NAME=JSON` of the command line."""
    name, _, parameters = text.partition("=")
    found = json.loads(parameters)
    if not isinstance(found, dict):
        raise ValueError
    return name, found


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and train every case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_path", default="example")
    parser.add_argument("--group_column", default="group", help="of the manifest")
    parser.add_argument("--backbone", default="example")
    parser.add_argument("--weights", default="pretrained")
    parser.add_argument("--image_size", type=int, default=98)
    parser.add_argument("--batch_size", type=int, default=32)
    blocks = CompareConfig.model_fields["adapted_blocks"].default
    parser.add_argument("--adapted_blocks", type=int, default=blocks, help="of last_<k>")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4])
    parser.add_argument("--chips", type=int, help="of each split, all by default")
    parser.add_argument("--trial", type=trial, action="append", default=[], metavar="NAME=JSON")
    parser.add_argument("--ways", nargs="+", help="beside plain, e.g. last_6; all by default")
    parser.add_argument("--sweep", action="store_true", help="five seeds x three ranks")
    parser.add_argument("--speed_only", action="store_true", help="steps of ViT-S and ViT-L")
    parser.add_argument("--dry_run", action="store_true", help="few chips, in this process")
    parser.add_argument("--table", type=Path, metavar="FILE.csv", help="one row a run")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="an epoch's seconds")
    given = parser.parse_args(arguments)
    if given.sweep and given.ways:
        raise InputError("ways: a sweep has its own two, plain and last_<k>; leave out --ways")
    if given.sweep:
        given.seeds, given.ranks = SWEEP_SEEDS, SWEEP_RANKS
    cases = [given]
    if given.speed_only:
        cases = [
            argparse.Namespace(**vars(given) | {"seeds": 1, "epochs": SPEED_EPOCHS})
            for _ in CPU_CASES[1:]
        ]
        for case, (backbone, weights, size, batch) in zip(cases, CPU_CASES[1:], strict=True):
            case.backbone, case.weights, case.image_size = backbone, weights, size
            case.batch_size, case.chips = batch, SPEED_BATCHES * batch
    for case in cases:
        if given.dry_run:
            case.image_size, case.epochs, case.seeds, case.chips = 28, 2, 1, 8
            case.ranks = case.ranks[:2]
    report(cases)


if __name__ == "__main__":
    run_command(main)
