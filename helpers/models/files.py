"""Save and load a classifier: one file that carries everything needed to use it."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from helpers import InputError
from helpers.models.backbones import build_backbone, load_complete, read_state_dict
from helpers.models.classifier import Classifier, config_from_json
from helpers.records import written_whole


def save_classifier(classifier: Classifier, path: str | Path, provenance: dict) -> Path:
    """Write one safetensors file that holds all that is needed to use the classifier.

    The metadata carry `config` (ClassifierConfig) and `provenance` as JSON. The file appears
    whole or not at all.
    """
    path = Path(path)
    metadata = {
        "format": "pt",
        "config": json.dumps(asdict(classifier.config)),
        "provenance": json.dumps(provenance),
    }
    state = {key: value.detach().contiguous() for key, value in classifier.state_dict().items()}
    with written_whole(path) as part:
        save_file(state, part, metadata=metadata)
    return path


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
        config = config_from_json(json.loads(metadata["config"]))
        provenance = json.loads(metadata["provenance"])
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{path}: not a classifier saved by this project (no usable configuration in its "
            f"metadata: {error}); pass the model_final.safetensors of a run"
        ) from error
    bands = len(config.bands)
    backbone = build_backbone(config.backbone, config.image_size, bands, initialise=False)
    classifier = Classifier(config, backbone)
    load_complete(classifier, state, str(path))
    return classifier.eval(), provenance
