"""What is kept of a task's evidence: one record and one file of predictions, and their summary.

Tables, figures and sentences come from these two files alone.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers import InputError
from helpers.evaluation.baselines import (
    acquisition_statistics,
    baselines,
    read_baseline_predictions,
)
from helpers.evaluation.evidence import Collection
from helpers.evaluation.matching import imbalance, matched_pairs
from helpers.evaluation.robustness import place_coordinates
from helpers.evaluation.seeds import Draws, draws_of, method_gains, method_means
from helpers.evaluation.task import REFERENCE, Trial
from helpers.metrics import over_seeds
from helpers.models.adapters import PEFT_METHODS
from helpers.records import ROOT, environment, write_json, written_whole
from helpers.training.runs import Run

PUBLISHED = ROOT / "reports" / "evidence"
SHOWN = ("accuracy", "auroc")
TRIVIAL = ("majority class", "colour statistics", "acquisition statistics")  # know no shapes


@dataclass(frozen=True)
class Evidence:
    """A task's record and predictions."""

    record: dict[str, Any]  # as JSON has it (`gather`)
    predictions: pd.DataFrame  # of all runs, with `run` and `pair` (chips of a like acquisition)

    @cached_property
    def _tables(self) -> dict[str, pd.DataFrame]:
        return {
            name: rows.drop(columns="run").reset_index(drop=True)
            for name, rows in self.predictions.groupby("run", sort=False, observed=True)
        }

    def runs(self, fraction: float = 1.0, random_split: bool = False) -> dict[tuple, Run]:
        """Runs by method and seed, as `seeds.method_means` takes them."""
        return {
            (entry["method"], entry["seed"]): self._run(entry)
            for entry in self.record["runs"]
            if (entry["train_fraction"], entry["random_split"]) == (fraction, random_split)
        }

    def shapes(self) -> dict[tuple, Run]:
        """Runs with other ranks and layers, by shape and seed."""
        entries = self.record["shapes"]
        return {(entry["method"], entry["seed"]): self._run(entry) for entry in entries}

    def _run(self, entry: dict[str, Any]) -> Run:
        return Run(None, None, pd.DataFrame(), self._tables[entry["run"]], entry)

    def trivial(self) -> dict[str, pd.DataFrame]:
        """Test predictions of what knows no shapes, by name."""
        return {name: self._tables[name] for name in TRIVIAL}


def read_evidence(name: str, folder: Path = PUBLISHED) -> Evidence:
    """The two files of a task.

    Raises:
        InputError: one is missing or damaged.
    """
    path = folder / f"{name}.json"
    try:
        record = json.loads(path.read_text())
        return Evidence(record, pd.read_parquet(path.with_suffix(".parquet")))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no evidence ({error}); make evidence writes it") from error


def published_evidence() -> dict[str, Evidence]:
    """The evidence on every task, by name."""
    return {path.stem: read_evidence(path.stem) for path in sorted(PUBLISHED.glob("*.json"))}


def gather(collection: Collection, folder: Path = PUBLISHED) -> Evidence:
    """Write what a collection, its learning rates chosen, has done so far; return it.

    First `<task>.parquet`, then `<task>.json`.
    """
    task, data = collection.task, collection.data
    done = collection.published()
    trial = next(iter(done))
    config = collection.config(trial)
    of_data = baselines(config, data, collection.report)
    tables = {trial.name: run.predictions for trial, run in done.items()}
    tables |= read_baseline_predictions(config)
    predictions = pd.concat([table.assign(run=name) for name, table in tables.items()])
    predictions["run"] = predictions["run"].astype("category")
    entries = [
        entry(trial, run, collection.is_measured(trial), collection.config(trial).epochs)
        for trial, run in done.items()
    ]
    test = data.manifest[data.manifest.split == "test"]
    grouped = data.manifest[data.manifest.group != ""]
    record = {
        "task": task.name,
        "settings": task.model_dump(mode="json"),
        "data_fingerprint": data.fingerprint,
        "classes": list(data.classes),
        "chips": data.manifest["split"].value_counts().to_dict(),
        "places": grouped.groupby("split").group.nunique().to_dict(),
        "leaks": data.leaks,
        "backbone": config.label,
        "choices": {method: asdict(choice) for method, choice in collection.choices.items()},
        "trials": [
            row | {"chosen": collection.choices[row["method"]].rate == row["learning_rate"]}
            for row in collection.trials
        ],
        "baselines": of_data["test"],
        "runs": [one for one in entries if one["method"] in task.methods],
        "shapes": [one for one in entries if one["method"] in task.shapes],
        "missing": len(collection.left),
        "environment": environment(),
    }
    chips = test.groupby("group").size().rename("chips").reset_index()
    record["where"] = place_coordinates(data.manifest).merge(chips).to_dict("records")
    if task.match_acquisition:
        statistics = acquisition_statistics(data.dataset("test", config.image_size))
        pairs = matched_pairs(test["target"].to_numpy(), statistics)
        record["matching"] = matching_entry(test["target"].to_numpy(), statistics, pairs)
        numbers = dict(zip(test["img_path"], pairs, strict=True))
        predictions["pair"] = predictions["img_path"].map(numbers).fillna(-1).astype("int32")
    evidence = Evidence(record, predictions.reset_index(drop=True))
    record["summary"] = summarise(evidence)
    with written_whole(folder / f"{task.name}.parquet") as part:
        predictions.to_parquet(part, index=False, compression="zstd")
    write_json(folder / f"{task.name}.json", record)
    return evidence


