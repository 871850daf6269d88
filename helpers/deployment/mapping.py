"""From a scene of any size to its map, with any form of a trained classifier."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import rasterio
from pydantic import Field, PositiveInt, model_validator

from helpers import InputError
from helpers.console import progress_bar
from helpers.data.cells import NODATA, PROBABILITY_STEP, BlockFiles, write_cells, write_map
from helpers.data.example import CROWNS, SCENE
from helpers.data.scenes import CACHE_BYTES, Block, Grid, Scene, open_scene
from helpers.deployment.engines import Engine, engine_of
from helpers.deployment.scoring import PredictConfig, Scorer
from helpers.evaluation.calibration import UNSURE, AnswerRule
from helpers.models.files import EXAMPLE_MODEL
from helpers.records import environment, write_json

REGIONS = (1, 100, 10_000)  # square kilometres, in `region_hours`
RESOLUTION_TOLERANCE = 0.1  # pixels that differ by more show the ground at another scale
# What belongs to one map; the record comes last and says that the others are whole.
_ENDINGS = (".tif", ".tif.aux.xml", ".parquet", ".png", ".json")


class MapConfig(PredictConfig):
    """Everything that decides the map of one scene, and what it is compared with."""

    model_path: str = Field(
        EXAMPLE_MODEL,
        description="a model_final.safetensors, an adapter folder, or the JSON of a built variant",
    )
    input: str = Field(
        "example", description="a scene (GeoTIFF, COG, VRT), or `example` (the embedded one)"
    )
    output: str = Field("runs/map_example", description="name of the results")
    stride: PositiveInt | None = Field(
        49, description="side of a cell, pixels; the window by default"
    )
    error_rate: float | None = Field(
        0.1, gt=0, lt=1, description="share of wrong answers; others are `unsure` (conformal)"
    )
    reference_path: str | None = Field(
        None,
        description="polygons of the positive class (GeoParquet, GeoPackage, GeoJSON, shapefile); "
        "the example scene has its own",
    )
    absent_below: float = Field(
        0.02, ge=0, lt=1, description="share of a window under polygons up to which it is negative"
    )
    present_above: float = Field(
        0.25, gt=0, le=1, description="share of a window under polygons from which it is positive"
    )

    @model_validator(mode="before")
    @classmethod
    def _the_example(cls, values: dict) -> dict:
        """Put the files of the embedded scene in the place of its name."""
        if values.get("input", "example") != "example":
            return values
        reference = values.get("reference_path") or str(CROWNS)
        return values | {"input": str(SCENE), "reference_path": reference}


Draw = Callable[[Path, tuple[int, ...], Path, Path], None]
"""Scene, its bands, the map's TIFF -> the picture, which is written to the last path."""


