"""Several runs side by side: methods, seeds, amounts of data and shapes on the same test images."""

import itertools
import time
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field, NonNegativeInt, PositiveInt
from sklearn.metrics import precision_recall_curve, roc_curve

from helpers import InputError
from helpers.cluster import require_ray
from helpers.data.dataset import ChipData, DataConfig
from helpers.data.report import data_warnings
from helpers.evaluation.baselines import baselines
from helpers.metrics import mcnemar, paired_difference, reliability
from helpers.models.adapters import METHODS
from helpers.training.config import ReportConfig, RunConfig, TrainingConfig
from helpers.training.jobs import Job, check_ready, locally, side_by_side
from helpers.training.loop import STEP_PARTS
from helpers.training.methods import training_loop
from helpers.training.processes import processes, said_once
from helpers.training.runs import Run, class_probabilities, read_run

ALL_BLOCKS = "LoRA in all blocks"  # in `block_runs`


class CompareConfig(ReportConfig, TrainingConfig):
    """Parameters of the method comparison; each run is a RunConfig made from them.

    What is given for epochs, patience, batch size and learning rate is for lora, dora and full;
    head_only keeps its own, since its epochs cost nothing. Full trains all blocks.
    """

    adapted_blocks: PositiveInt | None = Field(
        6,
        description="of lora and dora: adapt the last k blocks, on kept tokens of the others; "
        "None: all",
    )

    methods: tuple[Literal[METHODS], ...] = Field(
        ("head_only", "lora", "dora"), min_length=1, description=f"from {', '.join(METHODS)}"
    )
    seeds: tuple[NonNegativeInt, ...] = Field(
        (0,), min_length=1, description="one run per method and seed"
    )
    fractions: tuple[float, ...] = Field(
        (0.25, 0.5), description="further runs of head_only and lora on a share of the training set"
    )
    ranks: tuple[int, ...] = Field((), description="further runs of lora with these ranks")
    target_sets: tuple[tuple[str, ...], ...] = Field(
        (), description="further runs of lora on these sets of layers"
    )
    block_counts: tuple[PositiveInt | None, ...] = Field(
        (None,), description="further runs of lora that adapt the last k blocks, None: all"
    )
    sweep_seeds: int = Field(1, gt=0, description="how many of the seeds these further runs get")
    full_seeds: int | None = Field(
        None, gt=0, description="how many of the seeds full gets, all by default"
    )
    engine: Literal["local", "ray"] = Field(
        "local", description="of runs: here, or side by side on Ray"
    )
    ray_address: str | None = Field(None, description="of a Ray cluster; None: started here")

    def run(self, method: str, seed: int, suffix: str = "", **changes) -> RunConfig:
        """Parameters of one run; its name ends in `suffix`.

        Raises:
            InputError: a change is wrong.
        """
        values = self.model_dump(include=set(TrainingConfig.model_fields))
        values |= {"method": method, "seed": seed}
        if method in ("head_only", "full"):
            values["adapted_blocks"] = None
        if method == "head_only":
            values |= dict.fromkeys(("epochs", "patience", "batch_size", "learning_rate"))
            values["head_inputs"] = (self.head_input,)
        run = RunConfig.checked(**values | changes)
        # Another name than that of the head-only run of setup_finetune.
        return run.model_copy(update={"run_name": f"compare_{run.name}{suffix}"})


def planned_runs(config: CompareConfig) -> list[RunConfig]:
    """Every run of the comparison: methods and seeds, shares of the data, shapes of LoRA."""
    plan = [config.run(method, seed) for method, seed in method_seeds(config)]
    first = config.seeds[0]
    for method, fraction in itertools.product(("head_only", "lora"), config.fractions):
        suffix = f"_fraction{fraction:g}"
        plan.append(config.run(method, first, suffix, train_fraction=fraction))
    for seed in config.seeds[: config.sweep_seeds]:
        for rank in config.ranks:
            plan.append(config.run("lora", seed, f"_rank{rank}", lora_rank=rank))
        for targets in config.target_sets:
            suffix = f"_targets-{'-'.join(targets)}"
            plan.append(config.run("lora", seed, suffix, lora_targets=targets))
        for count in config.block_counts:
            if count != config.adapted_blocks:
                suffix = f"_blocks{count or '-all'}"
                plan.append(config.run("lora", seed, suffix, adapted_blocks=count))
    return plan


