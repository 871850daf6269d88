"""Maps of scenes: every cell answered as its window is, whatever happens on the way."""

import json
import os
import signal
import time

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
from matplotlib import pyplot as plt
from rasterio.transform import from_origin
from rio_cogeo import cog_validate

from helpers import InputError
from helpers.data import scenes
from helpers.data.cells import NODATA, PROBABILITY_STEP
from helpers.deployment.mapping import map_scene
from helpers.deployment.scoring import PredictConfig, Scorer
from helpers.evaluation.calibration import AnswerRule
from helpers.models.classifier import ClassifierConfig
from helpers.reporting.maps import draw_map, map_figure
from tests.fake_data import write_scene

SIZE = 14
CLASSES = ("dark", "bright")
ENDINGS = (".tif", ".tif.aux.xml", ".parquet", ".png")


def brightness(chips):
    """Logits of a chip: how bright its first band is, and a little of where."""
    assert chips.shape[1:] == (3, SIZE, SIZE) and chips.dtype == np.uint8
    bright = chips[:, 0].mean((1, 2)) / 20 - 6 + chips[:, 1, 0, 0] / 1000
    return np.stack([-bright, bright], axis=1).astype(np.float32)


def make_scorer(tmp_path, logits_of=brightness, **facts):
    facts = {"chip_size": SIZE, "chip_bands": 3, "chip_dtype": "uint8"} | facts
    config = ClassifierConfig("example", "random", SIZE, (0, 1, 2), CLASSES, **facts)
    return Scorer("fake", config, logits_of, "digest", tmp_path / "predictions.parquet")


