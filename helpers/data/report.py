"""What is in a data set, and what is wrong with it, in plain text."""

import pandas as pd

from helpers.data.dataset import ChipData
from helpers.data.manifest import class_counts


def data_report(data: ChipData) -> str:
    """Describe the data in plain text: counts, sizes, bands, values, skipped, repeated, leakage."""
    manifest = data.manifest
    counts = class_counts(manifest, data.classes)
    counts = pd.concat([counts, counts.sum().to_frame("all").T])
    counts["all"] = counts.sum(axis=1)
    sizes = (manifest["width"].astype(str) + "x" + manifest["height"].astype(str)).value_counts()
    shown = ", ".join(f"{size} ({n})" for size, n in sizes.head(5).items())
    bands = ", ".join(map(str, data.bands))
    types = ", ".join(f"{kind} ({n})" for kind, n in manifest["dtype"].value_counts().items())
    copies = manifest["sha256"].duplicated(keep=False).sum()
    two_labels = (manifest.groupby("sha256")["label"].nunique() > 1).sum()
    groups = manifest.loc[manifest["group"] != "", "group"].nunique()
    oblong = (manifest["width"] != manifest["height"]).sum()
    gaps = (manifest["nodata"] > 0).sum()
    scales = manifest[manifest["crs"] != ""].groupby("crs")["resolution"].agg(["min", "max"])
    ground = [f"{low:.4g} to {high:.4g} ({crs})" for crs, low, high in scales.itertuples()]
    facts = {
        "data": f"{data.root.resolve().name} ({data.layout})",
        "classes": ", ".join(data.classes)
        + (f" (positive: {data.classes[1]})" if len(data.classes) == 2 else ""),
        "size (px)": shown + (f" and {len(sizes) - 5} more sizes" if len(sizes) > 5 else ""),
        "not square": f"{oblong} chips, squashed to a square" if oblong else "",
        "bands": f"{manifest['n_bands'].iloc[0]} in a file, in use: {bands}",
        "data type": types,
        "values": f"{manifest['min'].min():g} to {manifest['max'].max():g}",
        "nodata": f"{gaps} chips, {manifest['nodata'].mean():.2%} of all values; each is filled "
        "with the mean of its chip and band"
        if gaps
        else "",
        "resolution": "; ".join(ground) and f"{'; '.join(ground)}, ground units a pixel",
        "unreadable": f"{len(data.skipped)} skipped" if len(data.skipped) else "none",
        "identical": f"{copies} images have a byte-identical twin, {two_labels} under two labels",
        "groups": groups or "none given",
        "leakage": "WARNING: " + "; ".join(data.leaks)
        if data.leaks
        else "none: no image, copy, group or ground in two splits",
    }
    lines = [f"{name:<12}{value}" for name, value in facts.items() if value]
    lines += [f"  {row.img_path}: {row.reason}" for row in data.skipped.head(10).itertuples()]
    if len(data.skipped) > 10:
        lines.append(f"  and {len(data.skipped) - 10} more")
    return "\n".join([*lines[:2], "", counts.to_string(), "", *lines[2:]])


def data_warnings(data: ChipData) -> list[str]:
    """What a person must know of the data before training on them, one line each."""
    lines = [f"WARNING: leakage: {leak}" for leak in data.leaks]
    if len(data.skipped):
        first = data.skipped.iloc[0]
        lines.append(
            f"WARNING: {len(data.skipped)} unreadable files skipped, e.g. {first.img_path}: "
            f"{first.reason}"
        )
    n_bands = data.manifest["n_bands"].iloc[0]
    if len(data.bands) < n_bands:
        bands = ", ".join(map(str, data.bands))
        lines.append(f"bands: {bands} of the {n_bands} in a file are in use")
    return lines
