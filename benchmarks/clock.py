"""Where the seconds of a training go, and when each of its epochs ended."""

import time
from dataclasses import dataclass, field

from helpers.records import peak_memory_bytes, reset_peak_memory
from helpers.training.loop import STEP_PARTS

PARTS = ("once", *STEP_PARTS, "validation", "checkpoint")
"""`once` is all before the first step: weights, decoding or kept tokens, a measured precision.

A Trainer's steps are not taken apart: their seconds are in `backward`.
"""


@dataclass
class Clock:
    """Started with a training; every second until its last epoch's end belongs to one of `PARTS`.

    What follows the last epoch (test predictions, intervals, files) is not counted for any way.

    Args:
        parts: seconds by part, until the last mark.
        epochs: one entry each: seconds since the start, validation AUROC, peak memory in bytes, and
            seconds spent in steps since the start.
    """

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    epochs: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self):
        """Begin."""
        reset_peak_memory()
        self.start = self.last = time.perf_counter()

    def mark(self, part: str) -> None:
        """The time since the last mark went into a part."""
        now = time.perf_counter()
        self.parts[part] += now - self.last
        self.last = now

    def epoch(self, valid_auroc: float) -> None:
        """An epoch has ended with its validation."""
        self.mark("validation")
        self.epochs.append(
            {
                "s": self.last - self.start,
                "valid_auroc": valid_auroc,
                "peak_memory_bytes": peak_memory_bytes("cpu"),
                "steps_s": sum(self.parts[part] for part in STEP_PARTS),
            }
        )

    def images_per_s(self, images: int) -> float:
        """Of the steps after the first epoch, which warms up, or of the only one.

        Args:
            images: that an epoch trains on.
        """
        first = self.epochs[0]["steps_s"] if len(self.epochs) > 1 else 0.0
        return images * max(1, len(self.epochs) - 1) / (self.epochs[-1]["steps_s"] - first)
