"""Build the forms of one trained classifier.

Each builder writes its files into one folder and describes them as a `Variant`, which
`runtimes.load` turns into predictions in this or in any other process. What this machine cannot
build becomes a row with the reason.
"""

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pandas as pd

from helpers import InputError
from helpers.console import progress_bar
from helpers.deployment.runtimes import LAYOUTS, Predict, Variant, load
from helpers.deployment.variants.onnx import (
    build_onnx_fp32,
    build_onnx_int8_dynamic,
    build_onnx_int8_static,
)
from helpers.deployment.variants.openvino import (
    build_openvino_bf16,
    build_openvino_fp32,
    build_openvino_int4_weights,
    build_openvino_int8,
)
from helpers.deployment.variants.pruning import (
    build_recovered,
    build_sparse_2_4,
    build_structured,
    build_structured_int8,
    build_unstructured,
)
from helpers.deployment.variants.source import CONTROL, REFERENCE, STRUCTURED, Removal, Source
from helpers.deployment.variants.structure import Unavailable
from helpers.deployment.variants.torch import (
    INT8_DYNAMIC,
    build_autocast,
    build_compiled,
    build_control,
    build_eager,
    build_int4_weights,
    build_lora_merged,
    build_lora_unmerged,
    build_pure,
    build_torchao,
)
from helpers.training.precision import fastest

Builder = Callable[[Source], Variant]


# int8 as NNCF advises, without SmoothQuant, and with what is not int8 in bf16.
_INT8 = {"": {}, "_unsmoothed": {"smooth": False}, "_bf16": {"hint": "bf16"}}


def _int8_steps(start: str, build: Callable[..., Variant], *given) -> dict[str, Builder]:
    names = {f"{start}_int8{end}": options for end, options in _INT8.items()}
    return {name: partial(build, name, *given, **options) for name, options in names.items()}


def _structured_steps(removal: Removal) -> dict[str, Builder]:
    """From fp32 to int8 by way of fewer heads and units: every step a form of its own."""
    name = removal.name
    return {
        name: partial(build_structured, removal),
        f"{name}_recovered": partial(build_recovered, removal),
        **_int8_steps(name, build_structured_int8, removal),
    }


BUILDERS: dict[str, Builder] = {
    REFERENCE: build_eager,
    CONTROL: build_control,
    "lora_unmerged": build_lora_unmerged,
    "lora_merged": build_lora_merged,
    "bf16_autocast": partial(build_autocast, "bf16_autocast", "bfloat16"),
    "fp16_autocast": partial(build_autocast, "fp16_autocast", "float16"),
    "bf16": partial(build_pure, "bf16", "bfloat16"),
    "fp16": partial(build_pure, "fp16", "float16"),
    "int8_dynamic": partial(
        build_torchao,
        "int8_dynamic",
        "torchao: int8 weights, activations quantized as they come, one scale a token",
        "int8",
        INT8_DYNAMIC,
    ),
    "int8_weights": partial(
        build_torchao,
        "int8_weights",
        "torchao: int8 weights, fp32 arithmetic",
        "fp32",
        "Int8WeightOnlyConfig",
    ),
    "int4_weights": build_int4_weights,
    "onnx_fp32": build_onnx_fp32,
    "onnx_int8_dynamic": build_onnx_int8_dynamic,
    "onnx_int8_static": build_onnx_int8_static,
    "openvino_fp32": build_openvino_fp32,
    "openvino_bf16": build_openvino_bf16,
    "openvino_int4_weights": build_openvino_int4_weights,
    "pruned_30": partial(build_unstructured, 30),
    "pruned_50": partial(build_unstructured, 50),
    "pruned_70": partial(build_unstructured, 70),
    "sparse_2_4": build_sparse_2_4,
}
DEFAULT = (
    *BUILDERS,
    "openvino_int8",
    "structured_40",
    "structured_40_recovered",
    "structured_40_int8",
)
"""What is built where no names are given: of the steps below one way up. `torch.compile` takes half
a minute, and OpenVINO's fp32 gains more in a second."""

BUILDERS |= {f"compiled_{p}": partial(build_compiled, p) for p in ("fp32", "bf16", "int8")}
BUILDERS |= _int8_steps("openvino", build_openvino_int8)
for _percent, _taylor in product(STRUCTURED, (False, True)):
    BUILDERS |= _structured_steps(Removal(_percent, _taylor))


