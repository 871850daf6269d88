"""Which precision trains faster on this machine: measured once, in a second or two, and kept."""

import copy
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from accelerate.utils import broadcast_object_list
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from helpers.models.adapters import AdapterSettings, add_adapter
from helpers.models.backbones import build_backbone
from helpers.models.classifier import Classifier, ClassifierConfig
from helpers.records import cpu_name, write_json
from helpers.training.processes import processes

MEASUREMENTS = "precision.json"  # in the cache

_BLOCKS = 2  # all blocks of a ViT are alike, so two tell the ratio
_STEP_SECONDS = 0.05  # of fp32 that the images of a step may take
_BUDGET_SECONDS = 1.0  # for all steps after the first ones
_ROUNDS = 7
_HOPELESS = 3.0  # times as slow in its first step: given up at once
_START_SECONDS = 0.3  # unless that was the time to load what a first step needs
_GAIN = 1.05  # below it noise would decide, and fp32 is exact

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Fp32Attention(TorchFunctionMode):
    """Attention in fp32 where autocast would take bf16; all else stays as autocast has it.

    On a CPU without AMX the backward pass of PyTorch 2.11's attention takes longer in bf16 than in
    fp32 (`reports/log.md`, 2026-11-30).
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call `func`; queries, keys and values of an attention (.., N, D) are made fp32 first."""
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs or {})
        query, key, value = (tensor.float() for tensor in args)
        with torch.autocast("cpu", enabled=False):
            return func(query, key, value, **kwargs or {}).to(args[0].dtype)


def attention_precision(device: str, precision: str) -> AbstractContextManager:
    """What the forward pass of a training step in `precision` stands in."""
    return Fp32Attention() if (device, precision) == ("cpu", "bf16") else nullcontext()


def fastest(seconds: dict[str, float], default: str = "fp32") -> str:
    """What to take, by the seconds of a step; the default unless another clearly gains."""
    best = min(seconds, key=seconds.get)
    return best if seconds[default] >= _GAIN * seconds[best] else default


def measured(
    step: Callable[[str], None],
    precisions: list[str],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of a step in each precision, in turns, after a first step of each.

    fp32 comes first; a precision that is hopeless in its first step is left out.
    """

    def seconds(precision: str) -> float:
        start = clock()
        step(precision)
        return clock() - start

    step("fp32")  # what a process does once
    first = {"fp32": seconds("fp32")}
    for precision in precisions[1:]:
        taken = seconds(precision)
        if taken <= max(_HOPELESS * first["fp32"], _START_SECONDS):
            first[precision] = taken
    samples: dict[str, list[float]] = {precision: [] for precision in first}
    end = clock() + _BUDGET_SECONDS
    while len(samples["fp32"]) < _ROUNDS and (not samples["fp32"] or clock() < end):
        for precision, values in samples.items():
            values.append(seconds(precision))
    return {precision: median(values) for precision, values in samples.items()}


@dataclass(frozen=True)
class LoraStep:
    """A training step that is timed.

    Two blocks of random weights stand for the backbone; on a CPU a step has as many of the batch's
    images as take about 50 ms.
    """

    backbone: str  # a name that `architecture` takes
    image_size: int  # pixels
    bands: int  # how many
    targets: tuple[str, ...]  # layers of the blocks that an adapter is put on
    batch_size: int  # images per step of the run
    device: str  # `cpu` or `cuda`


def step_seconds(timed: LoraStep, precisions: list[str], cache_path: str) -> dict[str, float]:
    """`measured` of LoRA steps on this machine, from the cache where they are there already.

    Of several processes the main one measures. Precisions are those of the device, fp32 first.
    """
    if len(precisions) == 1:
        return {}
    machine = torch.cuda.get_device_name() if timed.device == "cuda" else cpu_name()
    key = (
        f"{machine}; {torch.get_num_threads()} threads; torch {torch.__version__}; "
        f"{timed.backbone}; {timed.image_size} px; {timed.batch_size} images; "
        f"{', '.join(precisions)}"
    )
    file, found = Path(cache_path) / MEASUREMENTS, None
    everyone = processes(timed.device)
    if everyone.is_main_process:
        entries = _entries(file)
        found = entries.get(key)
        if found is None:
            with torch.random.fork_rng():  # dropout and weights draw from it
                found = measured(_step(timed), precisions)
            write_json(file, entries | {key: found})
    return broadcast_object_list([found])[0]


def _entries(file: Path) -> dict[str, dict[str, float]]:
    try:
        entries = json.loads(file.read_text())
        return {k: v for k, v in entries.items() if v["fp32"] > 0 and v.keys() <= _DTYPES.keys()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or an odd one
        return {}


def _step(timed: LoraStep) -> Callable[[str], None]:
    """One forward and backward pass of a LoRA run in the precision that it is given."""
    size, bands, device = timed.image_size, timed.bands, timed.device
    vit = build_backbone(timed.backbone, size, bands, initialise=False)
    vit.blocks = vit.blocks[:_BLOCKS]
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    units = {"mean": (0.0,) * bands, "std": (255.0,) * bands}
    config = ClassifierConfig(
        timed.backbone, "random", size, tuple(range(bands)), ("a", "b"), **units
    )
    model = add_adapter(Classifier(config, vit), AdapterSettings(targets=timed.targets)).to(device)
    low = copy.deepcopy(model)
    for parameter in low.parameters():  # as in training
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    chips = torch.zeros(timed.batch_size, bands, size, size, dtype=torch.uint8, device=device)

    def step(precision: str, images: int = timed.batch_size) -> None:
        autocast = torch.autocast(device, _DTYPES[precision], enabled=precision != "fp32")
        with autocast, attention_precision(device, precision):
            logits = (low if precision == "bf16" else model)(chips[:images])
        functional.cross_entropy(logits.float(), logits.argmax(dim=1)).backward()
        if device == "cuda":
            torch.cuda.synchronize()

    if device == "cuda":
        return step
    step("fp32", 1)
    start = time.perf_counter()
    step("fp32", 1)
    images = int(_STEP_SECONDS / (time.perf_counter() - start))
    return lambda precision: step(precision, min(max(images, 1), timed.batch_size))
