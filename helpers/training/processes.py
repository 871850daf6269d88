"""The processes of a run, one or several, and where each of them computes."""

from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState

_PATIENCE = timedelta(days=1)  # of who waits while the main process decodes a large data set


def processes(device: str) -> PartialState:
    """The processes of this run; each of several has a GPU of its own from here on.

    Accelerate keeps the device that a process began with; a notebook may train on another.

    Args:
        device: `cpu` or `cuda`.
    """
    began = PartialState._shared_state.get("device")
    if not torch.distributed.is_initialized() and began and began.type != device:
        AcceleratorState._reset_state(reset_partial_state=True)
    return PartialState(cpu=device == "cpu", timeout=_PATIENCE)


def several() -> PartialState | None:
    """The processes of this run where there are several."""
    return PartialState() if torch.distributed.is_initialized() else None


def said_once(report: Callable[[str], None], everyone: PartialState) -> Callable[[str], None]:
    """The report of the main process; the others' says nothing."""
    return report if everyone.is_main_process else lambda line: None
