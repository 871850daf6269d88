"""Put the chips of a published data set where its manifest says, from the original images.

    python -m tools.rebuild wind_turbines --source wind-turbine-detector

Every chip is compared with the published one by its digest before it is written, so that what lies
there afterwards is the published set. Sources and licences: `evidence/*.yaml` and docs/data.md.
"""

import argparse
import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
from PIL import Image

from helpers import InputError
from helpers.console import run_command
from helpers.records import ROOT, written_whole

MANIFESTS = ROOT / "evidence" / "manifests"
DIGITS = 16  # of a chip's SHA-256 that a manifest keeps


def read_manifest(name: str) -> pd.DataFrame:
    """The committed manifest of a set, all columns as text; `digest` is that of the chip's file."""
    (file,) = MANIFESTS.glob(f"{name}.csv*")
    return pd.read_csv(file, dtype=str, keep_default_na=False)


def digest(chip: bytes) -> str:
    """The first digits of a file's SHA-256."""
    return hashlib.sha256(chip).hexdigest()[:DIGITS]


def copied(source: Path, manifest: pd.DataFrame) -> Iterator[bytes]:
    """Files of the source as they are, found by their digest: names occur in several folders."""
    found = {digest(file.read_bytes()): file for file in sorted(source.rglob("*.jp*g"))}
    for wanted in manifest.digest:
        yield found[wanted].read_bytes() if wanted in found else b""


def cut(source: Path, manifest: pd.DataFrame) -> Iterator[bytes]:
    """Windows of 128 pixels of the source's images, their upper left corners from the manifest."""
    for row in manifest.itertuples():
        left, top = int(row.x), int(row.y)
        with Image.open(source / row.source_image) as image:
            chip = image.convert("RGB").crop((left, top, left + 128, top + 128))
        yield _jpeg(chip, quality=95, subsampling=0)


def halved(source: Path, manifest: pd.DataFrame) -> Iterator[bytes]:
    """The source's images, each two by two pixels averaged; its folders are aGrass, bField, ..."""
    folders = {folder.name[1:]: folder for folder in source.iterdir() if folder.is_dir()}
    for path in map(Path, manifest.img_path):
        with Image.open(folders.get(path.parts[0], source) / path.name) as image:
            yield _jpeg(image.convert("RGB").reduce(2), quality=92)


def _jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


RECIPES: dict[str, Callable[[Path, pd.DataFrame], Iterator[bytes]]] = {
    "hurricane_harvey": copied,
    "rsscn7": halved,
    "wind_turbines": cut,
}


def rebuild(name: str, source: Path, output: Path) -> int:
    """Write the chips and manifest.csv of a set into a folder; return the number of chips.

    Raises:
        InputError: an image is missing or a chip is another than the published one. Chips that are
            right have been written, the others and the manifest have not.
    """
    manifest, wrong = read_manifest(name), []
    try:
        for row, chip in zip(manifest.itertuples(), RECIPES[name](source, manifest), strict=True):
            if digest(chip) != row.digest:
                wrong.append(row.img_path)
                continue
            with written_whole(output / row.img_path) as part:
                part.write_bytes(chip)
    except OSError as error:
        raise InputError(f"--source {source}: {error}; see docs/data.md") from error
    if wrong:
        raise InputError(
            f"--source {source}: {len(wrong)} of {len(manifest)} chips cannot be made of it as "
            f"they were published, e.g. {wrong[0]}; check the version of the source, and that "
            "Pillow is that of requirements.txt"
        )
    with written_whole(output / "manifest.csv") as part:
        manifest.drop(columns="digest").to_csv(part, index=False)
    return len(manifest)


def main() -> None:
    """Rebuild one set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--source", type=Path, required=True, help="folder of the original images")
    parser.add_argument("--output", type=Path, help="data/<name> by default")
    given = parser.parse_args()
    output = given.output or Path("data") / given.name
    print(f"{rebuild(given.name, given.source, output)} chips in {output}, all as published")


if __name__ == "__main__":
    run_command(main)
