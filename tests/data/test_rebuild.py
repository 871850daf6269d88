"""A published set is rebuilt from its source, or it is said which chip cannot be."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers import InputError
from tools import rebuild


def image(size, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    )


def encoded(picture, **options):
    file = io.BytesIO()
    picture.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Publishes a manifest of chips (img_path -> file, further columns)."""
    monkeypatch.setattr(rebuild, "MANIFESTS", tmp_path)

    def publish(name, chips, **columns):
        digests = [rebuild.digest(chip) for chip in chips.values()]
        table = pd.DataFrame({"img_path": list(chips), **columns, "digest": digests})
        table.to_csv(tmp_path / f"{name}.csv", index=False)

    return publish


def test_chips_are_found_wherever_they_lie(published, tmp_path):
    chips = {f"damage/{n}.jpeg": encoded(image(8, n)) for n in range(3)}
    published("hurricane_harvey", chips, longitude=["-95.10", "-95.2", "-95.3"])
    for number, chip in enumerate(chips.values()):
        file = tmp_path / "source" / f"split{number}" / "other.jpeg"
        file.parent.mkdir(parents=True)
        file.write_bytes(chip)
    output = tmp_path / "made"
    assert rebuild.rebuild("hurricane_harvey", tmp_path / "source", output) == 3
    assert {p: (output / p).read_bytes() for p in chips} == chips
    lines = (output / "manifest.csv").read_text().splitlines()
    assert lines[:2] == ["img_path,longitude", "damage/0.jpeg,-95.10"]  # as text, to the digit


def test_chips_are_cut_and_halved(published, tmp_path):
    source = tmp_path / "source"
    (source / "aGrass").mkdir(parents=True)
    image(300).save(source / "scene.png")
    image(400).save(source / "aGrass" / "a001.png")
    window = image(300).crop((20, 7, 148, 135))
    cut = {"turbine/1.jpg": encoded(window, quality=95, subsampling=0)}
    published("wind_turbines", cut, source_image="scene.png", x=20, y=7)
    halved = {"Grass/a001.png": encoded(image(400).reduce(2), quality=92)}
    published("rsscn7", halved)
    for name in ("wind_turbines", "rsscn7"):
        assert rebuild.rebuild(name, source, tmp_path / name) == 1


def test_a_chip_that_differs_is_named_and_not_written(published, tmp_path):
    published("hurricane_harvey", {"damage/0.jpeg": encoded(image(8))})
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "0.jpeg").write_bytes(encoded(image(8, 1)))
    with pytest.raises(InputError, match=r"1 of 1 chips .* damage/0.jpeg"):
        rebuild.rebuild("hurricane_harvey", tmp_path / "source", tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_missing_image_is_one_line(published, tmp_path):
    published("wind_turbines", {"turbine/1.jpg": b""}, source_image="scene.png", x=0, y=0)
    with pytest.raises(InputError, match=r"--source .*scene.png.*docs/data.md"):
        rebuild.rebuild("wind_turbines", tmp_path, tmp_path / "made")


@pytest.mark.parametrize("name", rebuild.RECIPES)
def test_a_committed_manifest_names_every_chip_once(name):
    table = rebuild.read_manifest(name)
    assert table.img_path.is_unique and table.digest.is_unique
    assert table.digest.str.fullmatch(rf"[0-9a-f]{{{rebuild.DIGITS}}}").all()
    assert set(table.split) == {"train", "test", "val" if "val" in set(table.split) else "valid"}
