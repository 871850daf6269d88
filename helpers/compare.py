"""Several runs side by side: methods, seeds, amounts of data and ranks on the same test images."""

import itertools
import time

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from sklearn.metrics import precision_recall_curve, roc_curve

from helpers.adapters import METHODS
from helpers.finetune import new_accelerator, train, training_setup
from helpers.load_data import ChipData
from helpers.metrics import mcnemar, paired_difference, reliability
from helpers.runs import Run, RunConfig, save_run


class CompareConfig(RunConfig):
    """Parameters of the method comparison; each run is a RunConfig made from them."""

    methods: tuple[str, ...] = Field(
        ("head_only", "lora", "dora"), min_length=1, description=f"from {', '.join(METHODS)}"
    )
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="one run per method and seed")
    fractions: tuple[float, ...] = Field(
        (0.25, 0.5), description="further runs of head_only and lora on a share of the training set"
    )
    ranks: tuple[int, ...] = Field((), description="further runs of lora with these ranks")
    target_sets: tuple[tuple[str, ...], ...] = Field(
        (), description="further runs of lora on these sets of layers"
    )
    sweep_seeds: int = Field(1, gt=0, description="how many of the seeds ranks and target_sets get")
    full_seeds: int | None = Field(
        None, gt=0, description="how many of the seeds full gets, all by default"
    )
    epochs: int = Field(12, gt=0, description="of lora, dora and full, at most")
    patience: int = Field(4, gt=0, description="epochs of lora, dora, full without improvement")
    batch_size: int = Field(32, gt=0, description="images per step of lora, dora and full")
    full_learning_rate: float = Field(1e-4, gt=0, description="of full fine-tuning (AdamW)")
    figures_path: str = Field("figures", description="folder for plots and their tables")

    def run(self, method: str, seed: int, **changes) -> RunConfig:
        """Parameters of one run.

        A head-only run keeps its own epochs, patience and batch size (its epochs cost nothing)
        and sweeps learning rates on the head input that all methods share.

        Raises:
            InputError: the method is unknown, or a change is wrong.
        """
        own = set(CompareConfig.model_fields) - set(RunConfig.model_fields)
        values = self.model_dump(exclude=own) | {"method": method, "seed": seed}
        if method == "head_only":
            values["head_inputs"] = (self.head_input,)
            for name in ("epochs", "patience", "batch_size"):
                values[name] = RunConfig.model_fields[name].default
        if method == "full":
            values["learning_rate"] = self.full_learning_rate
        run = RunConfig.checked(**values | changes)
        # Names of their own, so that the head-only run of setup_finetune stays as it is.
        return run.model_copy(update={"run_name": f"compare_{run.name}"})


def compare(config: CompareConfig, report=print) -> dict[str, Run]:
    """Train, test and save every run of the comparison; return them by name.

    Raises:
        InputError: as `finetune.train`; runs finished before stay on disk.
    """
    plan = [config.run(method, seed) for method, seed in method_seeds(config)]
    first = config.seeds[0]
    for method, fraction in itertools.product(("head_only", "lora"), config.fractions):
        own = config.run(method, first, train_fraction=fraction)
        plan.append(own.model_copy(update={"run_name": f"{own.name}_fraction{fraction:g}"}))
    for seed in config.seeds[: config.sweep_seeds]:
        for rank in config.ranks:
            own = config.run("lora", seed, lora_rank=rank)
            plan.append(own.model_copy(update={"run_name": f"{own.name}_rank{rank}"}))
        for targets in config.target_sets:
            own = config.run("lora", seed, lora_targets=targets)
            name = f"{own.name}_targets-{'-'.join(targets)}"
            plan.append(own.model_copy(update={"run_name": name}))
    runs = {}
    for number, own in enumerate(plan, start=1):
        start = time.perf_counter()
        runs[own.name] = train(own, own.data(), report=lambda line: None)
        save_run(own, runs[own.name])
        report(
            f"[{number}/{len(plan)}] {own.name}: best epoch {runs[own.name].record['best_epoch']}, "
            f"{time.perf_counter() - start:.0f} s"
        )
    return runs


def method_seeds(config: CompareConfig) -> list[tuple[str, int]]:
    """Methods and seeds of the main runs, method by method."""
    few = {"full": config.full_seeds}
    return [(method, seed) for method in config.methods for seed in config.seeds[: few.get(method)]]


def main_runs(runs: dict[str, Run], config: CompareConfig) -> dict[tuple[str, int], Run]:
    """The runs on all training data with the common rank, by method and seed."""
    return {pair: runs[config.run(*pair).name] for pair in method_seeds(config)}


