"""One folder that answers without this project: the graph, its contract, and an example."""

import gzip
import hashlib
from pathlib import Path

from pydantic import Field

from helpers import InputError
from helpers.deployment.runtimes import Variant
from helpers.deployment.scoring import ModelConfig, answer_rule, open_model
from helpers.records import write_json, written_whole_folder

# How the example loads the graph; nothing else differs between runtimes.
_LOADERS = {
    "onnxruntime": """import onnxruntime

session = onnxruntime.InferenceSession(folder / "model.onnx")
logits_of = lambda chips: session.run(None, {"chips": chips})[0]
""",
    "openvino": """import openvino

hints = {"INFERENCE_PRECISION_HINT": contract["precision_hint"]}
model = openvino.Core().compile_model(folder / "model.xml", "CPU", hints)
logits_of = lambda chips: model(chips)[0]
""",
}

_EXAMPLE = '''"""Classify images: python predict.py chip.png other.npy

Needs numpy, pillow and {runtime}.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

folder = Path(__file__).parent
contract = json.loads((folder / "contract.json").read_text())
{loader}
size = contract["image_size"]
for name in sys.argv[1:]:
    if name.endswith(".npy"):  # (bands, height, width), of the right size
        chip = np.load(name)
    else:
        image = Image.open(name).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        chip = np.asarray(image).transpose(2, 0, 1)
    logits = logits_of(chip[contract["bands"]][None])[0] / contract["temperature"]
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    best = p.argmax() if len(p) > 2 else int(p[1] >= contract["threshold"])
    answer = contract["classes"][best]
    if contract["quantile"] is not None:
        likely = p >= 1 - contract["quantile"]
        answer = answer if likely[best] and likely.sum() == 1 else "unsure"
    print(json.dumps({{"image": name, "answer": answer, "p": p.astype(float).round(4).tolist()}}))
'''

_README = """# {name}

An image classifier: {made}. Backbone `{backbone}`, classes {classes}.

- `contract.json`: what goes in (8-bit images, `image_size` px square, zero-based `bands`;
  normalisation is inside the graph; other sizes are resized with an antialiased bicubic filter) and
  how logits become an answer: softmax of logits / `temperature`; of two classes the second from
  `threshold` on; `unsure` where not that class alone has a probability of 1 - `quantile`.
- `predict.py`: a complete example, after `pip install numpy pillow {runtime}`.
- `SHA256SUMS`: `sha256sum --check SHA256SUMS` says whether the files arrived whole.

Probabilities hold for images like those it was validated on, not for another place or sensor.
"""


class ShipConfig(ModelConfig):
    """What to ship and where to."""

    output: str = Field(description="folder to make")
    overwrite: bool = Field(False, description="replace a folder that is there")


def ship(config: ShipConfig) -> Path:
    """Write a variant as a folder that needs numpy, pillow and its runtime alone; return it.

    Raises:
        InputError: as `open_model` and `answer_rule`; a model that is no ONNX or OpenVINO variant;
            an output that is there already.
    """
    output = Path(config.output)
    if output.exists() and not (config.overwrite and output.is_dir()):
        raise InputError(f"output: {output} is there already; give another, or overwrite a folder")
    scorer = open_model(config.model_path, config.threads, "cpu")
    path = Path(config.model_path)
    variant = Variant.read(path) if path.suffix == ".json" else None
    if variant is None or variant.runtime not in _LOADERS:
        raise InputError(
            f"model_path: {path} needs this project to run; give the JSON of an ONNX or OpenVINO "
            "variant that the benchmark built, such as openvino_int8.json"
        )
    rule = answer_rule(scorer, config)
    classifier = scorer.classifier
    contract = {
        "classes": classifier.classes,
        "image_size": classifier.image_size,
        "bands": classifier.bands,
        "temperature": rule.temperature,
        "threshold": rule.threshold,
        "quantile": rule.quantile,
        "precision_hint": variant.options.get("precision_hint"),
        "backbone": classifier.backbone,
        "variant": variant.name,
        "model_digest": scorer.digest,
    }
    with written_whole_folder(output) as folder:
        for name in variant.files:
            data = (variant.folder / name).read_bytes()
            suffix = Path(name).suffix
            if suffix == ".gz":
                data, suffix = gzip.decompress(data), Path(name).with_suffix("").suffix
            (folder / f"model{suffix}").write_bytes(data)
        write_json(folder / "contract.json", contract)
        loader = _LOADERS[variant.runtime]
        example = _EXAMPLE.format(runtime=variant.runtime, loader=loader)
        (folder / "predict.py").write_text(example)
        about = _README.format(
            name=output.name,
            made=variant.made,
            backbone=classifier.backbone,
            classes=", ".join(classifier.classes),
            runtime=variant.runtime,
        )
        (folder / "README.md").write_text(about)
        sums = [
            f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
            for file in sorted(folder.iterdir())
        ]
        (folder / "SHA256SUMS").write_text("".join(sums))
    return output
