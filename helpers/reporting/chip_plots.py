"""Figures that show chips themselves."""

import itertools
import textwrap

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from helpers.data.dataset import ChipDataset
from helpers.reporting.plots import PAGE

_FAINT = 0.05  # drop of a probability below which no place is fully lit


def as_rgb(chip: np.ndarray) -> np.ndarray:
    """A chip (bands, H, W) as (H, W, 3) in 0..1: its first three bands, or the first as grey.

    Values that are not 8-bit are stretched from their 2nd to their 98th percentile.
    """
    bands = chip[:3] if len(chip) >= 3 else chip[:1].repeat(3, axis=0)
    image = np.moveaxis(bands, 0, 2).astype(np.float32)
    if chip.dtype == np.uint8:
        return image / 255
    low, high = np.percentile(image, [2, 98])
    return np.clip((image - low) / max(high - low, 1e-9), 0, 1)


def chip_rows(
    rows: dict[str, list[np.ndarray]], titles: dict[str, list[str]] | None = None
) -> Figure:
    """Rows of images under a name each, at least 120 pixels wide where there are six or fewer.

    Args:
        rows: (bands, H, W) chips or (H, W, 3) colours by name of the row.
        titles: of the images of a row, by its name.
    """
    columns = max(len(images) for images in rows.values())
    lines = [max([t.count("\n") + 1 for t in (titles or {}).get(name, [])] or [0]) for name in rows]
    heights = [PAGE / columns + 0.17 * n for n in lines]
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(PAGE, sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
        dpi=92,
    )
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        named = itertools.zip_longest(images, (titles or {}).get(name, []), fillvalue="")
        for axis, (image, title) in zip(line, named, strict=False):
            axis.imshow(image if image.shape[-1] == 3 else as_rgb(image))
            axis.set_title(title, fontsize=9)
        line[0].set_ylabel(textwrap.fill(name, 20), fontsize=9)
    return figure


def answers(
    test_set: ChipDataset, sample: pd.DataFrame, errors: pd.DataFrame, maps: list[np.ndarray]
) -> Figure:
    """A sample of the answers, the most confident errors, and what these rest on.

    Args:
        test_set: the chips.
        sample: of `inspection.sample_answers`, its index numbers the chips.
        errors: of `inspection.confident_errors`, likewise.
        maps: of `inspection.occlusion_map`, of the errors. A chip is lit where covering it lowers
            the probability of the answer, fully where it does so most (by _FAINT or more).
    """
    rows, titles = {}, {}
    for name, table in {"a sample": sample, "most confident errors": errors}.items():
        rows[name] = [test_set[number][0].numpy() for number in table.index]
        titles[name] = [
            f"is {row.label}\nsays {row.predicted_label} {row.confidence:.2f}"
            for row in table.itertuples()
        ]
    lit = [_lit(chip, drops) for chip, drops in zip(rows[name], maps, strict=True)]
    rows["what these answers rest on"] = lit
    titles["what these answers rest on"] = [
        f"falls by up to {max(0, drops.max()):.2f}" for drops in maps
    ]
    return chip_rows({name: images for name, images in rows.items() if images}, titles)


def _lit(chip: np.ndarray, drops: np.ndarray) -> np.ndarray:
    """A chip (bands, S, S) as (S, S, 3), dark where `drops` (n, n) are zero or less."""
    side = -(-chip.shape[-1] // len(drops))
    light = (drops / max(drops.max(), _FAINT)).clip(0, 1).repeat(side, axis=0).repeat(side, axis=1)
    return as_rgb(chip) * (0.2 + 0.8 * light[: chip.shape[-2], : chip.shape[-1], None])