def map_scene(
    scorer: Scorer,
    rule: AnswerRule,
    path: Path,
    output: Path,
    config: PredictConfig,
    draw: Draw,
) -> tuple[dict, list[Path]]:
    """Say of every cell of a scene what it shows.

    Beside `<output>` appear a Cloud Optimized GeoTIFF of one pixel a cell (class, probabilities,
    and with an error rate whether the answer is unsure), a GeoParquet table of the cells, a
    picture and a record. A run that was killed goes on where it was and ends with the same files;
    one that is finished is read. Returns the record and the files.

    Raises:
        InputError: a scene that cannot be used or has no data, other results under that name, an
            engine that is not installed, or a process that is just writing them.
    """
    scene = open_scene(path)
    # Of chips an alpha band is a band; a scene may have one that the chips had not.
    chip_bands = scorer.classifier.chip_bands
    with_alpha = scene.alpha and chip_bands == scene.bands + 1
    scorer.check_pixels(str(path), scene.bands + with_alpha, scene.dtype)
    grid, engine = scene_grid(scorer, scene, config), engine_of(config)
    identity = _identity(scorer, path, grid, config)
    files = [Path(f"{output}{ending}") for ending in _ENDINGS]
    if path.resolve() in [file.resolve() for file in files]:
        raise InputError(f"output: {output} would replace the scene; give another name")
    store = BlockFiles(output.with_name(f".{output.name}.blocks"), identity)
    if not config.overwrite and any(file.exists() for file in files):
        record = _finished(files, identity, rule)
        if record is not None:
            store.remove()
            return record, files
        if not store.resumable:
            raise InputError(
                f"output: {next(f for f in files if f.exists())} is there; give another name, or "
                "--overwrite"
            )
    start = time.perf_counter()
    with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES), store:
        work = _Work(scorer, rule, scene, grid, store, config)
        try:
            predicted = work.predict(engine)
            work.check_data()
        except InputError:
            store.remove()
            raise
        classes, counts = scorer.classifier.classes, Counter()
        tif, _, parquet, png, json_file = files
        write_map(tif, scene, grid, work.planes(counts), classes, work.bands, store.folder)
        write_cells(parquet, scene, grid, work.tables())
        draw(path, scorer.classifier.bands, tif, png)
        seconds = time.perf_counter() - start
        record = {
            "scene": path.name,
            "model": {"file": scorer.name, "sha256": scorer.digest},
            "classifier": asdict(scorer.classifier),
            "config": config.model_dump(exclude={"model_path", "input", "output", "ray_address"}),
            "cells": {"rows": grid.shape[0], "cols": grid.shape[1], "window": grid.window,
                      "stride": grid.stride},
            "rule": asdict(rule),
            "counts": {
                "classes": {name: counts[i] for i, name in enumerate(classes)},
                "unsure": counts["unsure"],
                "no_data": counts["no_data"],
            },
            "predicted_in_this_run": predicted,
            "seconds_of_this_run": round(seconds, 3),
            "identity": identity,
            "environment": environment(),
        }  # fmt: skip
        write_json(json_file, record)
        store.remove()
    return record, files


def scene_grid(scorer: Scorer, scene: Scene, config: PredictConfig) -> Grid:
    """The windows of a scene: by default the size of a training chip in pixels.

    Raises:
        InputError: the scene's pixels are larger or smaller on the ground than the training
            chips', and neither `window` nor `resample` says what to do about it.
    """
    window = config.window
    if window is None:
        factor = 1.0
        if scorer.classifier.resolution and scene.metres_per_pixel:
            factor = scorer.classifier.resolution / scene.metres_per_pixel
        if abs(factor - 1) > RESOLUTION_TOLERANCE and not config.resample:
            raise InputError(
                f"{scene.path}: a pixel of {scene.metres_per_pixel:.3g} m, and one of the training "
                f"chips was {scorer.classifier.resolution:.3g} m, {factor:.3g} times as much; give "
                "--resample for windows as large on the ground, or --window"
            )
        window = max(1, round(scorer.chip_size * (factor if config.resample else 1)))
    return Grid(scene.height, scene.width, window, config.stride or window)


def _identity(scorer: Scorer, path: Path, grid: Grid, config: PredictConfig) -> dict:
    """What must be equal for a run to go on with the blocks of another."""
    facts = path.stat()
    return {
        "scene": path.name,
        "bytes": facts.st_size,
        "changed_ns": facts.st_mtime_ns,
        "model": scorer.digest,
        "grid": asdict(grid),
        "min_data": config.min_data,
        "batch_size": config.batch_size,
    }


def _finished(files: list[Path], identity: dict, rule: AnswerRule) -> dict | None:
    """The record of these very results, if they are whole."""
    try:
        record = json.loads(files[-1].read_text())
        same = record["identity"] == identity and record["rule"] == asdict(rule)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if same and all(file.is_file() for file in files) else None