def make_values(height=100, width=150, seed=0):
    """Patches of 10 pixels, bright or dark, with noise."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(40, 200, (3, height // 10 + 1, width // 10 + 1))
    values = patches.repeat(10, axis=1).repeat(10, axis=2)[:, :height, :width]
    return (values + rng.integers(0, 30, values.shape)).astype(np.uint8)


@pytest.fixture
def scene(tmp_path):
    return write_scene(tmp_path / "scene.tif", make_values())


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(scenes, "BLOCK_CELLS", 12)


def no_picture(scene, bands, map_path, png):
    png.write_bytes(b"no picture")


def make_map(path, output, scorer=None, rule=None, draw=no_picture, **changes):
    output.parent.mkdir(exist_ok=True)
    config = PredictConfig.checked(
        model_path="m", input=str(path), output=str(output), batch_size=5, **changes
    )
    scorer = scorer or make_scorer(path.parent)
    return map_scene(scorer, rule or AnswerRule(), path, output, config, draw)[0]


def read(output):
    with rasterio.open(f"{output}.tif") as raster:
        planes = raster.read()
    return planes, gpd.read_parquet(f"{output}.parquet")


def contents(output):
    return {ending: output.with_name(output.name + ending).read_bytes() for ending in ENDINGS}


@pytest.mark.parametrize("stride", [14, 5])
def test_every_cell_is_answered_as_its_window_alone(tmp_path, scene, small_blocks, stride):
    record = make_map(scene, tmp_path / "map", stride=stride)
    planes, table = read(tmp_path / "map")
    grid = scenes.Grid(100, 150, SIZE, stride)
    assert planes.shape == (3, *grid.shape) and len(table) == np.prod(grid.shape)
    around = np.pad(make_values(), ((0, 0), (SIZE, SIZE), (SIZE, SIZE)), mode="reflect")
    for cell in table.itertuples():
        top = cell.row * stride - grid.lead + SIZE
        left = cell.col * stride - grid.lead + SIZE
        window = around[None, :, top : top + SIZE, left : left + SIZE]
        probabilities, classes, _ = AnswerRule()(brightness(window))
        said = CLASSES[classes[0]]
        assert (cell[3], cell.answer, cell.data_share) == (said, said, 1)
        np.testing.assert_allclose([cell.p_dark, cell.p_bright], probabilities[0], rtol=1e-5)
        stored = planes[:, cell.row, cell.col]
        assert stored[0] == classes[0]
        np.testing.assert_allclose(
            stored[1:] * PROBABILITY_STEP, probabilities[0], atol=PROBABILITY_STEP / 2 + 1e-6
        )
    assert record["counts"]["classes"] == {c: (table["class"] == c).sum() for c in CLASSES}
    assert min(record["counts"]["classes"].values()) > 10
    assert record["counts"]["no_data"] == 0


def test_files_are_valid_and_say_where(tmp_path, scene):
    record = make_map(scene, tmp_path / "map", draw=draw_map)
    assert np.ptp(plt.imread(tmp_path / "map.png")) > 0
    assert cog_validate(tmp_path / "map.tif", strict=True) == (True, [], [])
    written = json.loads((tmp_path / "map.json").read_text())
    assert written == json.loads(json.dumps(record))
    assert str(tmp_path) not in (tmp_path / "map.json").read_text()
    assert written["cells"] == {"rows": 8, "cols": 11, "window": SIZE, "stride": SIZE}
    assert written["model"] == {"file": "fake", "sha256": "digest"}
    assert not list(tmp_path.glob(".*"))


def test_a_vrt_gives_the_map_of_its_raster(tmp_path, scene):
    from rasterio.shutil import copy

    copy(scene, tmp_path / "scene.vrt", driver="VRT")
    make_map(scene, tmp_path / "a")
    make_map(tmp_path / "scene.vrt", tmp_path / "b")
    one, other = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert one[".tif"] == other[".tif"] and one[".parquet"] == other[".parquet"]


def test_cells_without_data_say_nothing(tmp_path):
    values = make_values().clip(1)
    values[:, :50, :60] = 0
    path = write_scene(tmp_path / "scene.tif", values, nodata=0)
    record = make_map(path, tmp_path / "map", min_data=0.9)
    planes, table = read(tmp_path / "map")
    empty = table["data_share"] < 0.9
    assert empty.sum() == record["counts"]["no_data"] == 4 * 5
    assert table.loc[empty, ["class", "answer", "p_dark"]].isna().all(axis=None)
    assert table.loc[~empty, ["class", "answer", "p_dark"]].notna().all(axis=None)
    assert (planes[:, :4, :5] == NODATA).all() and (planes == NODATA).sum() == 3 * 4 * 5


def test_blocks_do_not_change_an_answer(tmp_path, scene, monkeypatch):
    make_map(scene, tmp_path / "a", stride=7)
    for cells in (4, 30):
        monkeypatch.setattr(scenes, "BLOCK_CELLS", cells)
        make_map(scene, tmp_path / "b", stride=7, overwrite=True)
        assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("height, width", [(5, 9), (1, 1), (14, 30)])
def test_small_scenes(tmp_path, height, width):
    path = write_scene(tmp_path / "scene.tif", make_values(height, width))
    make_map(path, tmp_path / "map", draw=draw_map)
    _, table = read(tmp_path / "map")
    assert table.area.sum() == pytest.approx(height * width * 0.25)
    assert table["class"].notna().all()


def test_unsure_cells(tmp_path, scene):
    record = make_map(scene, tmp_path / "map", rule=AnswerRule(quantile=0.05), error_rate=0.05)
    planes, table = read(tmp_path / "map")
    assert planes.shape[0] == 4
    unsure = table["answer"] == "unsure"
    assert unsure.sum() == record["counts"]["unsure"] == planes[3].sum() > 0
    assert (table.loc[unsure, ["p_dark", "p_bright"]].max(axis=1) < 0.95).all()
    assert (table.loc[~unsure, "answer"] == table.loc[~unsure, "class"]).all()


def test_windows_are_resized_and_can_follow_the_ground(tmp_path, scene):
    shapes = []

    def logits_of(chips):
        shapes.append(chips.shape)
        return brightness(chips)

    def scorer(resolution):
        return make_scorer(tmp_path, logits_of, resolution=resolution)

    assert make_map(scene, tmp_path / "a", scorer(0.52))["cells"]["window"] == SIZE
    with pytest.raises(InputError, match=r"0\.5 m, .* 2 m, 4 times"):
        make_map(scene, tmp_path / "b", scorer(2.0))
    assert make_map(scene, tmp_path / "b", scorer(2.0), resample=True)["cells"]["window"] == 56
    assert make_map(scene, tmp_path / "c", scorer(2.0), window=20)["cells"]["window"] == 20
    assert {shape[1:] for shape in shapes} == {(3, SIZE, SIZE)}


def test_an_alpha_band_counts_only_where_it_did_in_training(tmp_path):
    values = np.concatenate([make_values(), np.full((1, 100, 150), 255, np.uint8)])
    path = write_scene(tmp_path / "scene.tif", values, photometric="RGB", alpha="yes")
    for bands in (3, 4):
        make_map(
            path, tmp_path / f"map{bands}", make_scorer(tmp_path, chip_bands=bands), draw=draw_map
        )


# ------------------------------------------------------------------- again, over others, and kills


def test_a_finished_map_is_read(tmp_path, scene):
    def never(*_):
        raise AssertionError("computed again")

    first = make_map(scene, tmp_path / "map")
    again = make_map(scene, tmp_path / "map", make_scorer(tmp_path, never), draw=never)
    assert again == json.loads(json.dumps(first))


@pytest.mark.parametrize("ending", [*ENDINGS, ".json"])
def test_other_files_are_kept(tmp_path, scene, ending):
    mine = tmp_path / f"map{ending}"
    mine.write_text("{}")
    with pytest.raises(InputError, match=f"map{ending} is there"):
        make_map(scene, tmp_path / "map")
    assert mine.read_text() == "{}"
    make_map(scene, tmp_path / "map", overwrite=True)
    assert mine.read_bytes() != b"{}"


@pytest.mark.parametrize("changes", [{"stride": 7}, {"min_data": 0.4}, {"rule": AnswerRule(2.0)}])
def test_a_map_of_other_parameters_is_kept(tmp_path, scene, changes):
    make_map(scene, tmp_path / "map")
    before = contents(tmp_path / "map")
    with pytest.raises(InputError, match="is there"):
        make_map(scene, tmp_path / "map", **changes)
    assert contents(tmp_path / "map") == before


def test_a_scene_without_data_loses_nothing(tmp_path, scene):
    make_map(scene, tmp_path / "map")
    before = contents(tmp_path / "map")
    empty = write_scene(tmp_path / "e" / "empty.tif", np.zeros((3, 30, 30), np.uint8), nodata=0)
    with pytest.raises(InputError, match="no cell has data on 50% of its ground"):
        make_map(empty, tmp_path / "map", overwrite=True)
    assert contents(tmp_path / "map") == before
    assert not list(tmp_path.glob(".*"))


def test_a_scene_cut_off_in_the_middle(tmp_path, small_blocks):
    path = write_scene(tmp_path / "scene.tif", make_values(400, 400))
    path.write_bytes(path.read_bytes()[:200_000])
    with pytest.raises(InputError, match=r"scene\.tif: damaged or cut off in rows \d+ to \d+"):
        make_map(path, tmp_path / "map")
    assert [p.name for p in tmp_path.iterdir()] == ["scene.tif"]


def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path, small_blocks):
    """SIGKILL at random moments, then the same call to its end.

    A fork of this process, so that no kill is spent on imports.
    """
    path = write_scene(tmp_path / "scene.tif", make_values(220, 220))
    calls = []

    def slow(chips):
        calls.append(len(chips))
        time.sleep(0.002)
        return brightness(chips)

    def run():
        make_map(path, tmp_path / "out" / "map", make_scorer(tmp_path, slow))

    start = time.perf_counter()
    run()
    seconds, windows = time.perf_counter() - start, sum(calls)
    expected = contents(tmp_path / "out" / "map")
    rng = np.random.default_rng(0)
    gone_on = 0
    for number in range(8):
        for file in (tmp_path / "out").iterdir():
            file.unlink()
        # Every third kill comes late, among the steps that publish.
        moment = rng.uniform(0.85, 1) if number % 3 == 0 else rng.uniform(0.1, 0.9)
        child = os.fork()
        if child == 0:
            run()
            os._exit(0)
        time.sleep(seconds * moment)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        calls.clear()
        run()
        gone_on += sum(calls) < windows
        assert contents(tmp_path / "out" / "map") == expected
        assert {p.name for p in (tmp_path / "out").iterdir()} == {
            f"map{ending}" for ending in (*ENDINGS, ".json")
        }
    assert gone_on >= 5, "most kills leave blocks that are not predicted again"


@pytest.mark.parametrize("step", ["write_map", "write_cells", "write_json"])
def test_killed_between_two_files(tmp_path, scene, monkeypatch, step):
    def killed(*_):
        raise KeyboardInterrupt

    make_map(scene, tmp_path / "expected", draw=draw_map)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"helpers.deployment.mapping.{step}", killed)
        make_map(scene, tmp_path / "map", draw=draw_map)
    predicted = make_map(scene, tmp_path / "map", draw=draw_map)["predicted_in_this_run"]
    assert predicted == 0
    assert contents(tmp_path / "map") == contents(tmp_path / "expected")


# ------------------------------------------------------------------------------------- the picture


def test_picture(tmp_path, scene):
    make_map(scene, tmp_path / "map", rule=AnswerRule(quantile=0.05), error_rate=0.05)
    figure = map_figure(scene, (0, 1, 2), tmp_path / "map.tif")
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert texts == ["10 m", "N"]  # a fifth of 75 m, rounded down
    legend = [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    assert [text.split(" (")[0] for text in legend] == ["dark", "bright", "unsure"]
    plt.close(figure)


@pytest.mark.parametrize("bands, dtype", [((0,), "uint16"), ((0, 1), "float32")])
def test_picture_of_few_bands_and_other_types(tmp_path, bands, dtype):
    values = (make_values(30, 400).astype(dtype) * 10)[: len(bands)]
    values[:, :5] = 0
    degrees = from_origin(8, 50, 1e-5, 1e-5)
    path = write_scene(tmp_path / "scene.tif", values, nodata=0, crs="EPSG:4326", transform=degrees)

    def logits_of(chips):
        return np.zeros((len(chips), 2), np.float32)

    config = ClassifierConfig(
        "example", "random", SIZE, bands, CLASSES, mean=(0.0,) * len(bands), std=(1.0,) * len(bands)
    )
    scorer = Scorer("fake", config, logits_of, "digest", tmp_path / "predictions.parquet")
    make_map(path, tmp_path / "map", scorer)
    texts = [t.get_text() for t in map_figure(path, bands, tmp_path / "map.tif").axes[0].texts]
    assert texts == ["50 m", "N"]  # 0.004 degrees at 50 degrees north are 287 m
    plt.close("all")


def test_table_opens_without_geopandas_too(tmp_path, scene):
    make_map(scene, tmp_path / "map")
    table = pd.read_parquet(tmp_path / "map.parquet", columns=["row", "col", "class"])
    assert len(table) == 88
