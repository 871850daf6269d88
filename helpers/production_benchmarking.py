"""What a classifier costs in production, form by form, and which form to deploy.

`python -m helpers.production_benchmarking --model_path ./models/model_final.safetensors` measures
everything that the notebook shows: quality, latency, memory, throughput under load, limits.
Nothing is timed beside anything else, and variants take turns.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field, PositiveFloat, PositiveInt

from helpers import InputError
from helpers.adapters import load_adapter, merge_adapter
from helpers.compress import BUILDERS, REFERENCE, Source, build_variants
from helpers.config import Config
from helpers.console import run_command
from helpers.load_data import ChipData
from helpers.load_generator import (
    LoadSettings,
    System,
    all_scenarios,
    check_percentiles,
    latency_percentiles,
    load_curve,
    scaling,
    under_competition,
)
from helpers.machine import cpu_flags, energy_counter, flops_per_image, machine_limits
from helpers.metrics import bootstrap_metrics, metric_columns
from helpers.model import Classifier, load_classifier
from helpers.records import environment, write_json, written_whole
from helpers.runs import RunConfig
from helpers.runtimes import Predict, Variant, load, remote, worker_environment

QUALITY = ("accuracy", "precision", "recall", "f1", "auroc")
_TURN = 5  # timed predictions before the next variant
_PACKAGES = ("torchao", "onnx", "onnxruntime", "openvino", "nncf", "mlcommons-loadgen")


class BenchmarkConfig(Config):
    """Everything that decides a benchmark."""

    model_path: str = Field(
        "models/head_only_example_example_seed0/model_final.safetensors",
        description="a model_final.safetensors, or the adapter folder of a LoRA run",
    )
    data_path: str = Field(
        "example", description="folder, CSV manifest, `eurosat`, or `example` (embedded)"
    )
    variants: tuple[Literal[tuple(BUILDERS)], ...] | None = Field(
        None, description=f"to build, all by default, from {', '.join(BUILDERS)}"
    )
    gate_points: float = Field(
        0.5, ge=0, description="accuracy that a deployable variant may lose, in percentage points"
    )
    calibration_chips: PositiveInt = Field(
        64, description="training chips that static quantization is calibrated on"
    )
    recovery_epochs: PositiveInt = Field(
        3, description="epochs of fine-tuning after structured pruning"
    )
    batch_sizes: tuple[PositiveInt, ...] = Field(
        (1, 8, 32), min_length=1, description="chips per prediction, ascending"
    )
    latency_samples: tuple[PositiveInt, ...] = Field(
        (60, 10, 5), description="timed predictions of every variant, one number per batch size"
    )
    percentiles: tuple[float, ...] = Field(
        (50.0, 90.0, 95.0), description="of latency; shown where the samples carry them"
    )
    load_variants: tuple[Literal[tuple(BUILDERS)], ...] | None = Field(
        None, description="to put under load; the reference and the fastest that passes by default"
    )
    load_seconds: PositiveFloat = Field(1.0, description="least duration of one LoadGen run, s")
    start_qps: PositiveFloat | None = Field(
        None, description="first rate of the Server search; half the Offline rate by default"
    )
    latency_bound_ms: PositiveFloat = Field(
        100.0, description="what the p99 of the Server scenario must stay under, ms"
    )
    max_batch: PositiveInt = Field(8, description="most queries in one prediction under load")
    max_wait_ms: float = Field(
        0.0, ge=0, description="how long a query may wait for others to share its batch, ms"
    )
    queue_limit: PositiveInt = Field(
        256, description="waiting queries above which the next is refused"
    )
    load_fractions: tuple[PositiveFloat, ...] = Field(
        (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2),
        description="of the measured capacity, offered in the load curve",
    )
    competing: tuple[int, ...] = Field(
        (0, 1, 2), description="numbers of competing CPU-bound processes"
    )
    processes: tuple[PositiveInt, ...] = Field((1, 2), description="numbers of model processes")
    mlperf: bool = Field(False, description="MLPerf's durations: 600 s for every LoadGen run")
    threads: PositiveInt | None = Field(None, description="of one prediction; all cores by default")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="of PyTorch variants")
    seed: int = Field(0, ge=0, description="of bootstrap draws and of recovery")
    output_path: str = Field("models", description="folder for the variants' files")
    results_path: str = Field("benchmark_results", description="folder for tables and records")
    figures_path: str = Field("figures", description="folder for figures")
    run_name: str | None = Field(None, description="name of the results; the model's by default")

    @property
    def variant_names(self) -> tuple[str, ...]:
        """What to build."""
        return self.variants or tuple(BUILDERS)

    @property
    def load_settings(self) -> LoadSettings:
        """How to put a system under load."""
        return LoadSettings(
            seconds=self.load_seconds,
            latency_bound_ms=self.latency_bound_ms,
            max_batch=self.max_batch,
            max_wait_ms=self.max_wait_ms,
            queue_limit=self.queue_limit,
            mlperf=self.mlperf,
        )


@dataclass(frozen=True)
class Bench:
    """What is benchmarked, on what, and how.

    Args:
        config: the parameters.
        name: of the results' files.
        label: backbone, weights and data, as they must stand beside every number.
        source: the classifier and what its variants are made of.
        data: the checked data set.
        chips: the test chips (N, bands, S, S).
        targets: their classes (N,).
        threads: of one prediction.
        device: `cpu` or `cuda`.
    """

    config: BenchmarkConfig
    name: str
    label: str
    source: Source
    data: ChipData
    chips: np.ndarray
    targets: np.ndarray
    threads: int
    device: str


def open_bench(config: BenchmarkConfig) -> Bench:
    """Load the classifier and its data.

    Raises:
        InputError: no such model, damaged or of another architecture; data with other classes;
            percentiles that no batch size has the samples for; no GPU where one was asked for.
    """
    if len(config.latency_samples) != len(config.batch_sizes):
        raise InputError(
            f"latency_samples: {len(config.latency_samples)} numbers for "
            f"{len(config.batch_sizes)} batch_sizes; give one for each"
        )
    check_percentiles(config.percentiles, max(config.latency_samples))
    if REFERENCE not in config.variant_names:
        raise InputError(f"variants: {REFERENCE} is the reference and must be among them")
    classifier, provenance, adapted = _load_model(config.model_path)
    trained = {k: v for k, v in provenance["config"].items() if k in RunConfig.model_fields}
    data = RunConfig.checked(**trained | {"data_path": config.data_path}).data()
    if data.classes != classifier.config.classes:
        raise InputError(
            f"data_path: {config.data_path} has the classes {', '.join(data.classes)}, the model "
            f"was trained on {', '.join(classifier.config.classes)}; pass data with those"
        )
    name = config.run_name or f"benchmark_{provenance['run']}"
    device = RunConfig(device=config.device).torch_device
    train, valid, test = (_chips(data, split, classifier) for split in ("train", "valid", "test"))
    source = Source(
        classifier,
        train,
        valid,
        Path(config.output_path) / name,
        adapted=adapted,
        device=device,
        calibration_chips=config.calibration_chips,
        recovery_epochs=config.recovery_epochs,
        seed=config.seed,
    )
    return Bench(
        config,
        name,
        f"{provenance['backbone']}, {classifier.config.image_size} px, "
        f"data {Path(config.data_path).name}",
        source,
        data,
        test[0].numpy(),
        test[1].numpy(),
        config.threads or os.cpu_count(),
        device,
    )


def _load_model(model_path: str):
    """Return classifier (LoRA merged), provenance, and the PeftModel of an adapter folder."""
    path = Path(model_path)
    if not path.exists():
        hint = "run setup_finetune.ipynb first, which trains it"
        if model_path != BenchmarkConfig.model_fields["model_path"].default:
            hint = "pass the model_final.safetensors or the adapter folder of a run"
        raise InputError(f"model_path: no such file or folder: {model_path}; {hint}")
    if path.is_dir():
        classifier = merge_adapter(load_adapter(path))
        provenance = load_classifier(path.parent / "model_final.safetensors")[1]
        return classifier, provenance, load_adapter(path)
    return *load_classifier(path), None


def _chips(data: ChipData, split: str, classifier: Classifier):
    dataset = data.dataset(split, classifier.config.image_size)
    return torch.stack([chip for chip, _ in dataset]), dataset.targets


def load_all(bench: Bench, variants: Sequence[Variant]) -> dict[str, Predict]:
    """Load variants into this process, to take turns in it."""
    return {v.name: load(v, bench.threads, bench.device) for v in variants}


# --- Quality -------------------------------------------------------------------------------------


def measure_quality(bench: Bench, predicts: dict[str, Predict]) -> pd.DataFrame:
    """Test metrics of every variant, and its difference to the reference on the same images.

    Returns:
        One row per variant: `variant`; for each of QUALITY its value, `_low` and `_high`;
        `accuracy_loss_points` with `_low` and `_high` (paired bootstrap over images, 95 %);
        `max_logit_difference, mean_logit_difference, agreement` (share of equal decisions);
        `passes_gate`.
    """
    logits = {name: _predict_all(predict, bench.chips) for name, predict in predicts.items()}
    reference = logits[REFERENCE]
    draws = {name: _accuracy_draws(bench, each) for name, each in logits.items()}
    rows = []
    for name, each in logits.items():
        row = metric_columns(bench.targets, _softmax(each), QUALITY, bench.config.seed)
        loss = 100 * (_accuracy(bench, reference) - _accuracy(bench, each))
        low, high = np.percentile(100 * (draws[REFERENCE] - draws[name]), [2.5, 97.5])
        difference = np.abs(each - reference)
        rows.append(
            {"variant": name}
            | row
            | {
                "accuracy_loss_points": loss,
                "accuracy_loss_points_low": low,
                "accuracy_loss_points_high": high,
                "max_logit_difference": difference.max(),
                "mean_logit_difference": difference.mean(),
                "agreement": (each.argmax(1) == reference.argmax(1)).mean(),
                "passes_gate": bool(loss <= bench.config.gate_points + 1e-9),
            }
        )
    return pd.DataFrame(rows)


def _predict_all(predict: Predict, chips: np.ndarray, batch_size: int = 32) -> np.ndarray:
    starts = range(0, len(chips), batch_size)
    return np.concatenate([predict(chips[i : i + batch_size]) for i in starts])


def _softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).double().softmax(dim=1).numpy()


def _accuracy(bench: Bench, logits: np.ndarray) -> float:
    return float((logits.argmax(axis=1) == bench.targets).mean())


def _accuracy_draws(bench: Bench, logits: np.ndarray) -> np.ndarray:
    """Accuracy in bootstrap draws; equal seeds draw equal images, so differences are paired."""
    return bootstrap_metrics(bench.targets, _softmax(logits), seed=bench.config.seed)["accuracy"]


def gate_sentence(bench: Bench) -> str:
    """What the quality gate means on so many test chips."""
    n, gate = len(bench.targets), bench.config.gate_points
    chips = math.floor(gate / 100 * n + 1e-9)
    may = "no chip at all" if chips == 0 else f"{chips} chip{'s' if chips > 1 else ''} net"
    return (
        f"One of the {n} test chips is {100 / n:.2f} points of accuracy, so a gate of {gate:g} "
        f"points lets a variant lose {may}."
    )


# --- Latency -------------------------------------------------------------------------------------


def measure_latency(bench: Bench, predicts: dict[str, Predict], progress=print) -> pd.DataFrame:
    """Time every variant in turn, round after round, for every batch size.

    A turn is one prediction that is not timed and up to five that are: the first still meets the
    caches, and the waiting threads, that the variant before has left.

    Returns:
        One row per prediction: `variant, batch_size, seconds`.
    """
    rows = []
    for size, samples in zip(bench.config.batch_sizes, bench.config.latency_samples, strict=True):
        chips = np.resize(bench.chips, (size, *bench.chips.shape[1:]))
        for predict in predicts.values():
            predict(chips)
        for done in range(0, samples, _TURN):
            for name, predict in predicts.items():
                predict(chips)
                turn = min(_TURN, samples - done)
                rows += [(name, size, _seconds(predict, chips)) for _ in range(turn)]
        progress(f"batch {size}: {samples} predictions of each of {len(predicts)} variants")
    return pd.DataFrame(rows, columns=["variant", "batch_size", "seconds"])


def _seconds(predict: Predict, chips: np.ndarray) -> float:
    start = time.perf_counter()
    predict(chips)
    return time.perf_counter() - start


def latency_table(samples: pd.DataFrame, percentiles: Sequence[float]) -> pd.DataFrame:
    """`variant, batch_size, n`, percentiles in ms (NaN where n does not carry them), images_per_s
    at the median, and speedup, the ratio of the reference's median to the variant's.
    """
    rows = []
    for (variant, size), group in samples.groupby(["variant", "batch_size"], sort=False):
        median = group.seconds.median()
        rows.append(
            {"variant": variant, "batch_size": size, "n": len(group)}
            | latency_percentiles(group.seconds.to_numpy(), percentiles)
            | {"images_per_s": size / median}
        )
    table = pd.DataFrame(rows)
    reference = table[table.variant == REFERENCE].set_index("batch_size").images_per_s
    return table.assign(speedup=table.images_per_s / table.batch_size.map(reference))


def request_parts(bench: Bench, predicts: dict[str, Predict], variant: str) -> pd.DataFrame:
    """Where one request's time goes: medians in ms of decoding a file, transfer and model."""
    dataset = bench.data.dataset("test", bench.source.classifier.config.image_size)
    numbers = count()
    preprocessing = [_seconds(lambda _: dataset[next(numbers)], None) for _ in range(len(dataset))]
    parts = {"preprocessing (read, decode, resize)": np.median(preprocessing)}
    chip = bench.chips[:1]
    if bench.device == "cuda":

        def transfer(array):
            torch.from_numpy(array).cuda()
            torch.cuda.synchronize()

        parts["transfer to the GPU"] = np.median([_seconds(transfer, chip) for _ in range(50)])
    else:
        parts["transfer (none: same memory)"] = 0.0
    model = np.median([_seconds(predicts[variant], chip) for _ in range(50)])
    parts[f"model ({variant}, batch 1)"] = model
    return pd.DataFrame({"part": parts.keys(), "ms": [1e3 * s for s in parts.values()]})


