"""What a fit knows of its candidates: histories, best epochs, and which have stopped."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor

HISTORY_COLUMNS = (
    "epoch",
    "train_loss",
    "valid_loss",
    "train_acc",
    "valid_acc",
    "valid_auroc",
    "learning_rate",
    "seconds",
    "images_per_second",
    "peak_memory_bytes",
)


@dataclass
class Progress:
    """What a fit knows after `epoch` epochs; the lists have one entry per candidate.

    The learning rate in a history is that of the epoch's last step.
    """

    histories: list[list[dict]]
    best_loss: list[float]
    best_epoch: list[int]
    best_values: list[list[Tensor]]
    stopped: list[bool]
    failures: list[str]
    epoch: int = 0

    @classmethod
    def start(cls, groups: list[dict]) -> "Progress":
        """Before the first epoch."""
        n = len(groups)
        values = [[p.detach().clone() for p in group["params"]] for group in groups]
        return cls([[] for _ in groups], [math.inf] * n, [0] * n, values, [False] * n, [""] * n)

    @property
    def best(self) -> int:
        """Index of the candidate with the lowest validation loss."""
        return int(np.argmin(self.best_loss))

    def history(self, candidate: int) -> pd.DataFrame:
        """One row per epoch that the candidate trained, HISTORY_COLUMNS."""
        return pd.DataFrame(self.histories[candidate], columns=HISTORY_COLUMNS)

    def note_failures(self, losses: Tensor) -> None:
        """Note candidates with a loss that is not finite; losses (batches, candidates)."""
        for candidate in (~losses.isfinite()).any(dim=0).nonzero().flatten().tolist():
            if not self.stopped[candidate]:
                batch = int((~losses[:, candidate].isfinite()).nonzero()[0]) + 1
                self.failures[candidate] = (
                    f"the training loss is not finite at epoch {self.epoch}, batch {batch}"
                )

    def record(self, groups: list[dict], row: dict, patience: int) -> None:
        """Append the epoch to the histories of those that still run; keep the best values.

        A candidate that broke has no best epoch: what it learned before is not to be relied on.
        """
        for candidate, group in enumerate(groups):
            if self.stopped[candidate]:
                continue
            line = {k: v[candidate] if isinstance(v, list) else v for k, v in row.items()}
            self.histories[candidate].append(line)
            if not math.isfinite(line["valid_loss"]) and not self.failures[candidate]:
                self.failures[candidate] = (
                    f"the validation loss is not finite at epoch {self.epoch}"
                )
            if self.failures[candidate]:
                self.best_loss[candidate], self.best_epoch[candidate] = math.inf, 0
            elif line["valid_loss"] < self.best_loss[candidate]:
                self.best_loss[candidate] = line["valid_loss"]
                self.best_epoch[candidate] = self.epoch
                self.best_values[candidate] = [p.detach().clone() for p in group["params"]]
            waited = self.epoch - self.best_epoch[candidate]
            self.stopped[candidate] = bool(self.failures[candidate]) or (waited >= patience)

    def is_reported(self, epochs: int) -> bool:
        """Whether the epoch is one of about ten that are said."""
        every = max(1, epochs // 10)
        return self.epoch == 1 or self.epoch % every == 0 or all(self.stopped)

    def line(self, epochs: int) -> str:
        """The state of the best candidate in one line."""
        best, row = self.best, self.histories[self.best][-1]
        if row["epoch"] < self.epoch:
            state = (
                f"best candidate stopped, valid loss {self.best_loss[best]:.4f} "
                f"at epoch {self.best_epoch[best]}"
            )
        else:
            state = (
                f"train loss {row['train_loss']:.4f}  valid loss {row['valid_loss']:.4f}  "
                f"valid accuracy {row['valid_acc']:.3f}  valid AUROC {row['valid_auroc']:.3f}"
            )
        running = self.stopped.count(False)
        others = f"  {running} of {len(self.stopped)} running" if len(self.stopped) > 1 else ""
        return f"epoch {self.epoch:3d}/{epochs}  {state}{others}"
