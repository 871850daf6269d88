"""Tables and sentences on the evidence of several tasks, from their records alone."""

from types import SimpleNamespace
from typing import Any

import pandas as pd

from helpers.evaluation.baselines import strongest_baseline
from helpers.evaluation.evidence_records import Evidence
from helpers.evaluation.seeds import draws_of, method_gains, method_means
from helpers.evaluation.task import REFERENCE
from helpers.metrics import with_group_interval, with_interval
from helpers.reporting.answers import in_a_word, signed
from helpers.reporting.tables import markdown

UNSEEN = "_unseen"  # ends the name of a task with a backbone that has not seen it
LORA = "lora"  # the row that the question of LoRA is answered with
HEADLINE = {
    "head_only": "head",
    "lora_last6": "LoRA, last 6 blocks",
    "lora": "LoRA, all blocks",
    "dora": "DoRA",
    "full": "full",
}
"""Rows of a task that the README's table shows -> what it calls them."""
STEPS = (
    (REFERENCE, "lora_last6"),
    (REFERENCE, LORA),
    ("lora_last6", LORA),
    (LORA, "dora"),
    ("lora_last6", "full"),
)
"""Rows that cost more, after the row that they must beat."""
FEW_PLACES = 10
"""Test places below which an interval over places is called uncertain itself: percentile intervals
of so few clusters are too narrow (Cameron, Gelbach and Miller 2008, doi 10.1162/rest.90.3.414)."""


def verdict(row: dict[str, Any], evidence: Evidence) -> str:
    """The word for a paired difference; none where the data name no places."""
    if row["unit"] != "places":
        return "no places are named, so no verdict"
    word, places = in_a_word(SimpleNamespace(**row)), evidence.record["places"].get("test", 0)
    return f"{word} ({places} places only)" if places < FEW_PLACES else word


def _summary(evidence: Evidence, table: str, **columns: Any) -> list[dict[str, Any]]:
    """The rows of a summary's table that have these values."""
    return [
        row
        for row in evidence.record["summary"][table]
        if all(row[name] == value for name, value in columns.items())
    ]


def auroc_gain(evidence: Evidence, method: str, over: str = REFERENCE) -> dict[str, Any] | None:
    """The AUROC gain of a row or shape over another row; None without one."""
    columns = {"first": over, "second": method, "metric": "auroc"}
    rows = [r for t in ("gains", "shape_gains") for r in _summary(evidence, t, **columns)]
    return rows[0] if rows else None


def _ahead(evidence: Evidence, method: str, over: str | None = None) -> tuple[str, str]:
    """How far a row or shape is ahead of another row, and the verdict; dashes without a gain."""
    gain = auroc_gain(evidence, method, over or REFERENCE)
    if not gain:
        return "-", "-"
    return signed(gain, 4) + (f" over `{over}`" if over else ""), verdict(gain, evidence)


def _first_run(evidence: Evidence, method: str) -> dict[str, Any] | None:
    """What is kept of the first run of a row or shape, on all chips; None without one."""
    runs = evidence.runs() | evidence.shapes()
    return next((run.record for (name, _), run in runs.items() if name == method), None)


def _cost(run: dict[str, Any]) -> tuple[str, str]:
    """How many parameters a run trained, and in how many seconds."""
    return f"{run['trained_parameters']:,}", f"{run['seconds']:.3g}"


def _name(evidence: Evidence) -> str:
    seen = "seen" if evidence.record["settings"]["seen"] else "not seen"
    return f"{evidence.record['task']}, {seen}"


def headline_row(name: str, chips: int, trivial: tuple, means: dict, gains: dict) -> tuple:
    """A task's row of the README's table: AUROC, bold where it is clearly ahead of the head.

    From the number of test chips, the strongest baseline that knows no shapes (name, metrics), and
    by name in HEADLINE the rows of `seeds.method_means` and of `method_gains` over the head.
    """
    cells = []
    for method in HEADLINE:
        mark = ""
        if (gain := gains.get(method)) and gain["unit"] == "places":
            mark = "**" * (in_a_word(SimpleNamespace(**gain)) == "Yes")
        shown = f"{mark}{with_interval(means[method])}{mark}" if method in means else "-"
        cells.append(shown)
    baseline = f"{trivial[0].split()[0]} {with_group_interval(trivial[1]['auroc'])}"
    return (name, f"{chips:,}", baseline, *cells)