def matching_entry(targets: np.ndarray, statistics: np.ndarray, pairs: np.ndarray) -> dict:
    """How many pairs there are, and how far apart the classes' statistics lie before and after."""
    chosen = pairs >= 0
    after = imbalance(targets[chosen], statistics[chosen]) if any(chosen) else None
    before = imbalance(targets, statistics)
    return {
        "pairs": int(chosen.sum()) // 2,
        "imbalance_before": before,
        "imbalance_after": after,
    }


def entry(trial: Trial, run: Run, measured: bool, most_epochs: int) -> dict[str, Any]:
    """What a record keeps of a run.

    Memory is kept of runs in a process of their own; `stopped` says that validation had stopped
    improving.
    """
    record = run.record
    return {
        **run_facts(run, measured),
        "run": trial.name,
        "method": trial.method,
        "learning_rate": trial.rate,
        "seed": trial.seed,
        "train_fraction": trial.fraction,
        "random_split": trial.random_split,
        "best_epoch": record["best_epoch"],
        "epochs": record["epochs_trained"],
        "stopped": record["epochs_trained"] < most_epochs,
        "valid": record["valid"],
        "test": record["test"],
        "failure": record["failure"],
        "data_fingerprint": record["data_fingerprint"],
        "weights_digest": record["weights_digest"],
    }


def training_seconds(run: Run) -> float:
    """Seconds of a whole training: of the frozen part before the epochs, and of all epochs.

    The frozen part are the features of head_only, or the tokens of the blocks before the adapted
    ones, of the training and validation chips; where a run read them, what they took to compute.
    An epoch's seconds are those of its steps, without its validation.
    """
    record = run.record
    frozen = (record.get("tokens") or {}).get("seconds", 0.0)
    if rate := record.get("features_per_second"):
        frozen = (record["chips"]["train"] + record["chips"]["valid"]) / rate
    return float(run.history.seconds.sum() + frozen)


def run_facts(run: Run, measured: bool) -> dict[str, Any]:
    """What a table of runs says of one besides its metrics; `measured` as in `entry`."""
    record, config = run.record, run.record["config"]
    machine, adapts = record["environment"]["machine"], record["method"] in PEFT_METHODS
    return {
        "backbone": record["backbone"],
        "k": config["adapted_blocks"],
        "rank": config["lora_rank"] if adapts else None,
        "layers": "+".join(config["lora_targets"]) if adapts else None,
        "train_chips": record["chips"]["train"],
        "trained_parameters": record["parameters"]["trainable"],
        "seconds": round(training_seconds(run), 2),
        "memory_bytes": int(run.history.peak_memory_bytes.max()) if measured else None,
        "machine": machine["gpu"] or f"{machine['cpu']}, threads: {machine['torch_threads']}",
        "commit": record["environment"]["git_commit"],
    }


# --- Summaries: means and differences over seeds, with intervals over places ----------------------


def summarise(evidence: Evidence) -> dict[str, list[dict[str, Any]]]:
    """Tables, as lists of rows, of all that the predictions say.

    Returns:
        `means` (`seeds.method_means`), `validation` (mean accuracy and AUROC over seeds), `gains`
        (`seeds.method_gains` with `metric`), `shares` (the gain over the head by share of the
        training chips), `random_split` (how much better a split that mixes places looks), `where`
        (accuracy by test place and method), `matched` (on pairs of a like acquisition), and of
        other ranks and layers `shapes` (as `means`) and `shape_gains` (AUROC over the row that a
        shape changes, as `gains`).
    """
    main = evidence.runs()
    draws = draws_of(main)
    tables = {
        "means": method_means(main, draws, SHOWN),
        "validation": _validation(evidence),
        "gains": pd.concat(
            [method_gains(main, draws, metric).assign(metric=metric) for metric in SHOWN]
        ),
        "shares": _shares(evidence, draws),
        "random_split": _mixed(evidence, draws),
        "where": _where(evidence),
        "matched": _matched(evidence),
    }
    tables["shapes"], tables["shape_gains"] = _shapes(evidence, main, draws)
    return {name: _rows(table) for name, table in tables.items()}


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(table.round(6).to_json(orient="records"))


