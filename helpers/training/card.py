"""The model card of a run: its record, for a person who finds the weights elsewhere.

It lies in this room since a run comes to be in several ways (command, notebook, comparison), all of
which end in `runs.save_run`, and since it says nothing that the run's record does not hold.
"""

import math
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from helpers.metrics import with_interval
from helpers.models.architectures import architecture
from helpers.records import written_whole

CARD = "README.md"  # the name by which the Hugging Face Hub finds it

_TEXT = """# {run}

An image classifier for overhead chips: {classes}. Made with *DINOv2 for satellite imagery*,
a project that trains heads and adapters on vision transformers; its package `helpers` reads
these files.

| | |
|---|---|
| backbone | {backbone}, pretrained on: {pretraining} |
| trained here | `{method}`: {trained:,} of {total:,} parameters; epoch {best_epoch} of {epochs} |
| data | `{data}`: {chips} |
| input | {input} |

## Test metrics

Of the test split of `{data}`, with 95 % bootstrap intervals{units}.{positive}

{metrics}

## How to use

```python
from helpers.models.files import load_model

classifier, record, _ = load_model("{file}")
```

```
python -m helpers.predict --model_path {file} --input ./chips/ --output predictions.csv
```

Chips need the bands, the type and about the ground resolution named above; they are resized.

## Limits

{limits}

## Licence

The weights that training started from: {weights_licence}. Of the data, `{data}`, training was
told no licence. The `license` in the metadata of this card is that of this classifier; while it
is `unknown`, nobody has given one.
"""


def shareable(record: dict[str, Any]) -> dict[str, Any]:
    """A run's record as it goes with its weights: without candidates and names of chips."""
    return {key: value for key, value in record.items() if key != "candidates"} | {
        "leaks": [leak.partition(", e.g. ")[0] for leak in record["leaks"]],
        "skipped": [{"reason": chip["reason"]} for chip in record["skipped"]],
    }


def write_card(folder: Path, record: dict[str, Any], file: str) -> Path:
    """Write `README.md` into the folder of a run, whole or not at all.

    The record is as `shareable` makes it; `file` names the weights or the adapter in that folder.
    """
    path = folder / CARD
    with written_whole(path) as part:
        part.write_text(model_card(record, file).content)
    return path


def model_card(record: dict[str, Any], file: str) -> ModelCard:
    """The card of a run from its record; `file` as in `write_card`."""
    config, classifier = record["config"], record["classifier"]
    base = base_model(config["backbone"], config["weights"])
    data = ModelCardData(
        license="unknown",
        base_model=base,
        pipeline_tag="image-classification",
        tags=["remote-sensing", record["method"]],
        model_name=record["run"],
        eval_results=_results(record),
    )
    classes = classifier["classes"]
    bands, files = classifier["bands"], classifier["chip_bands"]
    size = classifier["image_size"]
    grouped = "group_low" in record["test"]["accuracy"]
    text = _TEXT.format(
        run=record["run"],
        classes=", ".join(f"`{name}`" for name in classes),
        backbone=record["backbone"],
        pretraining=_pretraining(config["backbone"], config["weights"]),
        method=record["method"],
        trained=record["parameters"]["trainable"],
        total=record["parameters"]["total"],
        best_epoch=record["best_epoch"],
        epochs=record["epochs_trained"],
        data=record["data"],
        chips=", ".join(f"{count:,} {split}" for split, count in record["chips"].items()),
        input=f"bands {', '.join(map(str, bands))} (from 0) of {files or max(bands) + 1}, "
        f"{classifier['chip_dtype'] or 'any type'}; chips of {classifier['chip_size'] or size} px "
        f"at {_ground(classifier['resolution'])}, resized to {size} px",
        units=" over chips, and in round brackets over whole groups" * grouped or " over chips",
        positive=f" The positive class is `{classes[1]}`." * (len(classes) == 2),
        metrics=_table(record["test"], grouped),
        file=file,
        limits="\n".join(f"- {line}" for line in _limits(record, grouped)),
        weights_licence=_weights_licence(record["licence"], config["weights"]),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def base_model(backbone: str, weights: str) -> str | None:
    """Name on the hub of the weights a run started from; None where they are not from there."""
    if weights != "pretrained" or backbone == "example":
        return None
    return timm.get_pretrained_cfg(architecture(backbone).timm_name).hf_hub_id


def _pretraining(backbone: str, weights: str) -> str:
    if weights == "random":
        return "nothing"
    if weights != "pretrained":
        return f"what {Path(weights).name} was, which training does not know"
    return architecture(backbone).pretraining


def _weights_licence(licence: str | None, weights: str) -> str:
    if licence is None:
        return "none, they were random"
    return licence if weights == "pretrained" else f"{licence}, if they are the published ones"


def _ground(resolution: float | None) -> str:
    return f"{resolution:.3g} m a pixel" if resolution else "a ground resolution that is not known"


def _results(record: dict[str, Any]) -> list[EvalResult]:
    """One entry a test metric that has a value."""
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=record["data"],
            dataset_name=record["data"],
            dataset_split="test",
            metric_type=name,
            metric_value=entry["value"],
        )
        for name, entry in record["test"].items()
        if math.isfinite(entry["value"])
    ]


def _table(test: dict[str, dict[str, float]], grouped: bool) -> str:
    """Test metrics with their intervals as Markdown."""
    rows = ["| metric | value |", "|---|---|"]
    for name, entry in test.items():
        groups = f" ({entry['group_low']:.3f} to {entry['group_high']:.3f})" if grouped else ""
        rows.append(f"| {name.replace('_', ' ')} | {with_interval(entry)}{groups} |")
    return "\n".join(rows)


def _limits(record: dict[str, Any], grouped: bool) -> list[str]:
    """What a user must not expect, a sentence or two each."""
    lines = [
        "Measured on this data alone: how good it is at other places, seasons or sensors is not "
        "known.",
        "Every chip gets one of the classes, also one that shows none of them.",
    ]
    if record["config"]["backbone"] == "example" and record["config"]["weights"] == "pretrained":
        lines.append(
            "The backbone is the project's small embedded one. It is not Meta's DINOv2 and holds "
            "none of its weights."
        )
    if not grouped:
        lines.append(
            "The data name no groups such as places: chips of one place may stand in several "
            "splits, which makes the metrics better and the intervals narrower than they should be."
        )
    lines += [f"Leak in the data: {leak}." for leak in record["leaks"]]
    if record["skipped"]:
        lines.append(f"{len(record['skipped'])} files of the data could not be read.")
    if record["failure"]:
        lines.append(f"**The training failed**: {record['failure']}.")
    return lines