def headline_table(found: dict[str, Evidence], others: dict[str, tuple]) -> str:
    """AUROC of every task and method; `others` are rows of tasks whose evidence is not complete."""
    rows = dict(others)
    for name, evidence in found.items():
        if name in others and evidence.record["missing"]:
            continue
        means = {row["method"]: row for row in _summary(evidence, "means", metric="auroc")}
        gains = {method: auroc_gain(evidence, method) for method in means}
        chips = evidence.record["chips"]["test"]
        rows[name] = headline_row(
            _name(evidence), chips, strongest_baseline(evidence.record["baselines"]), means, gains
        )
    header = ("task, by the backbone", "test chips", "strongest trivial", *HEADLINE.values())
    return markdown(header, list(rows.values()))


def tasks_table(found: dict[str, Evidence]) -> str:
    """Every task and method: test beside validation, the difference to the head, and the cost."""
    lines = []
    for evidence in found.values():
        record = evidence.record
        name, trivial = strongest_baseline(record["baselines"])
        cells = [with_group_interval(trivial[metric]) for metric in ("accuracy", "auroc")]
        lines.append((_name(evidence), name, *cells, *"------"))
        for method in dict.fromkeys(row["method"] for row in _summary(evidence, "means")):
            tests = [
                _summary(evidence, "means", method=method, metric=metric)[0]
                for metric in ("accuracy", "auroc")
            ]
            valid = _summary(evidence, "validation", method=method, metric="auroc")[0]["value"]
            measured = _first_run(evidence, method)
            lines.append(
                (
                    "",
                    f"`{method}`, {tests[0]['seeds']} seeds",
                    *(with_interval(row, 3) for row in tests),
                    f"{valid:.3f}",
                    *_ahead(evidence, method),
                    *_cost(measured),
                    f"{measured['memory_bytes'] / 1e6:,.0f}",
                )
            )
        if record["missing"]:
            lines.append((f"{record['missing']} runs to come", *"---------"))
    header = ("task, by the backbone", "method", "test accuracy", "test AUROC",
              "AUROC on validation", "AUROC ahead of the head", "better?", "trained",
              "seconds", "peak MB")  # fmt: skip
    return markdown(header, lines)


def rates_table(found: dict[str, Evidence]) -> str:
    """How the learning rates were chosen: the lowest validation loss of the first seed."""
    lines = []
    for name, evidence in found.items():
        for method, choice in evidence.record["choices"].items():
            tried = [t for t in evidence.record["trials"] if t["method"] == method]
            losses = [
                f"{t['learning_rate']:g}: "
                + (f"{t['valid_loss']:.4f}" if not t["failure"] else "diverged")
                for t in sorted(tried, key=lambda trial: trial["learning_rate"])
            ]
            edge = "on the edge still" if choice["on_edge"] else "inside"
            lines.append(
                (name, f"`{method}`", "; ".join(losses), f"{choice['rate']:g}",
                 f"{edge}, extended {choice['extended']} times", stopped(evidence, method))
            )  # fmt: skip
    header = ("task", "method", "learning rate: validation loss", "chosen", "in its grid",
              "runs that validation stopped")  # fmt: skip
    return markdown(header, lines)


def shares_table(found: dict[str, Evidence]) -> str:
    """AUROC gain over the head by number of training chips."""
    lines = [
        (
            _name(evidence),
            f"`{row['second']}`",
            f"{row['train_chips']:,} ({row['fraction']:.0%})",
            signed(row, 4),
            verdict(row, evidence),
            stopped(evidence, row["second"], row["fraction"]),
        )
        for evidence in found.values()
        for row in evidence.record["summary"]["shares"]
    ]
    header = ("task, by the backbone", "method", "training chips", "AUROC ahead of the head",
              "better?", "runs that validation stopped")  # fmt: skip
    return markdown(header, lines)


