"""What one GPU does with this project, in at most nine minutes: `make gpu`.

    python -m benchmarks.gpu [--budget 520] [--results_path benchmark_results] [--dry_run]

Backbones have random weights, which take the same time as trained ones. Every measurement has a
limit in seconds; one that fails or that no time is left for is a row with the reason. What was
measured is on disk after every row: `gpu_training.csv` (steps of every method, frozen features, the
job of the original notebook), `gpu_inference.csv` (forms of one classifier by batch),
`gpu_scenarios.csv` (LoadGen), `gpu.json` (limits, environment, result of `pytest -m gpu`) and
`gpu_log.txt`. `--dry_run` does the same with tiny sizes on the CPU; its numbers mean nothing.

The share of the matrix rate is FLOPs per image x images per second / measured bf16 rate, with the
FLOPs that torch counts in the matrix products of the step itself (`training_speed`).
"""

import argparse
import copy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.tables import Report, numbers
from benchmarks.training_speed import plain_loop
from helpers.benchmarking.limits import energy_meter, flops_per_image, machine_limits
from helpers.benchmarking.load_generator import LoadSettings, System, all_scenarios
from helpers.data.dataset import ChipData
from helpers.deployment.runtimes import torch_predict
from helpers.models.classifier import Classifier
from helpers.records import (
    ROOT,
    environment,
    peak_memory_bytes,
    reset_peak_memory,
    write_json,
)
from helpers.training import methods
from helpers.training.config import RunConfig
from helpers.training.examples import ChipExamples
from helpers.training.features import extract_features
from helpers.training.loop import FitSettings, Loop, fit
from helpers.training.processes import fast_products
from helpers.training.setup import new_classifier, tracked_accelerator


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long.

    Args:
        device: `cuda`, in a dry run `cpu`.
        sizes: backbone and pixels of the training steps, the one that most is measured of first.
        batches: images per step, ascending; a sweep ends where memory does.
        precisions: of training steps.
        seconds: of steps that are timed for one row.
        limit_s: most seconds of one row, with building and compiling.
        compiles: whether to compile.
        chips: of the frozen features, and of training and validation in the original's job.
        epochs: of that job that are timed.
        load_seconds: of one LoadGen run.
    """

    device: str = "cuda"
    sizes: tuple = (
        ("dinov2_vitl14", 224),
        ("dinov2_vitl14", 196),
        ("dinov2_vitb14", 224),
        ("dinov2_vits14", 224),
        ("dinov2_vitg14", 224),
    )
    batches: tuple[int, ...] = (32, 64, 128, 256, 512)
    precisions: tuple[str, ...] = ("bf16", "fp32")
    seconds: float = 1.0
    limit_s: int = 60
    compiles: bool = True
    chips: tuple[int, int, int] = (8192, 1597, 1250)
    epochs: int = 8
    load_seconds: float = 0.5


DRY = Plan(
    "cpu", (("timm:test_vit", 32),), (2, 4), ("fp32",), 0.02, 30, False, (8, 8, 4), 1, 0.05
)  # fmt: skip


@cache
def _built(backbone: str, image_size: int, data_path: str) -> Classifier:
    config = RunConfig(
        backbone=backbone, image_size=image_size, weights="random", data_path=data_path
    )
    return new_classifier(config, config.data())


def rate(step: Callable[[], object], images: int, plan: Plan) -> dict[str, float]:
    """Images per second of a step, at the median of those that fit into the time."""
    for _ in range(3):  # kernels are chosen, graphs recorded
        step()
    times, end = [], time.perf_counter() + plan.seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        if plan.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    median = float(np.median(times))
    return {"batch_size": images, "ms": 1e3 * median, "images_per_second": images / median}


def steps_of(
    config: RunConfig, data: ChipData, compiled: bool, plan: Plan, limits: dict
) -> Iterator[dict]:
    """One row a batch size: steps of `helpers.training.loop` itself."""

    def built(*_) -> Classifier:
        return copy.deepcopy(_built(config.backbone, config.image_size, config.data_path))

    # Digests name cached files and records; here they would take longer than the steps.
    with (
        mock.patch.object(methods, "new_classifier", built),
        mock.patch.object(methods, "weights_digest", lambda model: config.backbone),
    ):
        loop: Loop = methods.training_loop(config, data)
    with fast_products(plan.device):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loop.step(*(values[:2] for values in loop.random_batch()))
        flops = counter.get_total_flops() / 2
        if compiled:
            loop.model = torch.compile(loop.model)
        for batch in plan.batches[-2:] if compiled else plan.batches:
            loop.settings = replace(loop.settings, batch_size=batch)
            loop.micro_batch = batch
            reset_peak_memory()
            row = rate(lambda: loop.step(*loop.random_batch()), batch, plan)
            done = flops * row["images_per_second"]
            yield row | {
                "peak_bytes": peak_memory_bytes(plan.device),
                "gflop_per_image": flops / 1e9,
                "share_of_bf16_rate": done / limits["bf16"],
            }


def training(report: Report, plan: Plan, data: ChipData, limits: dict) -> None:
    """Steps of every method, precision and size; the first size most."""
    first = plan.sizes[0]
    cases = [(*size, "lora", plan.precisions[0], False, None) for size in plan.sizes]
    quarter = len(_built(*first, "example").backbone.blocks) // 4  # the last, on cached tokens
    cases.insert(1, (*first, "lora", plan.precisions[0], False, quarter))
    cases += [(*first, method, plan.precisions[0], False, None) for method in ("dora", "full")]
    cases += [(*first, "lora", precision, False, None) for precision in plan.precisions[1:]]
    if plan.compiles:
        cases.insert(2, (*first, "lora", plan.precisions[0], True, None))
    for backbone, size, method, precision, compiled, blocks in cases:
        config = configured(plan, backbone, size, method, precision, blocks)
        row = {
            "what": "step", "backbone": backbone, "image_size": size, "method": method,
            "precision": precision.replace("fp32", "tf32") if plan.device == "cuda" else precision,
            "compiled": compiled, "adapted_blocks": blocks or "all",
        }  # fmt: skip
        report.rows(
            "training",
            row,
            lambda c=config, k=compiled: steps_of(c, data, k, plan, limits),
        )
    config = configured(plan, *first, "lora", "fp32", None, batch_size=plan.batches[0])
    row = {"what": "plain loop", "backbone": first[0], "image_size": first[1], "method": "lora"}

    def plain() -> Iterator[dict]:
        loop = plain_loop(config, data)
        yield rate(lambda: next(loop), config.batch_size, plan)

    report.rows("training", row | {"precision": "fp32"}, plain)


def configured(plan: Plan, backbone, size, method, precision, blocks, **changes) -> RunConfig:
    """A run with random weights on the embedded chips."""
    return RunConfig.checked(
        backbone=backbone, image_size=size, method=method, precision=precision, weights="random",
        head_input="cls", device=plan.device, adapted_blocks=blocks, **changes,
    )  # fmt: skip


class SameChip:
    """A data set without files: so many chips, all equal, of which each is handed out anew."""

    def __init__(self, count: int, size: int):
        """Chips (3, size, size) uint8."""
        self.targets = torch.arange(count) % 2
        self.chip = torch.randint(256, (3, size, size), dtype=torch.uint8)

    def __len__(self) -> int:
        """Return the number of chips."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """A copy of the chip, and its class."""
        return self.chip.clone(), int(self.targets[index])


def features(report: Report, plan: Plan, limits: dict) -> None:
    """Frozen features of a set of chips, as head_only computes them, loading included."""
    for backbone, size in plan.sizes[:4]:
        classifier = _built(backbone, size, "example")
        for precision in plan.precisions:

            def measure(classifier=classifier, precision=precision, size=size) -> Iterator[dict]:
                dataset, options = SameChip(plan.chips[0], size), {"device": plan.device}
                extract_features(classifier, SameChip(8, size), precision=precision, **options)
                reset_peak_memory()
                found = extract_features(classifier, dataset, precision=precision, **options)
                images = len(dataset) / found.seconds
                flops = flops_per_image(classifier)
                yield {
                    "images_per_second": images,
                    "peak_bytes": peak_memory_bytes(plan.device),
                    "gflop_per_image": flops / 1e9,
                    "share_of_bf16_rate": flops * images / limits["bf16"],
                }

            row = {"what": "features", "backbone": backbone, "image_size": size}
            report.rows("training", row | {"precision": precision}, measure)


def original_job(report: Report, plan: Plan) -> None:
    """The original notebook's training: LoRA on ViT-L, 196 px, 100 epochs with validation."""
    backbone, size = ("dinov2_vitl14", 196) if plan.device == "cuda" else plan.sizes[0]
    config = configured(plan, backbone, size, "lora", plan.precisions[0], None)

    def measure() -> Iterator[dict]:
        def examples(count: int) -> ChipExamples:
            chips = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
            return ChipExamples(chips, torch.arange(count) % 2)

        train, valid = examples(plan.chips[1]), examples(plan.chips[2])
        with tracked_accelerator(config.resolved()) as accelerator:
            for epochs in (1, plan.epochs):  # the first to warm up
                model = methods.add_adapter(
                    copy.deepcopy(_built(backbone, size, "example")), methods.AdapterSettings()
                )
                trained = [p for p in model.parameters() if p.requires_grad]
                groups = [{"params": trained, "lr": 1e-3, "weight_decay": 0.0}]
                settings = FitSettings(epochs, epochs, config.batch_size)
                start = time.perf_counter()
                fit(model, groups, train, valid, settings, accelerator=accelerator,
                    report=lambda line: None)  # fmt: skip
                seconds = time.perf_counter() - start
        yield {"epochs_timed": plan.epochs, "seconds_100_epochs": 100 * seconds / plan.epochs}

    row = {"what": "original job", "backbone": backbone, "image_size": size, "method": "lora"}
    report.rows("training", row | {"batch_size": config.batch_size}, measure)


