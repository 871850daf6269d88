"""Figures that show chips themselves."""

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from helpers.reporting.plots import PAGE


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


def chip_rows(rows: dict[str, list[np.ndarray]], titles: list[str] | None = None) -> Figure:
    """Rows of images under a name each; images are (bands, H, W) chips or (H, W, 3) colours."""
    columns = max(len(images) for images in rows.values())
    lines = 1 + max((title.count("\n") + 1 for title in titles or []), default=0)
    height = PAGE / columns + 0.17 * lines
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(PAGE, height * len(rows)),
        squeeze=False,
        layout="constrained",
        dpi=70,  # photographs make large files
    )
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image if image.shape[-1] == 3 else as_rgb(image))
        line[0].set_title(name, loc="left", fontsize=10)
    for axis, title in zip(axes.flat, titles or [], strict=False):
        axis.set_title(title, fontsize=8)
    return figure
