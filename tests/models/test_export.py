"""ONNX and OpenVINO agree with eager, for every kind of block and batch size."""

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch

from helpers.models.export import export_onnx
from tests.models.common import random_chips
from tests.models.parity import TINY, tiny_classifier

# Rounding of fp32 in another order; measured up to 2e-6 on logits of size 0.1.
TOLERANCE = 2e-5


# One block of every family; of one the last four, as the largest head input wants them.
CASES = [(model, 1, "cls+mean") for model in TINY if not model.startswith("dinov3")]
CASES.append(("dinov3", 4, "4xcls+mean"))  # and those of `dinov3_sat` are the same


@pytest.mark.parametrize(("model", "depth", "head_input"), CASES)
def test_onnx_and_openvino_agree_with_eager(model, depth, head_input, tmp_path):
    classifier = tiny_classifier(None, model, depth=depth, head_input=head_input)
    size = classifier.config.image_size
    path = export_onnx(classifier, tmp_path / "model.onnx")
    assert not {"If", "Loop"} & {node.op_type for node in onnx.load(path).graph.node}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    core = openvino.Core()
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(path), "CPU", hint)
    for n in (1, 3):
        chips = random_chips(n, size=size, seed=n)
        with torch.inference_mode():
            expected = classifier(chips).numpy()
        answers = (session.run(None, {"chips": chips.numpy()})[0], compiled(chips.numpy())[0])
        for answer in answers:
            np.testing.assert_allclose(answer, expected, atol=TOLERANCE, rtol=0)
        assert np.ptp(expected, axis=0).min() > 100 * TOLERANCE or n == 1