FORMS = {  # name -> weights' type, whether TF32, torchao's configuration, how it is compiled
    "eager_fp32": ("float32", False, None, None),
    "eager_tf32": ("float32", True, None, None),
    "bf16": ("bfloat16", False, None, None),
    "fp16": ("float16", False, None, None),
    "compiled_bf16_graphs": ("bfloat16", False, None, "reduce-overhead"),
    "compiled_fp8": (
        "bfloat16", False, "Float8DynamicActivationFloat8WeightConfig", "reduce-overhead"),
    "compiled_int8": (
        "bfloat16", False, "Int8DynamicActivationInt8WeightConfig", "reduce-overhead"),
}  # fmt: skip


def form(name: str, plan: Plan) -> Callable:
    """A classifier of the first size in one form, on the device."""
    dtype, _, quantized, compiled = FORMS[name]
    model = copy.deepcopy(_built(*plan.sizes[0], "example")).eval()
    model = model.to(plan.device, getattr(torch, dtype))
    if quantized:
        from torchao import quantization

        quantization.quantize_(model.backbone.blocks, getattr(quantization, quantized)())
    if compiled and plan.compiles:
        model = torch.compile(model, mode=compiled)
    return model


def inference(report: Report, plan: Plan, limits: dict) -> None:
    """Forms of the first size by batch, chips on the device: what the model alone takes."""
    size = plan.sizes[0][1]
    flops = flops_per_image(_built(*plan.sizes[0], "example"))
    for name, (_, tf32, _, compiled) in FORMS.items():

        @torch.no_grad()
        def measure(name=name, tf32=tf32, compiled=compiled) -> Iterator[dict]:
            model = form(name, plan)
            batches = (1, *plan.batches[-1:]) if compiled else (1, *plan.batches)
            for batch in batches:
                chips = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8)
                chips = chips.to(plan.device)
                reset_peak_memory()
                with fast_products(plan.device) if tf32 else nullcontext():
                    row = rate(lambda c=chips: model(c), batch, plan)
                done = flops * row["images_per_second"]
                peak = peak_memory_bytes(plan.device)
                yield row | {"peak_bytes": peak, "share_of_bf16_rate": done / limits["bf16"]}

        report.rows("inference", {"form": name, "backbone": plan.sizes[0][0]}, measure)