# --- Memory --------------------------------------------------------------------------------------


def measure_memory(
    bench: Bench, variants: Sequence[Variant], progress: Callable[[str], None] = print
) -> pd.DataFrame:
    """Memory and cold start of every variant, each in a fresh process that serves nothing else.

    Returns:
        One row per variant: `variant` and what `runtimes.footprint` returns.
    """
    sizes = [str(size) for size in sorted(bench.config.batch_sizes)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        chips = Path(folder) / "chips.npy"
        np.save(chips, bench.chips[:32])
        for variant in variants:
            command = [sys.executable, "-m", "helpers.runtimes", "--variant", str(variant.save()),
                       "--chips", str(chips), "--batch_sizes", *sizes,
                       "--threads", str(bench.threads), "--device", bench.device,
                       "--started", str(time.time())]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, env=worker_environment())
            if done.returncode:
                raise RuntimeError(f"{variant.name} failed in a fresh process:\n{done.stderr}")
            rows.append({"variant": variant.name} | json.loads(done.stdout.splitlines()[-1]))
        progress(f"{len(variants)} variants, each in a fresh process")
    return pd.DataFrame(rows)


# --- Roofline ------------------------------------------------------------------------------------


def roofline(
    bench: Bench, variants: Sequence[Variant], latency: pd.DataFrame, limits: dict
) -> pd.DataFrame:
    """Each variant against the lower of the two limits, at every batch size.

    Bytes per image are the least that must move: the weights once a batch, and the chip.
    Activations come on top as far as they leave the caches, so the achieved bandwidth is a lower
    bound. The compute limit is the measured matrix rate of the variant's precision (fp16: bf16's).

    Returns:
        `variant, batch_size, precision, flops_per_image, bytes_per_image, intensity` (FLOP/byte),
        `flops_per_s, bytes_per_s, limit_flops_per_s, share_of_limit`.
    """
    flops = {v.name: _flops(bench, v) for v in variants}
    by_name = {v.name: v for v in variants}
    chip_bytes = bench.chips[0].nbytes
    rows = []
    for row in latency.itertuples():
        variant = by_name[row.variant]
        moved = variant.bytes_on_disk / row.batch_size + chip_bytes
        intensity = flops[row.variant] / moved
        compute = limits["bf16" if variant.precision == "fp16" else variant.precision]
        limit = min(compute, intensity * limits["bytes_per_s"])
        achieved = flops[row.variant] * row.images_per_s
        rows.append(
            {
                "variant": row.variant,
                "batch_size": row.batch_size,
                "precision": variant.precision,
                "flops_per_image": flops[row.variant],
                "bytes_per_image": moved,
                "intensity": intensity,
                "flops_per_s": achieved,
                "bytes_per_s": moved * row.images_per_s,
                "limit_flops_per_s": limit,
                "share_of_limit": achieved / limit,
            }
        )
    return pd.DataFrame(rows)


