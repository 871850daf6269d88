"""Who predicts the blocks of a scene: this process, or the workers of a Ray cluster.

Both cut the same windows and predict them in the same batches (`predict_blocks`). Only the process
that makes the map writes: what a worker says of a block comes back as a few kilobytes.
"""

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import rasterio

from helpers import InputError
from helpers.cluster import as_they_end, cluster, require_ray, workers_of
from helpers.data.scenes import (
    CACHE_BYTES,
    Block,
    Grid,
    Scene,
    open_raster,
    open_scene,
    read_windows,
)
from helpers.deployment.scoring import PredictConfig, Scorer, open_model, prefetched

WAITING = 2  # blocks that are handed out for each worker: the next one lies ready

Engine = Callable[
    [Scorer, Scene, Grid, PredictConfig, list[Block]],
    Iterator[tuple[Block, int, np.ndarray | None]],
]
"""Predicts blocks: yields a block, how many more of its cells are done, and, with the last of
them, its values (rows, cols, 1 + classes) float32: the share of data, and logits, NaN where that
share is small."""


def engine_of(config: PredictConfig) -> Engine:
    """The engine that `config.engine` names; InputError if it is not installed."""
    if config.engine == "local":
        return predict_blocks
    require_ray()
    return ray_blocks


def predict_blocks(
    scorer: Scorer, scene: Scene, grid: Grid, config: PredictConfig, blocks: list[Block]
) -> Iterator[tuple[Block, int, np.ndarray | None]]:
    """The engine that predicts here, a block after the other, while the next windows are read."""
    for block, values, cells, chips in prefetched(_batches(scorer, scene, grid, config, blocks)):
        if len(cells):
            values[cells[:, 0], cells[:, 1], 1:] = scorer.logits(chips)
            yield block, len(cells), None
        else:
            yield block, int(np.isnan(values[..., 1]).sum()), values


def _batches(
    scorer: Scorer, scene: Scene, grid: Grid, config: PredictConfig, blocks: list[Block]
) -> Iterator[tuple[Block, np.ndarray, np.ndarray, np.ndarray]]:
    """Of each block: its values to fill in, cells (n, 2) in it, and their chips.

    The last batch of a block is empty. Batches do not depend on what was done before, so that a
    form whose numbers depend on its batch (quantized as they come) answers as it would have.
    """
    classifier = scorer.classifier
    with open_raster(scene.path) as raster:
        for block in blocks:
            windows = read_windows(raster, grid, block, classifier.bands)
            shape = (block.rows, block.cols, 1 + len(classifier.classes))
            values = np.full(shape, np.nan, np.float32)
            values[..., 0] = windows.share
            cells = np.argwhere(windows.share >= config.min_data)
            for start in range(0, len(cells), config.batch_size):
                batch = cells[start : start + config.batch_size]
                yield block, values, batch, scorer.fitted(windows.chips(batch))
            yield block, values, cells[:0], np.empty(0)


@dataclass(frozen=True)
class _Job:
    """What every worker needs to know; `digest` is that of the classifier here."""

    scene: Scene
    grid: Grid
    config: PredictConfig
    digest: str


def ray_blocks(
    scorer: Scorer, scene: Scene, grid: Grid, config: PredictConfig, blocks: list[Block]
) -> Iterator[tuple[Block, int, np.ndarray | None]]:
    """The engine that has the workers of a Ray cluster predict, in whatever order they finish.

    A block is a task, and each worker process keeps its classifier from one task to the next: a
    task that dies with its process or machine is done again elsewhere, which an actor bound to a
    lost machine is not, and Ray Data would carry pixels through its store that a worker can read
    itself. Scene and classifier must lie under the same path on every machine.

    Raises:
        OSError: no cluster, one that is too small, one that loses a block again and again, or one
            with other files. Blocks that were saved stay, and the same command goes on.
    """
    if not blocks:
        return
    config = config.model_copy(update={"model_path": str(Path(config.model_path).resolve())})
    with cluster(config.ray_address) as ray:
        threads = config.threads or 1
        gpus, workers = workers_of(ray, threads, config.device)
        changes = {"threads": threads, "device": "cuda" if gpus else "cpu"}
        scene = replace(scene, path=scene.path.resolve())
        job = ray.put(_Job(scene, grid, config.model_copy(update=changes), scorer.digest))
        # max_calls: Ray would end a process that used a GPU after one block.
        task = ray.remote(num_cpus=threads, num_gpus=gpus, max_calls=0)(_predict_block)
        start = partial(task.remote, job)
        for block, values in as_they_end(ray, start, blocks, WAITING * workers):
            yield block, block.cells, values


def _predict_block(job: _Job, block: Block) -> np.ndarray:
    """The values of a block, in a worker's process; OSError where files are not what they were."""
    config, here = job.config, socket.gethostname()
    try:
        scorer = _opened(config.model_path, config.threads, config.device)
        scene = open_scene(job.scene.path)
    except InputError as error:
        raise OSError(f"on {here}: {error}") from None
    if scorer.digest != job.digest:
        raise OSError(f"{config.model_path}: is another model on {here}; copy it there")
    if scene != job.scene:
        raise OSError(f"{scene.path}: is another scene on {here}; copy it there")
    with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES):
        *_, (_, _, values) = predict_blocks(scorer, scene, job.grid, config, [block])
    return values


_opened = lru_cache(1)(open_model)
