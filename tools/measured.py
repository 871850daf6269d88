"""Tables of what the scripts in `benchmarks/` measured, from their records."""

import json
import math
from statistics import median
from typing import Any

import pandas as pd

from helpers.records import ROOT
from helpers.reporting.service import http_answer, http_view
from helpers.reporting.tables import markdown


def training_speed_table() -> str:
    """Images per second of the training loops."""
    table = pd.read_csv(ROOT / "benchmark_results/training_speed.csv")
    lines = []
    for (backbone, size), rows in table.groupby(["backbone", "image_size_px"], sort=False):
        loops = rows.set_index(["loop", "precision", "compiled"])
        plain, fp32, compiled, bf16 = (
            loops.loc[key]
            for key in (
                ("plain", "fp32", False),
                ("project", "fp32", False),
                ("project", "fp32", True),
                ("project", "bf16", False),
            )
        )
        lines.append(
            (
                f"{backbone}, {size} px",
                f"{plain.images_per_second:.3g}",
                *(f"{r.images_per_second:.3g} ({r.ratio_to_plain:.2f}x)" for r in (fp32, compiled)),
                f"{compiled.start_s:.0f}",
                f"{bf16.images_per_second:.3g} ({bf16.ratio_to_plain:.2f}x)",
                f"{fp32.share_of_matmul_rate:.0%} of {fp32.matmul_gflop_per_second:.0f} GFLOP/s",
            )
        )
    header = (
        "backbone",
        "plain loop",
        "this project, fp32",
        "with `torch.compile`",
        "compiling, s",
        "bf16",
        "share of the measured matmul rate (fp32)",
    )
    return markdown(header, lines)


def time_to_quality_tables() -> dict[str, str]:
    """By part of the page: what each way to train costs, and the AUROC that it reaches."""
    whole = {
        "precision": "{precision}",
        "a run, s": "{total_s:.0f}",
        "of the plain loop's": "{total_s_to_plain:.2f}",
        "of the Trainer's": "{total_s_to_trainer:.2f}",
        "to the plain loop's quality, s": "{to_quality}",
        "peak MB": "{peak_megabytes:,.0f}",
        "test AUROC": "{auroc:.4f} [{auroc_low:.4f}, {auroc_high:.4f}]",
        "difference to the plain loop": "{difference:+.4f} [{difference_low:+.4f}, "
        "{difference_high:+.4f}]",
    }
    rate = {
        "images/s": "{images_per_s:.3g}",
        "of the plain loop's rate": "{images_per_s_to_plain:.2f}",
        "GFLOP an image": "{gflop_per_image:.3g}",
        "share of the matmul rate": "{share_of_matmul_rate:.0%}",
    }
    sweep = {"all runs, s": "{all_runs_s:.0f}", "of the plain loop's": "{all_runs_s_to_plain:.2f}"}
    shown = {
        "wind_turbines": whole | rate,
        "hurricane_harvey": whole | rate,
        "hurricane_harvey_places": {k: v for k, v in whole.items() if "Trainer" not in k},
        "sweep": {"precision": whole["precision"]} | sweep,
        "speed": {"precision": whole["precision"]} | rate,
    }
    tables = {}
    for name, columns in shown.items():
        lines = []
        for case, found in _record(f"time_to_quality_{name}")["cases"].items():
            for way, row in found["ways"].items():
                row["peak_megabytes"] = row["peak_memory_bytes"] / 1e6
                seconds = row.get("to_quality_s")  # none where most runs did not reach it
                row["to_quality"] = f"{seconds:.0f}" if seconds else "not reached"
                cells = (text.format(**row) for text in columns.values())
                lines.append((f"{case}, `{way}`", *cells))
        tables[f"time_{name}"] = markdown(("backbone, way", *columns), lines)
    return tables


def _short(value) -> str:
    """A cell of three digits; nothing for none."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3g}"
    return value


def _record(name: str) -> Any:
    return json.loads((ROOT / f"benchmark_results/{name}.json").read_text())


def http_part() -> str:
    """The service over HTTP beside the model in process, with a killed replica, and at length."""
    lines, said = [], []
    for ending in ("", "_2_replicas", "_2_replicas_ray"):
        found = _record(f"http_openvino_int8{ending}")["http"]
        table = pd.DataFrame(found["table"])
        view = http_view(table)
        lines += view.map(_short).to_numpy().tolist()
        said.append(f"- {http_answer(table)}")
        if killed := found.get("killed_replica"):  # not on Ray
            said.append(
                f"- One of two replicas killed at {killed['offered_per_s']:.0f} requests/s: "
                f"{killed['lost']} of {killed['requests']:,} requests without an answer, "
                f"{killed['refused']} refused; a new replica was ready after "
                f"{killed['recovered_s']:.1f} s. p50 {killed['p50_ms']:.1f}, p99 "
                f"{killed['p99_ms']:.0f} ms."
            )
    soak = _record("soak_http_openvino_int8")["soak"]
    said.append(
        f"- {soak['minutes']:g} minutes at {soak['offered_per_s']:.0f} requests/s, 80 % of "
        f"capacity, one replica: {soak['queries']:,} requests, {soak['errors']} errors, "
        f"{soak['refused']} refused, p50 {soak['p50_ms']:.1f}, p99 {soak['p99_ms']:.0f} ms; "
        f"memory {soak['mib_after_one_minute']:.0f} MiB after the first minute, "
        f"{soak['mib_at_the_end']:.0f} at the end."
    )
    return "\n".join([markdown(tuple(view.columns), lines), "", *said])


def scene_memory_table() -> str:
    """The memory of a map by the size of its scene."""
    lines = [
        (
            f"{row['side']:,} x {row['side']:,}",
            f"{row['scene_mib']:,.0f}",
            f"{row['windows']:,}",
            f"{row['seconds']:.0f}",
            f"{row['peak_mib']:.0f}",
            f"{row['above_smallest_mib']:+.0f}",
        )
        for row in _record("scene_memory")
    ]
    header = ("pixels", "file, MiB", "windows with data", "s", "peak MiB", "above the smallest")
    return markdown(header, lines)


def ray_table() -> str:
    """What Ray costs on one machine."""
    record, lines = _record("ray_cost"), []
    for job, found in (("a map", record["map"]), ("LoRA, four seeds", record["train"])):
        seconds = (f"{median(found[way]['seconds']):.1f}" for way in ("local", "control", "ray"))
        lines.append((job, *seconds, *(f"{found[w]['of_local']:.2f}" for w in ("control", "ray"))))
    header = ("job", "local, s", "again, s", "Ray, s", "again, of local", "Ray, of local")
    return markdown(header, lines)