def _flops(bench: Bench, variant: Variant) -> int:
    narrowed = variant.name.startswith("structured")
    return flops_per_image(bench.source.structured if narrowed else bench.source.classifier)


# --- Under load ----------------------------------------------------------------------------------


def load_names(bench: Bench, quality: pd.DataFrame, latency: pd.DataFrame) -> tuple[str, ...]:
    """What to put under load: as asked for, or the reference and the fastest that may be deployed.

    Raises:
        InputError: a variant was asked for that could not be built.
    """
    passing = set(quality.variant[quality.passes_gate])
    if bench.config.load_variants:
        missing = set(bench.config.load_variants) - set(quality.variant)
        if missing:
            raise InputError(f"load_variants: {', '.join(sorted(missing))} could not be built")
        return bench.config.load_variants
    rows = latency[latency.variant.isin(passing)]
    fastest = rows.variant[rows.images_per_s.idxmax()]
    return tuple(dict.fromkeys((REFERENCE, fastest)))


@contextmanager
def served(bench: Bench, variant: Variant) -> Iterator[System]:
    """A system whose model runs in a process of its own.

    Not in a thread of this one: PyTorch's second pool of OpenMP threads makes them all wait
    asleep, and eager fp32 took three times as long there on two cores.
    """
    with remote(variant, bench.threads, bench.device) as model:
        yield System([model], bench.chips, bench.config.load_settings)