def _validation(evidence: Evidence) -> pd.DataFrame:
    """Mean accuracy and AUROC on validation: method, metric, value."""
    table = pd.DataFrame(
        {"method": method, "metric": metric, "value": run.record["valid"][metric]["value"]}
        for (method, _), run in evidence.runs().items()
        for metric in SHOWN
    )
    return table.groupby(["method", "metric"], sort=False).value.mean().reset_index()


def _shares(evidence: Evidence, of_all: dict[tuple, Draws]) -> pd.DataFrame:
    """AUROC gain over the head for every share of the training chips, with `train_chips`."""
    settings = evidence.record["settings"]
    tables = []
    for fraction in [*settings["fractions"], 1.0]:
        runs = {
            p: r for p, r in evidence.runs(fraction).items() if p[0] in settings["fraction_methods"]
        }
        table = method_gains(runs, draws_of(runs) if fraction < 1 else of_all)
        if not table.empty:
            chips = next(iter(runs.values())).record["train_chips"]
            table = table[table["first"] == REFERENCE]
            tables.append(table.assign(fraction=fraction, train_chips=chips))
    return pd.concat(tables) if settings["fractions"] and tables else pd.DataFrame()


def _mixed(evidence: Evidence, held_out: dict[tuple, Draws]) -> pd.DataFrame:
    """AUROC on splits that mix places, by method, and its difference to places held out.

    The intervals of the mixed ones are over chips, as whoever mixes would report them.
    """
    runs = evidence.runs(random_split=True)
    found = draws_of(runs)
    rows = []
    for method in dict.fromkeys(method for method, _ in runs):
        seeds = [seed for m, seed in runs if m == method and (m, seed) in held_out]
        mixed = [found[method, seed]["auroc"] for seed in seeds]
        apart = [held_out[method, seed]["auroc"] for seed in seeds]
        values = {"mixed": over_seeds(mixed), "held_out": over_seeds(apart)}
        gains = [one - other for one, other in zip(mixed, apart, strict=True)]
        values[""] = over_seeds(gains)
        rows.append(
            {"method": method, "seeds": len(seeds)}
            | {
                f"{name}_{end}" if name else end: number
                for name, numbers in values.items()
                for end, number in numbers.items()
            }
        )
    return pd.DataFrame(rows)


def _where(evidence: Evidence) -> pd.DataFrame:
    """Accuracy, mean over seeds, by method and test place, with the place's coordinates."""
    where = pd.DataFrame(evidence.record.get("where", []))
    if where.empty:
        return where
    tables = []
    for (method, seed), run in evidence.runs().items():
        chips = run.test_predictions
        right = (chips.predicted == chips.target).groupby(chips.group).mean()
        tables.append(right.rename("accuracy").reset_index().assign(method=method, seed=seed))
    means = pd.concat(tables).groupby(["method", "group"], sort=False).accuracy.mean().reset_index()
    return means.merge(where, on="group")


def _matched(evidence: Evidence) -> pd.DataFrame:
    """AUROC of every method, and of the acquisition alone, on pairs of a like acquisition."""
    if not evidence.record.get("matching", {}).get("pairs"):
        return pd.DataFrame()
    runs = {pair: _paired(run) for pair, run in evidence.runs().items()}
    name = TRIVIAL[-1]
    alone = Run(None, None, pd.DataFrame(), evidence.trivial()[name], {"run": name})
    runs |= {(name, 0): _paired(alone)}
    return method_means(runs, draws_of(runs), ("auroc",))


def _shapes(
    evidence: Evidence, main: dict[tuple, Run], draws: dict[tuple, Draws]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Means of every shape, and the AUROC gain over the row that it changes."""
    shapes = evidence.shapes()
    draws = draws | draws_of(shapes)
    gains = [pd.DataFrame()]
    for name, shape in evidence.record["settings"]["shapes"].items():
        two = {p: run for p, run in (main | shapes).items() if p[0] in (shape["of"], name)}
        gains.append(method_gains(two, draws).assign(metric="auroc"))
    return method_means(shapes, draws, SHOWN), pd.concat(gains)


def _paired(run: Run) -> Run:
    """A run's test predictions of the chips that have a pair."""
    chips = run.test_predictions
    return replace(run, predictions=chips[chips.pair >= 0].reset_index(drop=True))
