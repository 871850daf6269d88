"""Memory and cold start of every variant, each in a fresh process."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from helpers.benchmarking.bench import Bench
from helpers.console import progress_bar
from helpers.deployment.runtimes import Variant, worker_environment

# Processes started side by side. Nearly all of a start is importing, which one core does, and
# memory does not depend on neighbours.
_AT_ONCE = 2


def measure_memory(bench: Bench, variants: Sequence[Variant]) -> pd.DataFrame:
    """Memory and cold start of every variant, each in a fresh process that serves nothing else.

    Two processes run side by side.

    Returns:
        One row per variant: `variant` and what `runtimes.footprint` returns.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(_AT_ONCE) as pool:
        chips = Path(folder) / "chips.npy"
        np.save(chips, bench.chips[:32])
        rows = pool.map(partial(_footprint, bench, chips), variants)
        return pd.DataFrame(progress_bar(rows, desc="fresh processes", total=len(variants)))


def _footprint(bench: Bench, chips: Path, variant: Variant) -> dict:
    sizes = [str(size) for size in sorted(bench.config.batch_sizes)]
    command = [sys.executable, "-m", "helpers.deployment.runtimes",
               "--variant", str(variant.save()), "--chips", str(chips),
               "--batch_sizes", *sizes,
               "--threads", str(bench.threads), "--device", bench.device,
               "--started", str(time.time())]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=worker_environment())
    if done.returncode:
        raise RuntimeError(f"{variant.name} failed in a fresh process:\n{done.stderr}")
    return {"variant": variant.name} | json.loads(done.stdout.splitlines()[-1])
