"""How much memory does a map take, and does it grow with the scene?

`python -m benchmarks.scene_memory [--sides 4000 40000] [--model_path F] [--data_every 20]` makes
square scenes of three 8-bit bands (tiled, deflated, one tile in `--data_every` with data and the
others without, so that the large one takes minutes and not hours), maps each with `helpers.predict`
in a fresh process, prints that process's peak resident memory and ends with one line of JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import rasterio
from rasterio.windows import Window
from tqdm import tqdm

from helpers.console import run_command
from helpers.deployment.scoring import open_model
from helpers.models.files import EXAMPLE_MODEL

TILE = 512


def make_scene(path: Path, side: int, data_every: int, resolution: float) -> None:
    """Write a scene of side x side pixels of `resolution` metres; its other tiles hold nodata."""
    low = np.random.default_rng(0).integers(1, 256, (3, TILE // 8, TILE // 8), np.uint8)
    tile = low.repeat(8, axis=1).repeat(8, axis=2)
    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "nodata": 0, "tiled": True}
    profile |= {"height": side, "width": side, "blockxsize": TILE, "blockysize": TILE}
    profile |= {"compress": "deflate", "bigtiff": "if_safer", "crs": "EPSG:32615"}
    profile |= {"transform": rasterio.Affine(resolution, 0, 270_000, 0, -resolution, 3_300_000)}
    with rasterio.open(path, "w", **profile) as scene:
        for row in tqdm(range(0, side, TILE), desc=f"making {path.name}", disable=None):
            for col in range(0, side, TILE):
                if (row + col) // TILE % data_every == 0:
                    height, width = min(TILE, side - row), min(TILE, side - col)
                    scene.write(tile[:, :height, :width], window=Window(col, row, width, height))


def map_in_a_fresh_process(scene: Path, model_path: str, *options: str) -> dict:
    """Map a scene; its windows, seconds and the process's peak resident memory in MiB."""
    output = scene.with_name(f"{scene.stem}_map")
    command = [sys.executable, "-m", "helpers.predict", "--model_path", model_path, *options,
               "--input", str(scene), "--output", str(output), "--kind", "scene"]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)  # this child's own peak, not that of all children
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise OSError(f"helpers.predict failed on {scene.name}")
    record = json.loads(output.with_suffix(".json").read_text())
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "windows": record["predicted_in_this_run"],
        "seconds": time.perf_counter() - start,
        "peak_mib": usage.ru_maxrss * unit / 2**20,
    }


def main() -> None:
    """Make and map scenes of every size, smallest first; print their peak memory."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[4_000, 40_000], help="pixels")
    parser.add_argument("--model_path", default=EXAMPLE_MODEL)
    parser.add_argument("--data_every", type=int, default=20, help="one tile in so many has data")
    parser.add_argument("--threads", type=int, help="of one prediction; all cores by default")
    arguments = parser.parse_args()
    resolution = open_model(arguments.model_path, arguments.threads).classifier.resolution or 0.5
    options = ("--threads", str(arguments.threads)) if arguments.threads else ()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side in sorted(arguments.sides):
            scene = Path(folder, f"scene_{side}.tif")
            make_scene(scene, side, arguments.data_every, resolution)
            size = {"side": side, "scene_mib": scene.stat().st_size / 2**20}
            rows.append(size | map_in_a_fresh_process(scene, arguments.model_path, *options))
    table = pd.DataFrame(rows)
    table["above_smallest_mib"] = table.peak_mib - table.peak_mib[0]
    print(table.round(1).to_string(index=False))
    print(json.dumps(table.to_dict("records")))


if __name__ == "__main__":
    run_command(main)