def compare(config: CompareConfig, report=print) -> dict[str, Run]:
    """Train, test and save every run of the comparison; return them by name.

    With `resume`, runs that finished before with the same parameters, data and weights are read.
    The first seed of every method trains in a fresh process, from which `cost_table` takes memory
    and seconds; then the others train side by side.

    Raises:
        InputError, OSError: as `jobs.finished` and `jobs.side_by_side`, for any run before the
            first is trained where it can be seen then; runs finished before stay on disk.
    """
    if on_ray := config.engine == "ray":
        require_ray()
    plan = planned_runs(config)
    everyone = processes(config.torch_device)
    report = said_once(report, everyone)
    data = DataConfig.data(config)
    shares = {run.name: run.share(data) if run.train_fraction < 1 else data for run in plan}
    for run_config in plan:
        check_ready(run_config, shares[run_config.name])
    for warning in data_warnings(data):
        report(warning)
    with everyone.main_process_first():  # it writes what the others read
        baselines(config, data, report)
    measured = {config.run(method, config.seeds[0]).name for method in config.methods}
    jobs = [Job(run, shares[run.name], run.name in measured) for run in plan]
    runs = dict.fromkeys(run.name for run in plan)  # in this order, whatever the one they end in
    done = side_by_side(jobs, config.ray_address, report) if on_ray else locally(jobs)
    for number, (job, run, took) in enumerate(done, start=1):
        runs[job.config.name] = run
        failure = run.record["failure"] and f"; WARNING: {run.record['failure']}"
        said = f"best epoch {run.record['best_epoch']}, {took}{failure}"
        report(f"[{number}/{len(plan)}] {job.config.name}: {said}")
    return runs


def read_runs(config: CompareConfig) -> dict[str, Run]:
    """Every run of a comparison from its records, by name; nothing is trained.

    Raises:
        InputError: a run is not there.
    """
    runs = {run_config.name: read_run(run_config) for run_config in planned_runs(config)}
    missing = [name for name, run in runs.items() if run is None]
    if missing:
        raise InputError(
            f"{config.history_path}: no run {missing[0]} with these parameters "
            f"({len(missing)} of {len(runs)} missing); train them with finetune_lora.ipynb"
        )
    return runs


def method_seeds(config: CompareConfig) -> list[tuple[str, int]]:
    """Methods and seeds of the main runs, method by method."""
    few = {"full": config.full_seeds}
    return [(method, seed) for method in config.methods for seed in config.seeds[: few.get(method)]]


def main_runs(runs: dict[str, Run], config: CompareConfig) -> dict[tuple[str, int], Run]:
    """The runs on all training data with the common rank, by method and seed."""
    return {pair: runs[config.run(*pair).name] for pair in method_seeds(config)}


def block_runs(runs: dict[str, Run], config: CompareConfig) -> dict[tuple[str, int], Run]:
    """LoRA in the last blocks and in all of them, for the seeds that have both; empty without."""
    if (
        "lora" not in config.methods
        or config.adapted_blocks is None
        or None not in config.block_counts
    ):
        return {}
    shapes = {
        f"LoRA in the last {config.adapted_blocks} blocks": {},
        ALL_BLOCKS: {"suffix": "_blocks-all", "adapted_blocks": None},
    }
    return {
        (name, seed): runs[config.run("lora", seed, **shape).name]
        for name, shape in shapes.items()
        for seed in config.seeds[: config.sweep_seeds]
    }


def cost_table(runs: dict[tuple[str, int], Run]) -> pd.DataFrame:
    """What each method trains, keeps, needs and takes; one row a method.

    Of the first seed's run, which `compare` trained in a process of its own: peak memory of that
    process, from loading the model on; seconds of its epochs, median, least and most; images per
    second, seconds and epochs until the best epoch. `bytes_to_keep` as in `runs.save_run`.
    """
    rows = []
    for method, run in first_seed(runs).items():
        history, best_epoch = run.history, run.record["best_epoch"]
        rows.append(
            {
                "method": method,
                "trainable_parameters": run.record["parameters"]["trainable"],
                "bytes_to_keep": run.record["bytes_to_keep"],
                "peak_memory_bytes": history.peak_memory_bytes.max(),
                "seconds_per_epoch": history.seconds.median(),
                "seconds_least": history.seconds.min(),
                "seconds_most": history.seconds.max(),
                "images_per_second": history.images_per_second.median(),
                "seconds_to_best": history.seconds[:best_epoch].sum(),
                "epochs_to_best": best_epoch,
            }
        )
    return pd.DataFrame(rows).set_index("method")


