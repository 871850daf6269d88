"""What chips share: a file, a group, a look or the ground; of splits that share it, the leaks."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd
import shapely
from PIL import Image
from rasterio.warp import transform
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from helpers.data.splits import SPLITS

THUMBNAIL = 32  # pixels
HASH_SIDE = 16  # lowest frequencies in each direction: 256 bits

# Bits of 256 in which the hashes of copies may differ. Measured on all 60.3 million pairs of chips
# inside four data sets (Hurricane Harvey 10,574 chips, RSSCN7 2,800, Iowa turbines 963, EuroSAT
# RGB 253): 10 pairs are that near, all of one place within 1.1 m, so no false alarm (nor up to 28
# bits: 27 pairs, all of one place); by the rule of three under 5 in 100 million pairs. Of copies
# saved again as JPEG of quality 90 it finds 1.00, 1.00, 1.00 and 0.87 (of quality 50: 1.00, 0.98,
# 0.85, 0.71), of copies at 3/4 of the size 1.00, 1.00, 1.00, 0.96; what it misses is open water
# and other chips with hardly any texture. Copies that were turned or mirrored are not looked for.
SAME_LOOK = 20
GROUPS = "are of the same group as"
COPIES = "look like re-encoded copies of"
_PAIRS = 2**17  # hashes that a thread compares at once: 1.2 MB, however many chips there are
TOUCHING = 0.01  # share of a chip's side by which neighbours may overlap: rounded coordinates

_COSINES = np.cos(
    np.pi * (np.arange(THUMBNAIL) + 0.5) * np.arange(HASH_SIDE)[:, None] / THUMBNAIL
).astype(np.float32)


@dataclass(frozen=True)
class Relation:
    """One way in which chips can be the same: chips of one unit are, and units joined by an edge.

    `units` is the number of each chip's unit, (chips,); `edges` pairs of units, (edges, 2).
    """

    units: np.ndarray
    edges: np.ndarray


def thumbnail(chip: np.ndarray) -> np.ndarray:
    """The mean of the bands of a chip (bands, height, width), float32 (THUMBNAIL, THUMBNAIL)."""
    grey = Image.fromarray(chip.mean(axis=0, dtype=np.float32))
    return np.asarray(grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR))


def looks(thumbnails: Sequence[np.ndarray]) -> list[bytes]:
    """Perceptual hash of each thumbnail, 32 bytes; b"" for one without any texture.

    As `imagehash.phash(…, hash_size=16)`: signs of the lowest frequencies of a cosine transform
    about their median, so that brightness, contrast, size and compression hardly change it. Many
    chips are hashed at once because imagehash's one at a time takes as long as decoding them.
    """
    if not thumbnails:
        return []
    grey = np.stack(thumbnails)
    waves = (_COSINES @ grey @ _COSINES.T).reshape(len(grey), -1)
    bits = np.packbits(waves > np.median(waves, axis=1, keepdims=True), axis=1)
    textured = np.ptp(grey, axis=(1, 2)) > 1e-6 * np.abs(grey).max(axis=(1, 2))
    return [row.tobytes() if shown else b"" for row, shown in zip(bits, textured, strict=True)]


def relations(manifest: pd.DataFrame) -> dict[str, Relation]:
    """What makes chips inseparable, by the words that say so.

    Needs the columns sha256, group, look (of `looks`), crs and corners (x and y of the four, None
    where a chip has no coordinates).
    """
    return {
        "are byte-identical to": _equal(manifest["sha256"]),
        GROUPS: _equal(manifest["group"]),
        COPIES: _alike(manifest["look"]),
        "show ground that is also in": _overlapping(manifest["corners"], manifest["crs"]),
    }


def _equal(values: pd.Series) -> Relation:
    """Chips with the same value are one unit; a chip with none, or an empty one, stands alone."""
    units = pd.factorize(values)[0]
    alone = ~values.astype(bool).to_numpy()
    units[alone] = len(values) + np.arange(alone.sum())
    return Relation(np.unique(units, return_inverse=True)[1], np.empty((0, 2), int))


def _alike(values: pd.Series) -> Relation:
    """Edges between looks that differ in at most SAME_LOOK bits."""
    relation = _equal(values)
    chips = np.flatnonzero(values.astype(bool) & ~pd.Series(relation.units).duplicated())
    if not len(chips):
        return relation
    hashes = np.frombuffer(b"".join(values.iloc[chips]), np.uint64).reshape(len(chips), -1)
    first = np.ascontiguousarray(hashes[:, 0])

    rows = max(1, _PAIRS // len(chips))

    def pairs(start: int) -> np.ndarray:
        block = first[start : start + rows, None]
        # The first word of the four rules out nearly all pairs.
        i, j = np.nonzero(np.bitwise_count(block ^ first[start:]) <= SAME_LOOK)
        i, j = i[i < j] + start, j[i < j] + start
        same = np.bitwise_count(hashes[i] ^ hashes[j]).sum(axis=1) <= SAME_LOOK
        return np.stack([i[same], j[same]], axis=1)

    with ThreadPoolExecutor() as pool:  # NumPy's loops release the GIL
        edges = np.concatenate(list(pool.map(pairs, range(0, len(chips), rows))))
    return Relation(relation.units, relation.units[chips][edges])


def _overlapping(corners: pd.Series, crs: pd.Series) -> Relation:
    """Edges between chips whose ground overlaps; neighbours that share a border do not."""
    relation = _equal(corners)
    chips = np.flatnonzero(corners.notna() & ~pd.Series(relation.units).duplicated())
    if not len(chips):
        return relation
    ground = np.array(corners.iloc[chips].tolist()).reshape(-1, 4, 2)
    names = crs.iloc[chips].to_numpy()
    if len(set(names)) > 1:
        for name in set(names):
            x, y = transform(name, "EPSG:4326", *ground[names == name].reshape(-1, 2).T)
            ground[names == name] = np.stack([x, y], axis=1).reshape(-1, 4, 2)
    middle = ground.mean(axis=1, keepdims=True)
    tree = shapely.STRtree(shapely.polygons(middle + (1 - TOUCHING) * (ground - middle)))
    edges = tree.query(tree.geometries, predicate="intersects").T
    return Relation(relation.units, relation.units[chips][edges[edges[:, 0] < edges[:, 1]]])


def inseparable(relations: Iterable[Relation]) -> np.ndarray:
    """Number the sets of chips that must share a split, (chips,)."""
    rows, columns, n = [], [], 0
    for relation in relations:  # nodes of the graph: all chips, then the units of each relation
        chips = len(relation.units)
        n = n or chips
        rows += [np.arange(chips), relation.edges[:, 0] + n]
        columns += [relation.units + n, relation.edges[:, 1] + n]
        n += relation.units.max() + 1
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(n, n))
    return connected_components(graph, directed=False)[1][:chips]


def find_leaks(manifest: pd.DataFrame, relations: dict[str, Relation]) -> list[str]:
    """Say in words what two splits share, one sentence a relation; empty for nothing."""
    split = manifest["split"].map({name: 1 << i for i, name in enumerate(SPLITS)}).to_numpy()
    told, found = np.zeros(len(manifest), bool), []
    for words, relation in relations.items():
        own = np.zeros(relation.units.max() + 1, int)
        np.bitwise_or.at(own, relation.units, split)
        reached = own.copy()
        for one, other in (relation.edges.T, relation.edges.T[::-1]):
            np.bitwise_or.at(reached, one, own[other])
        leaking = (reached[relation.units] & ~split) != 0
        if words == COPIES:  # byte-identical ones have been told of
            leaking &= ~told
        told |= leaking
        if leaking.any():
            chip = int(leaking.argmax())
            unit = relation.units[chip]
            touching = relation.edges[(relation.edges == unit).any(axis=1)]
            others = np.isin(relation.units, [unit, *touching.ravel()]) & (split != split[chip])
            pair = manifest.iloc[[chip, int(others.argmax())]]
            example = " and ".join(f"{row.img_path} ({row.split})" for row in pair.itertuples())
            if words == GROUPS:
                example += f", both {pair['group'].iloc[0]}"
            found.append(f"{leaking.sum()} chips {words} a chip of another split, e.g. {example}")
    return found
