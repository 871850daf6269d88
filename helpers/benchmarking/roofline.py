"""What every variant reaches of the machine's limits."""

from collections.abc import Sequence

import pandas as pd

from helpers.benchmarking.bench import Bench
from helpers.benchmarking.limits import flops_per_image
from helpers.deployment.runtimes import Variant
from helpers.deployment.variants.source import Removal


def roofline(
    bench: Bench, variants: Sequence[Variant], latency: pd.DataFrame, limits: dict
) -> pd.DataFrame:
    """Each variant against the lower of the two limits, at every batch size.

    Bytes per image are the least that must move: the weights once a batch, and the chip.
    Activations come on top as far as they leave the caches, so the achieved bandwidth is a lower
    bound. The compute limit is the measured matrix rate of the variant's precision (fp16: bf16's).

    Returns:
        `variant, batch_size, precision, flops_per_image, bytes_per_image, intensity` (FLOP/byte),
        `flops_per_s, bytes_per_s, limit_flops_per_s, share_of_limit`.
    """
    flops = {v.name: _flops(bench, v) for v in variants}
    by_name = {v.name: v for v in variants}
    chip_bytes = bench.chips[0].nbytes
    rows = []
    for row in latency.itertuples():
        variant = by_name[row.variant]
        moved = variant.bytes_on_disk / row.batch_size + chip_bytes
        intensity = flops[row.variant] / moved
        compute = limits["bf16" if variant.precision == "fp16" else variant.precision]
        limit = min(compute, intensity * limits["bytes_per_s"])
        achieved = flops[row.variant] * row.images_per_s
        rows.append(
            {
                "variant": row.variant,
                "batch_size": row.batch_size,
                "precision": variant.precision,
                "flops_per_image": flops[row.variant],
                "bytes_per_image": moved,
                "intensity": intensity,
                "flops_per_s": achieved,
                "bytes_per_s": moved * row.images_per_s,
                "limit_flops_per_s": limit,
                "share_of_limit": achieved / limit,
            }
        )
    return pd.DataFrame(rows)


def _flops(bench: Bench, variant: Variant) -> int:
    percent = variant.options.get("removed_percent")
    narrowed = percent and bench.source.structured(Removal(percent))
    return flops_per_image(narrowed or bench.source.classifier)
