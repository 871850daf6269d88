"""Save and load a classifier: one file that carries everything needed to use it."""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from helpers import InputError
from helpers.models.backbones import build_backbone, load_complete, read_state_dict
from helpers.models.classifier import Classifier, ClassifierConfig, config_from_json
from helpers.records import check_plain_name, written_whole

if TYPE_CHECKING:
    from peft import PeftModel

PREDICTIONS = "predictions.parquet"  # of a run, beside its weights
EXAMPLE_MODEL = "runs/head_only_example_example_seed0/model_final.safetensors"
"""What `setup_finetune.ipynb` leaves with its defaults."""

# What others read in the provenance of a trained classifier: name of its run, backbone and weights
# as tables name them, parameters of the run.
_PROVENANCE = {"run": str, "backbone": str, "config": dict}


def save_classifier(classifier: Classifier, path: str | Path, provenance: dict) -> Path:
    """Write one safetensors file that holds all that is needed to use the classifier.

    The metadata carry `config` (ClassifierConfig) and `provenance` as JSON, of paths only the last
    part. The file appears whole or not at all.
    """
    path = Path(path)
    metadata = {
        "format": "pt",
        "config": json.dumps(without_folders(asdict(classifier.config))),
        "provenance": json.dumps(without_folders(provenance)),
    }
    state = {key: value.detach().contiguous() for key, value in classifier.state_dict().items()}
    with written_whole(path) as part:
        save_file(state, part, metadata=metadata)
    return path


def without_folders(value, key: str = ""):
    """A record whose paths (`weights` and all that end in `_path`) have lost their folders."""
    if isinstance(value, dict):
        return {name: without_folders(entry, name) for name, entry in value.items()}
    if isinstance(value, str) and (key == "weights" or key.endswith("_path")):
        return Path(value).resolve().name
    return value


def load_classifier(path: str | Path) -> tuple[Classifier, dict]:
    """Read what `save_classifier` wrote; return the classifier (eval mode) and its provenance.

    Raises:
        InputError: file missing, truncated, without our metadata, or with other weights in it.
    """
    path = Path(path)
    state = read_state_dict(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        config, provenance = read_record(metadata["config"], metadata["provenance"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(
            f"{path}: not a classifier saved by this project (no usable configuration in its "
            f"metadata: {error}); pass the model_final.safetensors of a run"
        ) from error
    bands = len(config.bands)
    backbone = build_backbone(config.backbone, config.image_size, bands, initialise=False)
    classifier = Classifier(config, backbone)
    load_complete(classifier, state, str(path))
    return classifier.eval(), provenance


def read_record(config: str, provenance: str) -> tuple[ClassifierConfig, dict]:
    """Configuration and provenance from the JSON text of a file that may come from anywhere.

    Raises:
        ValueError: no JSON, or not what is saved there; InputError is one.
    """
    try:
        config, provenance = config_from_json(json.loads(config)), json.loads(provenance)
    except RecursionError as error:
        raise InputError("metadata nested too deeply") from error
    if not isinstance(provenance, dict):
        raise InputError(f"provenance: a mapping is needed, got {type(provenance).__name__}")
    for name in _PROVENANCE.keys() & provenance.keys():
        if not isinstance(provenance[name], _PROVENANCE[name]):
            raise InputError(f"{name}: unusable in the provenance")
    if "run" in provenance:
        check_plain_name("run", provenance["run"])
    return config, provenance


def load_model(path: str | Path) -> "tuple[Classifier, dict, PeftModel | None]":
    """Read a trained classifier: a `model_final.safetensors`, or the adapter folder of a run.

    Returns:
        The classifier (eval mode, an adapter merged), its provenance with at least `run`,
        `backbone` and `config`, and the unmerged model of an adapter folder, else None.

    Raises:
        InputError: no such file or folder, or a damaged one.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"model_path: no such file or folder: {path}; pass the model_final.safetensors or the "
            "adapter folder of a run"
        )
    if path.is_dir():
        from helpers.models.adapters import load_adapter, merge_adapter  # PEFT takes seconds

        adapter, provenance = load_adapter(path)
        classifier = merge_adapter(copy.deepcopy(adapter))
    else:
        adapter = None
        classifier, provenance = load_classifier(path)
    missing = [name for name in _PROVENANCE if name not in provenance]
    if missing:
        raise InputError(
            f"{path}: its provenance lacks {', '.join(missing)}; pass a classifier that a run saved"
        )
    return classifier, provenance, adapter
