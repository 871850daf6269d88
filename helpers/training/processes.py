"""The processes of a run, one or several, and where each of them computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor

_PATIENCE = timedelta(days=1)  # of who waits while the main process decodes a large data set


def processes(device: str) -> PartialState:
    """The processes of this run on `cpu` or `cuda`; each of several has a GPU of its own now.

    Accelerate keeps the device that a process began with; a notebook may train on another.
    """
    began = PartialState._shared_state.get("device")
    if not torch.distributed.is_initialized() and began and began.type != device:
        AcceleratorState._reset_state(reset_partial_state=True)
    return PartialState(cpu=device == "cpu", timeout=_PATIENCE)


def fresh_accelerator(device: str, mixed_precision: str = "no", **options: Any) -> Accelerator:
    """An accelerator of the processes of this run, in a precision by Accelerate's word for it.

    Accelerate keeps the first precision of a process; a notebook trains in several.
    """
    processes(device)
    AcceleratorState._reset_state()
    return Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision, **options)


def several() -> PartialState | None:
    """The processes of this run where there are several."""
    return PartialState() if torch.distributed.is_initialized() else None


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch computes with so many threads on the CPU; afterwards with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def fast_products(device: str | torch.device) -> Iterator[None]:
    """On a GPU, products of fp32 matrices in TF32 (10 bits of fraction); elsewhere nothing."""
    before = torch.get_float32_matmul_precision()
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def moved(tensor: Tensor, device: str | torch.device) -> Tensor:
    """The tensor on a device; towards a GPU through pinned memory, so that nobody waits."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def said_once(report: Callable[[str], None], everyone: PartialState) -> Callable[[str], None]:
    """The report of the main process; the others' says nothing."""
    return report if everyone.is_main_process else lambda line: None