@dataclass(frozen=True)
class _Work:
    """Everything that the blocks of one scene share."""

    scorer: Scorer
    rule: AnswerRule
    scene: Scene
    grid: Grid
    store: BlockFiles
    config: PredictConfig

    @cached_property
    def blocks(self) -> list[Block]:
        """All blocks of the scene."""
        bands = len(self.scorer.classifier.bands)
        return self.grid.blocks(bands * np.dtype(self.scene.dtype).itemsize)

    def predict(self, engine: Engine) -> int:
        """Have every block in the store; return how many windows were predicted for that."""
        missing = [block for block in self.blocks if self.store.load(block) is None]
        done = sum(block.cells for block in set(self.blocks) - set(missing))
        total = self.grid.shape[0] * self.grid.shape[1]
        predicted = 0
        name = self.scene.path.name
        with (
            progress_bar(total=total, initial=done, desc=name, unit="cell") as bar,
            closing(engine(self.scorer, self.scene, self.grid, self.config, missing)) as steps,
        ):
            for block, cells, values in steps:
                bar.update(cells)
                if values is not None:
                    self.store.save(block, values)
                    predicted += int(np.isfinite(values[..., 1]).sum())
        return predicted

    def check_data(self) -> None:
        """Raise InputError for a scene of which nothing can be said."""
        if not any(np.isfinite(self.store.load(block)[..., 1]).any() for block in self.blocks):
            raise InputError(
                f"{self.scene.path}: no cell has data on {self.config.min_data:.0%} of its ground; "
                "give a scene with data, or a smaller --min_data"
            )

    def answers(self) -> Iterator[tuple[Block, np.ndarray, np.ndarray, tuple]]:
        """Each block, the share of data of its cells, which have an answer, and their answers."""
        for block in self.blocks:
            values = self.store.load(block).reshape(block.cells, -1)
            there = np.isfinite(values[:, 1])
            yield block, values[:, 0], there, self.rule(values[there, 1:])

    @property
    def bands(self) -> list[str]:
        """Names of the map's bands."""
        probabilities = [f"p_{name}" for name in self.scorer.classifier.classes]
        return ["class", *probabilities, *["unsure"] * (self.config.error_rate is not None)]

    def planes(self, counts: Counter) -> Iterator[tuple[Block, np.ndarray]]:
        """The map's bands of each block; counts classes by number, `unsure` and `no_data`."""
        for block, _, there, (probabilities, classes, unsure) in self.answers():
            planes = np.full((len(self.bands), block.cells), NODATA, np.uint8)
            scaled = np.rint(probabilities.T / PROBABILITY_STEP)
            said = [classes, *scaled, unsure][: len(planes)]
            planes[:, there] = np.stack(said)
            counts.update(classes.tolist())
            counts.update({"unsure": int(unsure.sum()), "no_data": int((~there).sum())})
            yield block, planes.reshape(-1, block.rows, block.cols)

    def tables(self) -> Iterator[tuple[Block, pd.DataFrame]]:
        """The cells of each block, row by row; those without data have no answer."""
        names = np.array(self.scorer.classifier.classes, dtype=object)
        for block, share, there, (probabilities, classes, unsure) in self.answers():
            row, col = (i.ravel() for i in np.indices((block.rows, block.cols), np.int32))
            said = pd.DataFrame(
                {
                    "class": names[classes],
                    **{f"p_{name}": probabilities[:, i] for i, name in enumerate(names)},
                    "answer": np.where(unsure, UNSURE, names[classes]),
                },
                index=np.flatnonzero(there),
            ).astype({"class": "string", "answer": "string"})
            place = pd.DataFrame({"row": row + block.row, "col": col + block.col})
            yield block, place.join(said).assign(data_share=share)


def region_hours(record: dict, metres_per_pixel: float) -> pd.DataFrame:
    """What larger regions take at the rate of a map that was just made, by its record.

    One row a region of the same resolution: `square_km`, `megapixels`, `cells`, `hours`.
    """
    rate = record["predicted_in_this_run"] / record["seconds_of_this_run"]
    side = record["cells"]["stride"] * metres_per_pixel
    area = 1e6 * np.array(REGIONS, dtype=float)
    cells = area / side**2
    return pd.DataFrame(
        {
            "square_km": REGIONS,
            "megapixels": np.rint(area / metres_per_pixel**2 / 1e6).astype(int),
            "cells": np.rint(cells).astype(int),
            "hours": cells / rate / 3600,
        }
    )