def measure_scenarios(
    bench: Bench, variants: Sequence[Variant], progress=print
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The four LoadGen scenarios of each variant.

    Returns:
        One row per variant and scenario (`variant`, `load_generator.run_scenario`'s columns,
        `joules_per_1000_images` of Offline, NaN without a counter); Server is the fastest rate
        within the bound. And all rates that the searches tried.
    """
    scenarios, searches = [], []
    for variant in variants:
        with served(bench, variant) as system:
            table, search = all_scenarios(system, bench.config.start_qps, energy_counter())
        scenarios.append(table.assign(variant=variant.name))
        searches.append(search.assign(variant=variant.name))
        progress(f"{variant.name}: {len(search)} rates tried for the Server scenario")
    return pd.concat(scenarios, ignore_index=True), pd.concat(searches, ignore_index=True)


def offline_rate(scenarios: pd.DataFrame, variant: str) -> float:
    """Measured capacity of a variant in images/s: the Offline rate."""
    rows = scenarios[(scenarios.variant == variant) & (scenarios.scenario == "Offline")]
    return float(rows.answered_per_second.iloc[0])


def measure_load_curve(bench: Bench, variant: Variant, capacity: float) -> pd.DataFrame:
    """Latency against offered load, from light to more than the capacity (images/s)."""
    with served(bench, variant) as system:
        return load_curve(system, capacity, bench.config.load_fractions)


def measure_competition(bench: Bench, variant: Variant, capacity: float) -> pd.DataFrame:
    """Half the capacity offered, and Offline, beside competing CPU-bound processes."""
    with served(bench, variant) as system:
        return under_competition(system, capacity / 2, capacity, bench.config.competing)


def measure_scaling(bench: Bench, variants: Sequence[Variant]) -> pd.DataFrame:
    """Copies of a model in processes of their own; each has the same share of the cores.

    Returns:
        `variant` and the columns of `load_generator.scaling`, one row per number of processes.
    """
    threads = max(1, bench.threads // max(bench.config.processes))
    tables = [
        scaling(
            variant,
            bench.config.processes,
            chips=bench.chips,
            settings=bench.config.load_settings,
            threads=threads,
            device=bench.device,
        ).assign(variant=variant.name)
        for variant in variants
    ]
    return pd.concat(tables, ignore_index=True)


# --- Decision ------------------------------------------------------------------------------------


def summarise(
    bench: Bench,
    built: pd.DataFrame,
    quality: pd.DataFrame,
    latency: pd.DataFrame,
    memory: pd.DataFrame,
) -> pd.DataFrame:
    """One row per variant, those that could not be built included.

    Beside the columns of `build_variants` and `measure_quality`: `p50_ms` at the smallest batch,
    `images_per_s` and `speedup` at the batch size that is best for the variant, `loaded_mib`,
    `peak_mib` (largest batch) and `cold_start_s` (process start to the first prediction).
    """
    smallest, largest = min(bench.config.batch_sizes), max(bench.config.batch_sizes)
    single = latency[latency.batch_size == smallest][["variant", "p50_ms"]]
    best = latency.groupby("variant").images_per_s.max()
    speed = pd.DataFrame({"images_per_s": best, "speedup": best / best[REFERENCE]}).reset_index()
    footprint = pd.DataFrame(
        {
            "variant": memory.variant,
            "loaded_mib": memory.loaded_bytes / 2**20,
            "peak_mib": memory[f"peak_bytes_{largest}"] / 2**20,
            "cold_start_s": memory.start_s + memory.load_s + memory.first_prediction_s,
        }
    )
    table = built
    for part in (quality, single, speed, footprint):
        table = table.merge(part, on="variant", how="left")
    return table.assign(passes_gate=table.passes_gate.eq(True))


def decide(summary: pd.DataFrame) -> dict[str, str]:
    """The best deployable variant by latency, throughput and memory, and the one recommended.

    Recommended is the one that wins most of the three; the fastest under load where none wins two.
    """
    rows = summary[summary.passes_gate].set_index("variant")
    winners = {
        "lowest latency": rows.p50_ms.idxmin(),
        "highest throughput": rows.images_per_s.idxmax(),
        "smallest memory": rows.peak_mib.idxmin(),
    }
    names = list(winners.values())
    often = max(names, key=names.count)
    recommended = often if names.count(often) > 1 else winners["highest throughput"]
    return winners | {"recommended": recommended}


def expectations(
    summary: pd.DataFrame, latency: pd.DataFrame, decision: dict[str, str]
) -> pd.DataFrame:
    """What compression should buy, as ratios to the reference: expected and measured."""
    rows = summary.set_index("variant")
    name, reference = decision["recommended"], rows.loc[REFERENCE]
    speedups = latency[latency.variant == name].set_index("batch_size").speedup
    table = [
        (f"speed of {name}, {size} chips at once", "at least 4", speedup, 4.0, math.inf)
        for size, speedup in speedups.items()
    ]
    merged = latency[latency.variant == "lora_merged"]
    if len(merged):
        ratio = 1 / merged.speedup.median()
        what = "latency of merged LoRA, median of the batch sizes"
        table.append((what, "0.98 to 1.02", ratio, 0.98, 1.02))
    for name in rows.index[rows.arithmetic.eq("int8")]:
        ratio = rows.mebibytes_on_disk[name] / reference.mebibytes_on_disk
        table.append((f"file of {name}, relative", "at most 0.27", ratio, 0.0, 0.27))
    frame = pd.DataFrame(table, columns=["what", "expected", "measured", "low", "high"])
    met = frame.measured.between(frame.low, frame.high)
    return frame.assign(met=met).drop(columns=["low", "high"])


def deployment_sentence(
    bench: Bench,
    summary: pd.DataFrame,
    decision: dict[str, str],
    scenarios: pd.DataFrame,
    scaled: pd.DataFrame,
) -> str:
    """What a team could paste into its deployment plan."""
    name = decision["recommended"]
    row = summary.set_index("variant").loc[name]
    wins = [what for what, winner in decision.items() if winner == name and what != "recommended"]
    server = scenarios[(scenarios.variant == name) & (scenarios.scenario == "Server")]
    load = ""
    if len(server):
        answer = server.iloc[0]
        load = (
            f" One process with {bench.threads} threads sustained {answer.target_qps:.0f} Poisson "
            f"queries/s with p99 {answer.p99_ms:.0f} ms (bound {bench.config.latency_bound_ms:g} "
            f"ms, {answer.queries:.0f} queries, nothing refused)."
        )
    copies = scaled[scaled.variant == name]
    if len(copies):
        best = copies.loc[copies.images_per_s.idxmax()]
        load += (
            f" Best layout for throughput: {best.processes} process(es) of {best.threads_each} "
            f"thread(s) each, {best.images_per_s:.0f} images/s."
        )
    machine = environment()["machine"]
    return (
        f"Deploy {name} ({row.made}): of the variants within {bench.config.gate_points:g} points "
        f"of the reference's accuracy it has the {' and the '.join(wins)}. Accuracy "
        f"{row.accuracy:.3f} [{row.accuracy_low:.3f}, {row.accuracy_high:.3f}] on "
        f"{len(bench.targets)} test chips, {row.accuracy_loss_points:+.2f} points lost "
        f"[{row.accuracy_loss_points_low:+.2f}, {row.accuracy_loss_points_high:+.2f}]; median "
        f"latency {row.p50_ms:.1f} ms for one chip, {row.images_per_s:.0f} images/s, "
        f"{row.speedup:.1f} times the reference; {row.mebibytes_on_disk:.1f} MiB on disk, "
        f"{row.peak_mib:.0f} MiB in memory.{load} Measured with {bench.label} on "
        f"{machine['gpu'] if bench.device == 'cuda' else machine['cpu']}, "
        f"{machine['cpu_cores']} cores. Not an MLPerf submission."
    )


def decision_text(decision: dict[str, str], sentence: str) -> str:
    """The decision as Markdown."""
    lines = [f"- {what}: **{name}**" for what, name in decision.items() if what != "recommended"]
    best = "\n".join(lines)
    return (
        f"Among the variants within the quality gate:\n\n{best}\n\n"
        f"**Recommended: {decision['recommended']}.** For the deployment plan:\n\n> {sentence}"
    )


def energy_sentence(scenarios: pd.DataFrame) -> str:
    """Energy per 1,000 images, or that the machine does not say."""
    counter = energy_counter()
    if counter is None:
        return "This machine exposes no energy counter (RAPL, NVML); energy was not measured."
    rows = scenarios[scenarios.scenario == "Offline"]
    values = [f"{r.variant} {r.joules_per_1000_images:.0f} J" for r in rows.itertuples()]
    return f"Energy per 1,000 images, Offline ({counter[0]}): {', '.join(values)}."


# --- Files ---------------------------------------------------------------------------------------


def save_results(bench: Bench, tables: dict[str, pd.DataFrame], record: dict) -> list[Path]:
    """Write `<run>.csv` (the table named ``), `<run>_<name>.csv` and `<run>.json`."""
    folder = Path(bench.config.results_path)
    files = []
    for name, table in tables.items():
        files.append(folder / f"{bench.name}{'_' if name else ''}{name}.csv")
        with written_whole(files[-1]) as part:
            table.to_csv(part, index=False, float_format="%.6g")
    known = environment()
    known["packages"] |= {package: _version(package) for package in _PACKAGES}
    known["machine"] |= {"cpu_flags": cpu_flags(), "threads_per_prediction": bench.threads}
    whole = {
        "run": bench.name,
        "backbone_weights_data": bench.label,
        "config": bench.config.model_dump(),
        "classifier": asdict(bench.source.classifier.config),
        "test_chips": len(bench.targets),
        "data_fingerprint": bench.data.fingerprint,
        "mlperf_submission": False,
        **record,
        "environment": known,
    }
    files.append(folder / f"{bench.name}.json")
    write_json(files[-1], whole)
    return files


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    """Benchmark every form of a trained classifier and recommend one."""
    bench = open_bench(BenchmarkConfig.from_arguments(main.__doc__))
    print(bench.label)
    variants, built = build_variants(bench.source, bench.config.variant_names)
    predicts = load_all(bench, variants)
    by_name = {v.name: v for v in variants}
    quality = measure_quality(bench, predicts)
    samples = measure_latency(bench, predicts)
    latency = latency_table(samples, bench.config.percentiles)
    memory = measure_memory(bench, variants)
    limits = machine_limits(bench.device, bench.threads)
    roof = roofline(bench, variants, latency, limits)
    names = load_names(bench, quality, latency)
    scenarios, search = measure_scenarios(bench, [by_name[name] for name in names])
    loaded = by_name[names[-1]]
    capacity = offline_rate(scenarios, loaded.name)
    curve = measure_load_curve(bench, loaded, capacity)
    competition = measure_competition(bench, loaded, capacity)
    scaled = measure_scaling(bench, [by_name[name] for name in names])
    summary = summarise(bench, built, quality, latency, memory)
    decision = decide(summary)
    sentence = deployment_sentence(bench, summary, decision, scenarios, scaled)
    files = save_results(
        bench,
        {
            "": summary,
            "latency": latency,
            "latency_samples": samples,
            "memory": memory,
            "roofline": roof,
            "scenarios": scenarios,
            "server_search": search,
            "load_curve": curve,
            "competition": competition,
            "scaling": scaled,
        },
        {"limits": limits, "decision": decision, "sentence": sentence},
    )
    shown = ["variant", "passes_gate", "accuracy", "p50_ms", "images_per_s", "speedup",
             "mebibytes_on_disk", "peak_mib", "unavailable"]  # fmt: skip
    print(f"\n{summary[shown].round(3).to_string(index=False)}\n\n{sentence}")
    print("\nwrote " + ", ".join(map(str, files)))


if __name__ == "__main__":
    run_command(main)