def stopped(evidence: Evidence, method: str, fraction: float | None = None) -> str:
    """How many runs of a row ended before their last epoch; of one share, or of all runs."""
    ended = [
        run["stopped"]
        for run in evidence.record["runs"]
        if run["method"] == method
        and (fraction is None or (run["train_fraction"], run["random_split"]) == (fraction, False))
    ]
    return f"{sum(ended)} of {len(ended)}"


def ranks_table(found: dict[str, Evidence]) -> str:
    """DoRA, and LoRA of other ranks, layers and blocks, against the rows that they change."""
    lines = []
    for evidence in found.values():
        rows = {"dora": {"of": LORA, "method": "dora", "changes": {}}}
        for name, row in (rows | evidence.record["settings"]["shapes"]).items():
            gain = auroc_gain(evidence, name, row["of"])
            if not gain:
                continue
            means = [r for t in ("means", "shapes") for r in _summary(evidence, t, method=name)]
            auroc = next(mean for mean in means if mean["metric"] == "auroc")
            lines.append(
                (_name(evidence), f"`{name}`, {gain['seeds']} seeds", changes_in_words(row),
                 with_interval(auroc, 3), *_ahead(evidence, name, row["of"]),
                 *_cost(_first_run(evidence, name)))
            )  # fmt: skip
    header = ("task, by the backbone", "shape", "what it changes", "test AUROC", "AUROC ahead",
              "better?", "trained", "seconds")  # fmt: skip
    return markdown(header, lines)


def compares_bands(evidence: Evidence) -> bool:
    """Whether the rows of a task differ in their bands: then they are no table of methods."""
    rows = evidence.record["settings"]["methods"]
    return any("bands" in row["changes"] for row in rows.values())


def bands_table(found: dict[str, Evidence]) -> str:
    """Rows of other bands and stems, against the first row of the same method."""
    lines = []
    for evidence in found.values():
        settings, first = evidence.record["settings"], {}
        for name, row in settings["methods"].items():
            run = _first_run(evidence, name)
            if run is None:
                continue
            values = {"bands": [0, 1, 2]} | settings["training"] | row["changes"]
            over = first.setdefault(row["method"], name)
            auroc = _summary(evidence, "means", method=name, metric="auroc")[0]
            default = "repeated" if len(values["bands"]) != 3 else "pretrained"
            lines.append(
                (_name(evidence), f"`{name}`, {auroc['seeds']} seeds",
                 ", ".join(map(str, values["bands"])), values.get("stem") or default,
                 with_interval(auroc, 3), *_ahead(evidence, name, over), *_cost(run))
            )  # fmt: skip
    header = ("task, by the backbone", "row", "bands", "stem", "test AUROC", "AUROC ahead",
              "better?", "trained", "seconds")  # fmt: skip
    return markdown(header, lines)


def backbones_table(seen: Evidence, unseen: Evidence) -> str:
    """What it is worth, by method, that a backbone has seen the training chips, unlabelled.

    From the evidence with that backbone, and with another one on the same chips and seeds.
    """
    first, second = "not seen", "seen"
    sides = ((first, unseen.runs()), (second, seen.runs()))
    lines = []
    for method in dict.fromkeys(name for name, _ in sides[0][1]):
        pairs = {
            (side, seed): run
            for side, runs in sides
            for (name, seed), run in runs.items()
            if name == method
        }
        draws = draws_of(pairs)
        means = method_means(pairs, draws, ("auroc",)).set_index("method").to_dict("index")
        (gain,) = method_gains(pairs, draws).to_dict("records")
        cells = [with_interval(means[side], 3) for side in (first, second)]
        lines.append((f"`{method}`, {gain['seeds']} seeds", *cells, signed(gain, 4),
                      verdict(gain, unseen)))  # fmt: skip
    return markdown(("method", first, second, "AUROC ahead by having seen", "better?"), lines)


def changes_in_words(row: dict[str, Any]) -> str:
    """What a row or shape changes in its runs, as its file says it."""
    method = {"method": row["method"]} if row["method"] else {}
    parts = [
        f"`{name}` {'+'.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in (method | row["changes"]).items()
    ]
    return ", ".join(parts)


