"""Tables of measurements that are on disk after every row, within a budget of seconds."""

import gc
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from helpers.records import written_whole


@dataclass
class Report:
    """Tables that are written after every row, and the clock.

    Args:
        folder: where they go.
        ends: when the time is over, on the clock of `time.monotonic`.
        limit_s: most seconds of one row.
    """

    folder: Path
    ends: float
    limit_s: int
    tables: dict[str, list[dict]] = field(default_factory=dict)

    def say(self, line: str) -> None:
        """Print a line and keep it."""
        print(line, flush=True)
        with open(self.folder / "gpu_log.txt", "a") as log:
            log.write(f"{line}\n")

    def rows(
        self, table: str, row: dict, measure: Callable[[], Iterator[dict]], least_s: int = 1
    ) -> None:
        """Add what a measurement yields to a table; where it ends early, a row says why.

        Args:
            table: its name.
            row: what the measurement's rows begin with.
            measure: yields them.
            least_s: what must be left of the time; from 10 on it is not interrupted.
        """
        rows, failure = self.tables.setdefault(table, []), ""
        left = int(min(self.limit_s, self.ends - time.monotonic()))
        try:
            if left < least_s:
                raise TimeoutError("no time left")
            with limited(left) if least_s < 10 else nullcontext():
                for found in measure():
                    rows.append(row | found)
                    self.say(f"{table}: {numbers(rows[-1])}")
        except Exception as error:  # a kernel, compiler or quantizer raises whatever it likes
            failure = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            rows.append(row | {"failure": failure})
            self.say(f"{table}: {numbers(rows[-1])}")
        with written_whole(self.folder / f"gpu_{table}.csv") as part:
            pd.DataFrame(rows).to_csv(part, index=False, float_format="%.5g")
        torch.compiler.reset()
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()


def numbers(row: dict) -> str:
    """A row in one line."""
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
    )


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after so many seconds, between two steps of the interpreter."""

    def stop(*_) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