def own_test(run: Run) -> dict[str, dict[str, float]]:
    """Test metrics of a run itself, without its baselines."""
    return run.record["test"][run.record["backbone"]]


def cost_table(runs: dict[tuple[str, int], Run], config: CompareConfig) -> pd.DataFrame:
    """What each method trains, keeps, needs and takes; one row a method, medians over seeds.

    Bytes and seconds are those measured in the runs; `bytes_to_keep` is what one more task costs
    on disk beside the backbone: the adapter folder, the head, or a full copy.
    """
    rows = []
    for method in config.methods:
        own = [run for (name, _), run in runs.items() if name == method]
        histories = [run.history for run in own]
        to_best = [
            h.seconds[: run.record["best_epoch"]].sum()
            for h, run in zip(histories, own, strict=True)
        ]
        rows.append(
            {
                "method": method,
                "trainable_parameters": own[0].record["parameters"]["trainable"],
                "bytes_to_keep": bytes_to_keep(config.run(method, config.seeds[0]), own[0]),
                "peak_memory_bytes": np.median([h.peak_memory_bytes.max() for h in histories]),
                "seconds_per_epoch": np.median(np.concatenate([h.seconds for h in histories])),
                "images_per_second": np.median(
                    np.concatenate([h.images_per_second for h in histories])
                ),
                "seconds_to_best": np.median(to_best),
                "epochs_to_best": np.median([run.record["best_epoch"] for run in own]),
            }
        )
    return pd.DataFrame(rows).set_index("method")


def bytes_to_keep(config: RunConfig, run: Run) -> int:
    """Bytes on disk that one more task needs beside the shared backbone."""
    if run.adapter:
        return sum(f.stat().st_size for f in (config.folder / "adapter").iterdir())
    if config.method == "full":
        return (config.folder / "model_final.safetensors").stat().st_size
    return sum(p.numel() * p.element_size() for p in run.classifier.linear_head.parameters())


def test_rows(runs: dict[tuple[str, int], Run], metrics: tuple[str, ...]) -> pd.DataFrame:
    """Test metrics per method, seed and metric, with intervals over the test images."""
    return pd.DataFrame(
        {"method": method, "seed": seed, "metric": metric, **own_test(run)[metric]}
        for (method, seed), run in runs.items()
        for metric in metrics
    )