def random_split_table(found: dict[str, Evidence]) -> str:
    """AUROC where places lie in several splits, beside places held out."""
    lines = []
    for name, evidence in found.items():
        for row in evidence.record["summary"]["random_split"]:
            cells = [
                with_interval({end: row[f"{kind}_{end}"] for end in ("value", "low", "high")}, 3)
                for kind in ("held_out", "mixed")
            ]
            optimism = "optimistic" if row["low"] > 0 else "not clearly optimistic"
            lines.append((name, f"`{row['method']}`", *cells, signed(row, 3), optimism))
    header = ("task", "method", "places held out", "places mixed", "difference", "mixing is")
    return markdown(header, lines)


def matched_sentence(evidence: Evidence) -> str:
    """What is left of a task on pairs of chips that the acquisition does not tell apart."""
    matching = evidence.record["matching"]
    if not matching["pairs"]:
        return "No two chips of the two classes have a like acquisition."
    rows = evidence.record["summary"]["matched"]
    before = {
        row["method"]: row["value"] for row in _summary(evidence, "means", metric="auroc")
    } | {name: entry["auroc"]["value"] for name, entry in evidence.record["baselines"].items()}
    parts = [
        f"{r['method']} {with_interval(r)} (all chips: {before[r['method']]:.3f})" for r in rows
    ]
    return (
        f"On {matching['pairs']} pairs of a chip of each class with a like acquisition (largest "
        f"difference of a statistic {matching['imbalance_before']:.2f} standard deviations before, "
        f"{matching['imbalance_after']:.2f} after), AUROC: {'; '.join(parts)}."
    )


def task_sentence(evidence: Evidence) -> str:
    """What a task says of LoRA, and where validation would have chosen otherwise."""
    said = f"{evidence.record['settings']['title']}: "
    gain = auroc_gain(evidence, LORA)
    if gain:
        word = verdict(gain, evidence)
        over = f"95 % over {gain['unit']} and {gain['seeds']} seeds"
        said += f"does LoRA improve on the head? {word}: AUROC {signed(gain, 4)} ({over}). "
    return said + ranking_sentence(evidence)


def ranking_sentence(evidence: Evidence) -> str:
    """Whether validation and test put the methods in the same order, by mean AUROC."""
    test = {r["method"]: r["value"] for r in _summary(evidence, "means", metric="auroc")}
    valid = {r["method"]: r["value"] for r in _summary(evidence, "validation", metric="auroc")}
    orders = [sorted(values, key=values.get, reverse=True) for values in (valid, test)]
    if orders[0] == orders[1]:
        return "Validation and test rank the methods alike."
    return f"Validation ranks {' > '.join(orders[0])}; test {' > '.join(orders[1])}."


def when_lora_pays(found: dict[str, Evidence]) -> str:
    """A row for each of `STEPS`: tasks by verdict, with the gain."""
    words = {"Yes": "ahead", "No, it is worse": "behind"}
    lines = []
    for first, second in STEPS:
        tasks: dict[str, list[str]] = {"ahead": [], "not clearly different": [], "behind": []}
        for evidence in found.values():
            gain = auroc_gain(evidence, second, first)
            if gain and gain["unit"] == "places":
                word = in_a_word(SimpleNamespace(**gain))
                shown = f"{_name(evidence)} ({gain['value']:+.4f})"
                tasks[words.get(word, "not clearly different")].append(shown)
        cells = ["; ".join(names) or "-" for names in tasks.values()]
        if any(tasks.values()):
            lines.append((f"`{second}` over `{first}`", *cells))
    return markdown(("step", "ahead on", "not clearly different on", "behind on"), lines)


def sources(found: dict[str, Evidence]) -> str:
    """Where the chips come from, and what the backbone has seen of them."""
    return "\n".join(
        f"- **{name}**: {settings['title']}. {settings['citation']} Licence: {settings['licence']} "
        f"Backbone, {label}: {settings['seen_note']}"
        for name, settings, label in (
            (name, one.record["settings"], one.record["backbone"]) for name, one in found.items()
        )
    )


def over_tasks(found: dict[str, Evidence], table: str) -> pd.DataFrame:
    """A table of every summary below each other, with `task` and `seen`: what figures draw."""
    return pd.DataFrame(
        row | {"task": name, "seen": evidence.record["settings"]["seen"]}
        for name, evidence in found.items()
        for row in evidence.record["summary"][table]
    )
