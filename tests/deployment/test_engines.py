"""A map by the workers of a Ray cluster is the one that this process makes."""

import ast
import os
import signal
from functools import partial
from types import SimpleNamespace

import psutil
import pytest

from helpers.cluster import workers_of
from helpers.data import scenes
from helpers.data.cells import BlockFiles
from helpers.deployment.mapping import map_scene
from helpers.deployment.scoring import PredictConfig, answer_rule, open_model
from helpers.records import ROOT
from tests.fake_data import make_chip, write_scene
from tests.faults.rows_predict import model


def no_picture(scene, bands, map_path, png):
    png.write_bytes(b"no picture")


def config_for(folder, name="map", **parameters):
    values = {"model_path": "model.safetensors", "input": "scene.tif", "output": name}
    values = {key: str(folder / value) for key, value in values.items()}
    return PredictConfig.checked(**values | {"threads": 1, "device": "cpu"} | parameters)


def make_map(folder, name, **parameters):
    config = config_for(folder, name, **parameters)
    scorer = open_model(config.model_path, 1, "cpu")
    rule = answer_rule(scorer, config)
    record, files = map_scene(scorer, rule, folder / "scene.tif", folder / name, config, no_picture)
    return record, {file.suffix: file.read_bytes() for file in files[:3]}


def kill_a_busy_worker():
    """SIGKILL to a process of this one's Ray that has a block in hand; whether there was one."""
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::_predict_block"):
            os.kill(process.pid, signal.SIGKILL)
            return True
    return False


def test_twoworkers_of_one_killed_on_the_way_give_the_same_bytes(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="requirements-ray.txt is not installed")
    monkeypatch.setattr(ray, "init", partial(ray.init, num_cpus=2))
    monkeypatch.chdir(ROOT)  # workers import the project from where this process does
    monkeypatch.setattr(scenes, "BLOCK_CELLS", 128)
    model(tmp_path)
    write_scene(tmp_path / "scene.tif", make_chip(size=900))
    local, expected = make_map(tmp_path, "local")
    killed, save = [], BlockFiles.save

    def save_and_kill(store, block, values):
        save(store, block, values)
        if not any(killed):
            killed.append(kill_a_busy_worker())

    monkeypatch.setattr(BlockFiles, "save", save_and_kill)
    try:
        record, found = make_map(tmp_path, "ray", engine="ray")
    except ConnectionError as error:  # github.com/ray-project/ray/issues/65983
        if "cannot be started here" not in str(error):
            raise
        pytest.skip(f"Ray gives its helpers 15 s, and this machine is too busy: {error}")
    assert any(killed)
    assert found == expected
    assert record["counts"] == local["counts"]
    assert record["predicted_in_this_run"] == local["predicted_in_this_run"] == 33 * 33
    assert (local["config"]["engine"], record["config"]["engine"]) == ("local", "ray")


def test_blocks_of_one_engine_serve_the_other(tmp_path, monkeypatch):
    """Killed when all is predicted, a map ends with Ray, which is not even started for that."""

    def killed(*_):
        raise KeyboardInterrupt

    model(tmp_path)
    write_scene(tmp_path / "scene.tif", make_chip(size=90))
    _, expected = make_map(tmp_path, "expected")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("helpers.deployment.mapping.write_map", killed)
        make_map(tmp_path, "map")
    monkeypatch.setattr("helpers.cluster.find_spec", lambda name: name)
    record, found = make_map(tmp_path, "map", engine="ray")
    assert record["predicted_in_this_run"] == 0 and found == expected


@pytest.mark.parametrize(
    "nodes, threads, device, expected",
    [
        ([{"CPU": 2}], 1, "cpu", (0, 2)),
        ([{"CPU": 8}, {"CPU": 3}], 4, "cpu", (0, 2)),
        ([{"CPU": 8}, {"CPU": 8, "GPU": 2}], 1, "auto", (1, 2)),
        ([{"CPU": 8, "GPU": 2}], 8, "cpu", (0, 1)),
        ([{"CPU": 2}], 4, "cpu", "no machine of the cluster has 4 cores"),
        ([{"CPU": 2}], 1, "cuda", "the cluster has no GPU"),
    ],
)
def test_how_many_workers_a_cluster_has_room_for(nodes, threads, device, expected):
    listed = [{"Alive": True, "Resources": node} for node in nodes]
    listed.append({"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}})
    ray = SimpleNamespace(nodes=lambda: listed)
    if isinstance(expected, str):
        with pytest.raises(OSError, match=expected):
            workers_of(ray, threads, device)
    else:
        assert workers_of(ray, threads, device) == expected


def test_no_module_imports_ray_before_it_is_asked_for():
    for path in (ROOT / "helpers").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "ray"], path