def test_summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds, spread over seeds and mean interval over images, one row a method."""

    def line(own: pd.DataFrame) -> str:
        text = f"{own.value.mean():.3f} [{own.low.mean():.3f}, {own.high.mean():.3f}]"
        if len(own) > 1:
            text += f" seeds {own.value.min():.3f} to {own.value.max():.3f}"
        return text

    cells = {key: line(own) for key, own in rows.groupby(["method", "metric"], sort=False)}
    return pd.Series(cells).unstack().loc[rows.method.unique(), rows.metric.unique()]


def paired_tests(runs: dict[tuple[str, int], Run]) -> pd.DataFrame:
    """Every pair of methods on the same test images, for every seed that both have.

    Returns:
        `first`, `second`, `seed`; `only_first`, `only_second` and `p_value` of McNemar's exact
        test; `auroc_difference` (second - first) with its paired bootstrap interval `low`, `high`.
    """
    rows = []
    methods = dict.fromkeys(method for method, _ in runs)
    for first, second in itertools.combinations(methods, 2):
        for seed in (seed for method, seed in runs if method == first and (second, seed) in runs):
            tables = [runs[method, seed].predictions for method in (first, second)]
            targets = tables[0].target.to_numpy()
            probabilities = [t.filter(regex="^p_").to_numpy() for t in tables]
            difference = paired_difference(targets, *probabilities, "auroc")
            rows.append(
                {"first": first, "second": second, "seed": seed}
                | mcnemar(targets, *(t.predicted.to_numpy() for t in tables))
                | {"auroc_difference": difference.pop("value")}
                | difference
            )
    return pd.DataFrame(rows)


def histories(runs: dict[tuple[str, int], Run]) -> pd.DataFrame:
    """All histories under each other, with `method` and `seed`."""
    return pd.concat(
        [run.history.assign(method=method, seed=seed) for (method, seed), run in runs.items()]
    )


def operating_points(runs: dict[tuple[str, int], Run]) -> pd.DataFrame:
    """ROC and precision-recall points of the positive class, first seed of each method.

    Returns:
        `method`, `curve` (roc or pr), `x`, `y`.
    """
    tables = []
    for method, run in first_seed(runs).items():
        targets, scores = run.predictions.target, run.predictions.filter(regex="^p_").iloc[:, 1]
        false, true, _ = roc_curve(targets, scores)
        precision, recall, _ = precision_recall_curve(targets, scores)
        for curve, x, y in (("roc", false, true), ("pr", recall, precision)):
            tables.append(pd.DataFrame({"method": method, "curve": curve, "x": x, "y": y}))
    return pd.concat(tables)


def reliability_rows(runs: dict[tuple[str, int], Run]) -> pd.DataFrame:
    """`metrics.reliability` of the first seed of each method, with `method`."""
    return pd.concat(
        reliability(
            run.predictions.target.to_numpy(), run.predictions.filter(regex="^p_").to_numpy()
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
    """One row per run: `method`, `seed`, `rank`, `targets`, `train_fraction`, `train_chips`,
    `trainable` and the test metric with its interval."""
    return pd.DataFrame(
        {
            "run": name,
            "method": run.record["method"],
            "seed": run.record["config"]["seed"],
            "rank": run.record["config"]["lora_rank"],
            "targets": "+".join(run.record["config"]["lora_targets"]),
            "train_fraction": run.record["config"]["train_fraction"],
            "train_chips": run.record["chips"]["train"],
            "trainable": run.record["parameters"]["trainable"],
            **own_test(run)[metric],
        }
        for name, run in runs.items()
    )


def step_times(config: RunConfig, data: ChipData, steps: int = 12) -> pd.DataFrame:
    """Where a training step's time goes: median seconds of its parts over some steps.

    Parts: `data` (take and augment a batch of decoded chips, move it to the device), `forward`,
    `backward` and `optimizer`. The first two steps, which warm up, are left out.
    """
    model, group, examples = training_setup(config, data)
    accelerator = new_accelerator(config)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW([group], fused=True))
    model.train()
    rows = []
    order = torch.randint(len(examples.targets), (steps, config.batch_size))
    for batch in order:
        marks = [time.perf_counter()]

        def mark():
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())  # noqa: B023

        chips = examples.take(batch, torch.randint(8, batch.shape)).to(accelerator.device)
        targets = examples.targets[batch].to(accelerator.device)
        mark()
        loss = torch.nn.functional.cross_entropy(model(chips), targets)
        mark()
        accelerator.backward(loss)
        mark()
        optimizer.step()
        optimizer.zero_grad()
        mark()
        rows.append(np.diff(marks))
    parts = ["data", "forward", "backward", "optimizer"]
    median = np.median(rows[2:], axis=0)
    table = pd.DataFrame({"seconds": median, "share": median / median.sum()}, index=parts)
    return table.rename_axis("part")


def full_set_cost(runs: dict[tuple[str, int], Run], chips: int = 1_000_000) -> pd.DataFrame:
    """What one pass of training over a large set would take, from the measured images per second.

    Hours = chips / images per second / 3600. A head-only pass is the forward pass for the
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
    return table.assign(hours_per_pass=chips / table.images_per_second / 3600)


def pair_sentence(tests: pd.DataFrame, first: str, second: str) -> str:
    """What the paired tests say of two methods, as Markdown; tests as from `paired_tests`."""
    own = tests[(tests["first"] == first) & (tests["second"] == second)]
    better = int((own.low > 0).sum())
    worse = int((own.high < 0).sum())
    seeds = len(own)
    verdict = (
        f"better in every run ({seeds} of {seeds} intervals above zero)"
        if better == seeds
        else f"worse in every run ({seeds} of {seeds} intervals below zero)"
        if worse == seeds
        else f"not clearly different: the interval of the difference is above zero for {better}, "
        f"below zero for {worse} and on both sides for {seeds - better - worse} of {seeds} seed(s)"
    )
    differences = ", ".join(
        f"{row.auroc_difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]" for row in own.itertuples()
    )
    decisions = ", ".join(
        f"{row.only_second} against {row.only_first} (p = {row.p_value:.2g})"
        for row in own.itertuples()
    )
    return (
        f"**{second} against {first}**, on the same test images: AUROC {differences}; chips that "
        f"only {second} against only {first} has right: {decisions}. By AUROC {second} is "
        f"{verdict}."
    )


def cost_sentence(costs: pd.DataFrame, first: str, second: str) -> str:
    """What a method costs relative to another, as Markdown; costs as from `cost_table`."""
    ratio = costs.loc[second] / costs.loc[first]
    return (
        f"{second} trains {costs.trainable_parameters[second]:,.0f} parameters "
        f"({ratio.trainable_parameters:.2f} times {first}'s), keeps "
        f"{costs.bytes_to_keep[second] / 1e3:,.0f} kB per task, takes "
        f"{ratio.seconds_per_epoch:.2f} times as long per epoch and "
        f"{ratio.peak_memory_bytes:.2f} times the peak memory of {first}."
    )
