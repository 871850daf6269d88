"""Chips of six bands from RGB chips, for `evidence/more_bands*.yaml`: `python -m tools.more_bands`.

Band 0 is the luminance, about what a panchromatic sensor gives; bands 1 and 2 are the colour
differences Cb and Cr, which no three grey bands hold; bands 3 to 5 are the RGB they were made of.
It simulates a sensor with more bands than three, with two limits: the extra bands are visible
colour and not another part of the spectrum, and they have no noise of their own and lie exactly on
the others, being made of the same pixels.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from helpers.console import progress_bar, run_command
from helpers.data.chips import read_chip
from helpers.data.manifest import find_chips
from helpers.records import written_whole


def six_bands(chip: np.ndarray) -> np.ndarray:
    """Y, Cb, Cr (ITU-R BT.601, full range, as in JPEG), R, G, B of a chip (3, H, W), all uint8."""
    rgb = chip.transpose(1, 2, 0)
    colours = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    return np.concatenate([colours, rgb], axis=2).transpose(2, 0, 1)


def main() -> None:
    """Write the chips as .npy files of the same names, then a manifest with the same columns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="data/wind_turbines", help="a set of RGB chips")
    parser.add_argument("--output", type=Path, default=Path("data/more_bands"))
    arguments = parser.parse_args()
    root, entries, _ = find_chips(arguments.source, "group")
    paths = entries.img_path.map(lambda path: Path(path).with_suffix(".npy").as_posix())
    for source, path in progress_bar(list(zip(entries.img_path, paths, strict=True)), unit="chip"):
        with written_whole(arguments.output / path) as part:
            np.save(part, six_bands(read_chip(root / source, (0, 1, 2))))
    with written_whole(arguments.output / "manifest.csv") as part:
        entries.assign(img_path=paths).to_csv(part, index=False)
    print(f"wrote {len(paths)} chips of six bands to {arguments.output}")


if __name__ == "__main__":
    run_command(main)