def scenarios(report: Report, plan: Plan) -> None:
    """LoadGen's four scenarios of bf16 (in a dry run fp32), up to 64 queries in one prediction."""
    name = "bf16" if plan.device == "cuda" else "eager_fp32"

    def measure() -> Iterator[dict]:
        size = plan.sizes[0][1]
        chips = np.random.default_rng(0).integers(0, 256, (64, 3, size, size), dtype=np.uint8)
        predict = torch_predict(form(name, plan), plan.device)
        settings = LoadSettings(
            seconds=plan.load_seconds, max_batch=64 if plan.device == "cuda" else 2
        )
        system = System([predict], chips, settings)
        brief = plan.device == "cpu"
        table, _ = all_scenarios(system, None, energy_meter(plan.device), brief=brief)
        yield from table.to_dict("records")

    # LoadGen calls back from threads of its own, which an interruption would leave behind.
    row = {"form": name, "backbone": plan.sizes[0][0]}
    report.rows("scenarios", row, measure, least_s=plan.limit_s // 2 + 10)


def gpu_tests(report: Report) -> str:
    """The last line of `pytest -m gpu`, in the time that is left."""
    left = report.ends - time.monotonic()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-x", "tests/gpu"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
    except (subprocess.TimeoutExpired, ValueError):
        return "no time left"
    report.say(done.stdout[-3000:])
    return done.stdout.strip().splitlines()[-1]


def main(arguments: list[str] | None = None) -> None:
    """Measure, in the order of what is wanted most, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=int, default=520, help="seconds for all of it")
    parser.add_argument("--results_path", type=Path, default=Path("benchmark_results"))
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes, on the CPU")
    options = parser.parse_args(arguments)
    plan = DRY if options.dry_run else Plan()
    if plan.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "error: no GPU is visible; --dry_run goes without\n")
    options.results_path.mkdir(parents=True, exist_ok=True)
    (options.results_path / "gpu_log.txt").unlink(missing_ok=True)
    start = time.monotonic()
    report = Report(options.results_path, start + options.budget, plan.limit_s)
    sides = (64,) if options.dry_run else None
    limits = machine_limits(plan.device, torch.get_num_threads(), sides)
    if plan.device == "cuda":
        with fast_products(plan.device):
            limits["tf32"] = machine_limits(plan.device, torch.get_num_threads())["fp32"]
    report.say(f"limits: {numbers(limits)}")
    record = {"dry_run": options.dry_run, "limits": limits, "environment": environment()}
    write_json(options.results_path / "gpu.json", record)
    data = RunConfig().data()
    training(report, plan, data, limits)
    features(report, plan, limits)
    original_job(report, plan)
    inference(report, plan, limits)
    scenarios(report, plan)
    record["tests"] = "not run" if options.dry_run else gpu_tests(report)
    record["seconds"] = round(time.monotonic() - start, 1)
    write_json(options.results_path / "gpu.json", record)
    report.say(f"tests: {record['tests']}  seconds {record['seconds']}")


if __name__ == "__main__":
    main()
