"""What does Ray cost on one machine, against the local engine?

`python -m benchmarks.ray_cost [--rounds 3] [--side 6000]` needs `requirements-ray.txt`. Engines
take turns, the local one twice (`control`), each in a fresh process with the machine's cores: all
threads in one process, or on Ray a worker with one thread for every core. Seconds are those of
whole processes, a started and ended Ray in them.

- `map`: `helpers.predict` on a square scene full of data (`scene_memory.make_scene`).
- `train`: the runs of a comparison, LoRA with four seeds on the embedded example, without a cache.

Prints the medians and ends with one line of JSON: seconds of every round, and the median over
rounds of their ratio to the local engine's of the same round.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from benchmarks.scene_memory import make_scene, map_in_a_fresh_process
from helpers.console import run_command
from helpers.deployment.scoring import open_model
from helpers.models.files import EXAMPLE_MODEL
from helpers.records import cpu_name

ENGINES = {"local": "local", "control": "local", "ray": "ray"}
TRAINING = (
    "from helpers.evaluation.comparison import CompareConfig, compare; "
    "compare(CompareConfig.checked(methods=('lora',), seeds=(0, 1, 2, 3), fractions=(), "
    "block_counts=(), epochs={epochs}, engine='{engine}', output_path='runs', "
    "history_path='runs', cache_path='cache'))"
)


def training_seconds(engine: str, epochs: int) -> float:
    """Wall seconds of a comparison in a process and a folder of its own."""
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    environment |= {"OMP_NUM_THREADS": "1"} if engine == "ray" else {}
    training = TRAINING.format(epochs=epochs, engine=engine)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", training], cwd=folder, env=environment, check=True)
        return time.perf_counter() - start


def main() -> None:
    """Map and train with both engines in turn; print what each took."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=6_000, help="of the scene, pixels")
    parser.add_argument("--epochs", type=int, default=3, help="of each training")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scenes:
        scene = Path(scenes, "scene.tif")
        resolution = open_model(EXAMPLE_MODEL).classifier.resolution or 0.5
        make_scene(scene, arguments.side, 1, resolution)
        for number in range(arguments.rounds):
            for name in list(ENGINES)[:: -1 if number % 2 else 1]:
                engine = ENGINES[name]
                options = ("--engine", engine, "--overwrite")
                mapped = map_in_a_fresh_process(scene, EXAMPLE_MODEL, *options)
                taken = {
                    "map": mapped["seconds"],
                    "train": training_seconds(engine, arguments.epochs),
                }
                rows += [
                    {"job": job, "engine": name, "round": number, "seconds": seconds}
                    for job, seconds in taken.items()
                ]
                print(f"{name}: map {taken['map']:.1f} s, train {taken['train']:.1f} s", flush=True)
    table = pd.DataFrame(rows).set_index(["job", "round", "engine"]).seconds.unstack()
    ratios = table.div(table.local, axis=0)
    result = {}
    for job, seconds in table.groupby("job"):
        result[job] = {
            name: {
                "seconds": seconds[name].tolist(),
                "of_local": ratios.loc[job][name].median(),
            }
            for name in ENGINES
        }
    print(table.groupby("job").median().round(1).to_string())
    print(json.dumps({"cpu": cpu_name(), "cores": os.cpu_count(), **result}))


if __name__ == "__main__":
    run_command(main)