def _shown(run: Run, metric: str) -> dict[str, float]:
    """A test metric's value and interval over images."""
    return {column: run.record["test"][metric][column] for column in ("value", "low", "high")}


def test_rows(runs: dict[tuple[str, int], Run], metrics: tuple[str, ...]) -> pd.DataFrame:
    """Test metrics per method, seed and metric, with intervals over the test images."""
    return pd.DataFrame(
        {"method": method, "seed": seed, "metric": metric, **_shown(run, metric)}
        for (method, seed), run in runs.items()
        for metric in metrics
    )


def paired_tests(runs: dict[tuple[str, int], Run]) -> pd.DataFrame:
    """Every pair of methods on the same test images, for every seed that both have.

    Returns:
        `first`, `second`, `seed`; `only_first`, `only_second` and `p_value` of McNemar's exact
        test; `auroc_difference` (second - first) with its paired bootstrap interval `low`, `high`,
        and, where the data name groups, `group_low`, `group_high` from drawing whole groups;
        `undefined`: draws of one class only, without an AUROC (of groups, where there are some).
    """
    rows = []
    methods = dict.fromkeys(method for method, _ in runs)
    for first, second in itertools.combinations(methods, 2):
        for seed in (seed for method, seed in runs if method == first and (second, seed) in runs):
            tables = [runs[method, seed].test_predictions for method in (first, second)]
            targets = tables[0].target.to_numpy()
            probabilities = [class_probabilities(table) for table in tables]
            difference = paired_difference(targets, *probabilities, "auroc")
            row = {"first": first, "second": second, "seed": seed}
            row |= mcnemar(targets, *(t.predicted.to_numpy() for t in tables))
            row |= {"auroc_difference": difference.pop("value")} | difference
            groups = tables[0].group.to_numpy()
            if (groups != "").all():
                drawn = paired_difference(targets, *probabilities, "auroc", groups=groups)
                row |= {"group_low": drawn["low"], "group_high": drawn["high"]}
                row["undefined"] = drawn["undefined"]
            rows.append(row)
    return pd.DataFrame(rows)


def histories(runs: dict[tuple[str, int], Run]) -> pd.DataFrame:
    """All histories under each other, with `method` and `seed`."""
    return pd.concat(
        [run.history.assign(method=method, seed=seed) for (method, seed), run in runs.items()]
    )


def operating_points(runs: dict[tuple[str, int], Run]) -> pd.DataFrame:
    """ROC and precision-recall points, first seed of each method.

    Of the positive class; of more than two classes micro-averaged, each class against the rest.

    Returns:
        `method`, `curve` (roc or pr), `x`, `y`.
    """
    tables = []
    for method, run in first_seed(runs).items():
        scores = class_probabilities(run.test_predictions)
        targets = np.eye(scores.shape[1])[run.test_predictions.target]
        if scores.shape[1] == 2:
            targets, scores = targets[:, 1], scores[:, 1]
        targets, scores = targets.ravel(), scores.ravel()
        false, true, _ = roc_curve(targets, scores)
        precision, recall, _ = precision_recall_curve(targets, scores)
        for curve, x, y in (("roc", false, true), ("pr", recall, precision)):
            tables.append(pd.DataFrame({"method": method, "curve": curve, "x": x, "y": y}))
    return pd.concat(tables)


def reliability_rows(runs: dict[tuple[str, int], Run]) -> pd.DataFrame:
    """`metrics.reliability` of the first seed of each method, with `method`."""
    return pd.concat(
        reliability(
            run.test_predictions.target.to_numpy(), class_probabilities(run.test_predictions)
        ).assign(method=method)
        for method, run in first_seed(runs).items()
    )


