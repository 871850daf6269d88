"""Memory and cold start of every variant, each in a fresh process."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from helpers.benchmarking.bench import Bench
from helpers.deployment.runtimes import Variant, worker_environment


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
            command = [sys.executable, "-m", "helpers.deployment.runtimes",
                       "--variant", str(variant.save()), "--chips", str(chips),
                       "--batch_sizes", *sizes,
                       "--threads", str(bench.threads), "--device", bench.device,
                       "--started", str(time.time())]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, env=worker_environment())
            if done.returncode:
                raise RuntimeError(f"{variant.name} failed in a fresh process:\n{done.stderr}")
            rows.append({"variant": variant.name} | json.loads(done.stdout.splitlines()[-1]))
        progress(f"{len(variants)} variants, each in a fresh process")
    return pd.DataFrame(rows)
