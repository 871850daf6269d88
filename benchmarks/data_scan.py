"""Does reading a data set stay flat in memory? Peak memory and images per second at N/10 and N.

`python benchmarks/data_scan.py [--images 50000]` writes N small JPEG chips to a temporary folder
and, in a fresh process for each size, loads them (`load_data`) and passes once over all of them
(`ChipDataset` through a `DataLoader` in the same process). Needs about 250 MB of disk at 50,000.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from PIL import Image
from tqdm import tqdm

SIZE = 98  # pixels, 7 x 7 patches of 14
REPOSITORY = Path(__file__).resolve().parents[1]

MEASURE = """
import json, resource, sys, time
from torch.utils.data import DataLoader
from helpers.data.dataset import load_data
from helpers.data.splits import SPLITS

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB

imports = peak_mb()
start = time.perf_counter()
data = load_data(sys.argv[1])
loaded, scan = time.perf_counter(), peak_mb()
n = sum(len(chips) for split in SPLITS
        for chips, _ in DataLoader(data.dataset(split, int(sys.argv[2])), batch_size=64))
done = time.perf_counter()
assert n == len(data.manifest)
print(json.dumps({
    "images": n,
    "load_data_images_per_s": n / (loaded - start),
    "dataset_images_per_s": n / (done - loaded),
    "peak_after_imports_mb": imports,
    "peak_after_load_data_mb": scan,
    "peak_at_end_mb": peak_mb(),
}))
"""


def make_chips(root: Path, n: int) -> None:
    """Write n different JPEG chips, smooth random colours, every second one brighter."""
    rng = np.random.default_rng(0)
    rows = []
    for number in tqdm(range(n), desc="making chips", disable=None):
        label = ("dark", "bright")[number % 2]
        low = rng.integers(0, 128, (7, 7, 3)) + 100 * (number % 2)
        chip = Image.fromarray(low.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        path = Path(label, f"{number:06d}.jpg")
        (root / label).mkdir(exist_ok=True)
        chip.save(root / path)
        rows.append((path.as_posix(), label))
    manifest = pd.DataFrame(rows, columns=["img_path", "label"])
    manifest.to_csv(root / "all.csv", index=False)
    manifest.head(n // 10).to_csv(root / "tenth.csv", index=False)


def main() -> None:
    """Make the chips, measure both sizes, print a table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--images", type=int, default=50_000, help="N, the larger size")
    n = parser.parse_args().images
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        make_chips(Path(folder), n)
        print(f"{n} chips of {SIZE}x{SIZE} px made in {time.perf_counter() - start:.0f} s")
        results = []
        for manifest in ("tenth.csv", "all.csv"):
            command = [sys.executable, "-c", MEASURE, f"{folder}/{manifest}", str(SIZE)]
            done = subprocess.run(command, check=True, capture_output=True, cwd=REPOSITORY)
            results.append(json.loads(done.stdout))
    print(f"{psutil.cpu_count()} CPU cores, {psutil.virtual_memory().total / 2**30:.0f} GiB memory")
    print(pd.DataFrame(results).astype(int).set_index("images").T.to_string())


if __name__ == "__main__":
    main()