def first_seed(runs: dict[tuple[str, int], Run]) -> dict[str, Run]:
    """The run of each method with the first seed."""
    found: dict[str, Run] = {}
    for (method, _), run in runs.items():
        found.setdefault(method, run)
    return found


def sweep_rows(runs: dict[str, Run], metric: str) -> pd.DataFrame:
    """One row per run: `method`, `seed`, `rank`, `layers`, `train_fraction`, `train_chips`,
    `trainable_parameters` and the test metric with its interval."""
    return pd.DataFrame(
        {
            "run": name,
            "method": run.record["method"],
            "seed": run.record["config"]["seed"],
            "rank": run.record["config"]["lora_rank"],
            "layers": _layers(run.record["config"]),
            "train_fraction": run.record["config"]["train_fraction"],
            "train_chips": run.record["chips"]["train"],
            "trainable_parameters": run.record["parameters"]["trainable"],
            **_shown(run, metric),
        }
        for name, run in runs.items()
    )


def _layers(config: dict) -> str:
    """The adapted layers of a run's parameters in words, such as `qkv+proj in 6 blocks`."""
    return f"{'+'.join(config['lora_targets'])} in {config['adapted_blocks'] or 'all'} blocks"


def by_training_chips(runs: dict[str, Run], config: CompareConfig, metric: str) -> pd.DataFrame:
    """Rows of `sweep_rows` for head_only and lora at every training-set size, first seed."""
    rows = sweep_rows(runs, metric)
    common = [config.run(method, config.seeds[0]).name for method in ("head_only", "lora")]
    return rows[rows.run.str.replace(r"_fraction[\de.-]+$", "", regex=True).isin(common)]


def headline_rows(runs: dict[str, Run], config: CompareConfig) -> pd.DataFrame:
    """What `comparison_plots.headline` draws: accuracy, AUROC, and AUROC by training chips.

    `panel` says which: methods, or training chips.
    """
    tests = test_rows(main_runs(runs, config), ("accuracy", "auroc"))
    by_size = by_training_chips(runs, config, "auroc").assign(metric="auroc")
    columns = ["method", "seed", "metric", "train_chips", "value", "low", "high"]
    return pd.concat(
        [tests.assign(panel="methods"), by_size[columns].assign(panel="training chips")]
    )


def by_shape(runs: dict[str, Run], config: CompareConfig, metric: str) -> pd.DataFrame:
    """Rows of `sweep_rows` for lora of every rank and set of layers, with all training chips.

    The common shape has no more seeds than the others. `method` names the layers.
    """
    rows = sweep_rows(runs, metric).query("method == 'lora' & train_fraction == 1")
    rows = rows[rows.seed.isin(config.seeds[: config.sweep_seeds])]
    return rows.assign(method="LoRA on " + rows.layers)


def step_times(config: RunConfig, data: ChipData) -> pd.DataFrame:
    """Where a training step's time goes: median seconds of its parts over ten steps.

    Parts: `data` (take and augment a batch of decoded chips, move it to the device), `forward`,
    `backward` and `optimizer`. The first two steps, which warm up, are left out.
    """
    loop = training_loop(config, data)
    rows = []
    for _ in range(12):
        seconds = dict.fromkeys(STEP_PARTS, 0.0)
        last = time.perf_counter()

        def mark(part: str) -> None:
            nonlocal last
            loop.synchronize()
            now = time.perf_counter()
            seconds[part] += now - last  # noqa: B023
            last = now

        loop.step(*loop.random_batch(), mark)
        rows.append(seconds)
    median = pd.DataFrame(rows[2:]).median()
    table = pd.DataFrame({"seconds": median, "share": median / median.sum()})
    return table.rename_axis("part")


def full_set_cost(runs: dict[tuple[str, int], Run]) -> pd.DataFrame:
    """What one pass of training over a million chips takes, from the measured images per second.

    Hours = 1,000,000 / images per second / 3600. A head-only pass is the forward pass for the
    features, which is done once for all epochs; the others need a pass every epoch.
    """
    rates = pd.DataFrame(
        {
            "method": method,
            "images_per_second": run.record.get("features_per_second")
            or run.history.images_per_second.median(),
        }
        for (method, _), run in runs.items()
    )
    table = rates.groupby("method", sort=False).median()
    return table.assign(hours_per_pass=1e6 / table.images_per_second / 3600)