TOO_SLOW = 4
"""Times as long as the reference for the same chips: a form that is no candidate on this machine,
such as 16-bit floats or int8 in PyTorch on a CPU without their instructions, where measuring it
alone would take minutes. Only where `_TRIAL` chips take `NOTICEABLE` seconds at best; below, a
busy moment decides."""
NOTICEABLE = 0.1
_TRIAL = 8  # chips: what emulated arithmetic costs shows in batches first
_ROUNDS = 8  # of a batch in each layout


def build_variants(
    source: Source, names: tuple[str, ...], threads: int
) -> tuple[dict[str, Variant], dict[str, Predict], pd.DataFrame]:
    """Build variants one after the other, load each and let it predict once.

    What cannot be built, loaded or run on this machine, answers with numbers that are not finite
    or takes `TOO_SLOW` times as long as the reference, is listed with the reason and is in nothing
    else that is returned.

    Args:
        source: what they are made of.
        names: of `BUILDERS`.
        threads: of one prediction on the CPU.

    Returns:
        The variants and their loaded predict functions by name, and a table of all names:
        `variant, made, arithmetic, batches` (the layout that was fastest here, see
        `runtimes.LAYOUTS`), `mebibytes_on_disk, unavailable`.

    Raises:
        InputError: the reference is among those that do not run.
    """
    source.folder.mkdir(parents=True, exist_ok=True)
    chips = source.train[0][:_TRIAL].numpy()
    variants, predicts, rows, seconds = {}, {}, [], {}
    for name in progress_bar(names, desc="building variants"):
        try:
            with _quiet():
                variant, predict = _laid_out(BUILDERS[name](source), chips, threads, source.device)
                variant.save()
                if not np.isfinite(predict(chips)).all():
                    raise Unavailable("its logits are not finite")
                seconds[name] = min(_seconds(predict, chips) for _ in range(2))
                times = seconds[name] / seconds.get(REFERENCE, seconds[name])
                if seconds[name] > NOTICEABLE and times > TOO_SLOW:
                    raise Unavailable(f"takes {times:.0f} times as long as {REFERENCE} here")
        except Exception as error:  # exporters, quantizers and runtimes raise whatever they like
            rows.append({"variant": name, "unavailable": _reason(error)})
        else:
            variants[name], predicts[name] = variant, predict
            rows.append(
                {
                    "variant": name,
                    "made": variant.made,
                    "arithmetic": variant.precision,
                    "batches": variant.options.get("batches"),
                    "mebibytes_on_disk": variant.bytes_on_disk / 2**20,
                }
            )
        if name == REFERENCE and name not in variants:
            raise InputError(f"model_path: {name} cannot serve it: {rows[-1]['unavailable']}")
    columns = ["variant", "made", "arithmetic", "batches", "mebibytes_on_disk", "unavailable"]
    return variants, predicts, pd.DataFrame(rows, columns=columns)


def _laid_out(
    variant: Variant, chips: np.ndarray, threads: int, device: str
) -> tuple[Variant, Predict]:
    """The variant, loaded, in the layout that answers a batch soonest; the first unless one gains.

    Layouts take turns. One chip has none: it is computed by all threads.
    """
    layouts = LAYOUTS.get(variant.runtime, ())
    if not layouts:
        return variant, load(variant, threads, device)
    forms = [replace(variant, options=variant.options | {"batches": name}) for name in layouts]
    loaded = [(form, load(form, threads, device)) for form in forms]
    rounds = [[_seconds(predict, chips) for _, predict in loaded] for _ in range(_ROUNDS)]
    seconds = dict(zip(layouts, np.min(rounds[1:], axis=0), strict=True))  # the first compiles
    return loaded[layouts.index(fastest(seconds, default=layouts[0]))]


def _seconds(predict: Predict, chips: np.ndarray) -> float:
    start = time.perf_counter()
    predict(chips)
    return time.perf_counter() - start


def _reason(error: Exception) -> str:
    """Why there is no such variant, in one line."""
    if isinstance(error, Unavailable | InputError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed (`pip install {error.name}`)"
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the progress bars and remarks of exporters and quantizers out of reports."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            open(os.devnull, "w") as nothing,
            redirect_stdout(nothing),
            redirect_stderr(nothing),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        logging.disable(level)
